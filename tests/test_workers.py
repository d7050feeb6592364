"""A pool of Ray actors that hold the model: the same answers from any number of them, also when one is lost, and when
the work is broken off and taken up again."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import ray

from dllm_ray import workers
from dllm_ray.answers import Answer, AnswerStore, answer_key, ended_by_stop
from dllm_ray.cluster import Shares
from dllm_ray.errors import ConfigError, DataError, ModelError, OutputError, ResourceError
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.load import open_tokenizer
from dllm_ray.prompts import encode_rows, encode_texts
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler, row_seeds
from dllm_ray.sharing import SharedPool
from dllm_ray.workers import Call, ModelPool, sample_dataset

pytestmark = pytest.mark.slow

CONFIG = SamplerConfig(max_new_tokens=8, block_size=4, steps=4, temperature=1.0, seed=3)
PROMPTS = [list(range(20, 22 + number % 5)) for number in range(11)]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def model(make_lm, tmp_path_factory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("model")
    make_lm().save(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture(scope="module")
def two(model):
    """A pool of two workers for the tests that leave them alive."""
    with pool(model) as answers:
        yield answers


def pool(model, workers=2):
    return ModelPool(model, Shares(workers, cpus=0.5, gpus=0, data_cpus=1), threads=1)


def completions(pool, slice_rows, on_progress=lambda done: None):
    """The answers to `PROMPTS`, in their order."""
    answers = {}
    for part in pool.slices(PROMPTS, CONFIG, slice_rows):
        answers |= zip(part.rows, part.output.completions, strict=True)
        on_progress(len(answers))
    return [answers[row] for row in range(len(PROMPTS))]


def test_the_pool_answers_like_one_sampler_whatever_the_workers_and_slices(model, two, make_lm):
    expected = Sampler(make_lm(), CONFIG).sample(PROMPTS)
    with pool(model, workers=1) as one:
        assert completions(two, 3) == expected.completions
        assert completions(one, 4) == expected.completions


def test_a_lost_worker_is_replaced_and_its_slice_done_again(model, make_lm):
    expected = Sampler(make_lm(), CONFIG).sample(PROMPTS).completions
    with pool(model) as answers:
        answers.wait()
        killed = []

        def kill_one(_done: int) -> None:
            if not killed:  # after the first slice, while others are under way
                worker = answers._actors[0]
                killed.append(worker)
                os.kill(ray.get(worker.__ray_call__.remote(lambda _self: os.getpid())), signal.SIGKILL)

        assert completions(answers, 2, kill_one) == expected
        assert killed and killed[0] is not answers._actors[0]


def test_a_worker_lost_while_it_loads_is_replaced_and_work_that_kills_all_of_them_given_up(model, monkeypatch):
    with pool(model, workers=1) as answers:
        ray.kill(answers._actors[0])
        found = list(answers.run(lambda lm, number: (number, lm.spec.family), [(1,), (2,)]))
        assert [(index, result) for index, result, _ in found] == [(0, (1, "bert")), (1, (2, "bert"))]
        assert answers._losses == 0
        monkeypatch.setattr(workers, "_MAX_LOSSES", 1)
        with pytest.raises(ResourceError, match=r"^workers keep dying"):
            list(answers.run(lambda _lm: os._exit(1), [()]))


def test_a_workers_complaint_arrives_as_itself(model, two, tmp_path):
    with pytest.raises(ConfigError, match=r"^a canvas of 68 tokens .* context of 64"):
        list(two.slices([list(range(20, 80))], CONFIG, 4))
    gone = ModelConfig(path=str(tmp_path / "gone"))
    with pool(gone) as answers, pytest.raises(ModelError, match=r"^no such model directory: .*gone$"):
        completions(answers, 4)


def test_calls_that_come_while_others_are_under_way_are_made_and_errors_do_not_end_the_rest(two):
    def work(_lm, number):
        if number == 1:
            raise DataError("one is broken")
        time.sleep(1 if number == 0 else 0)
        return number

    todo, seen, late = [Call("slow", work, (0,)), Call("broken", work, (1,))], [], [Call("late", work, (2,))]

    def take():
        if todo:
            return todo.pop(0)
        return late.pop() if seen and late else None  # comes when the broken one is back

    for call, outcome in two.serve(take, lambda: bool(late), 0.02):
        seen.append((call.name, outcome if isinstance(outcome, Exception) else outcome[0]))
    assert [name for name, _ in seen] == ["broken", "late", "slow"]
    assert isinstance(seen[0][1], DataError) and [outcome for _, outcome in seen[1:]] == [2, 0]


def test_callers_share_the_workers_and_each_gets_what_he_would_alone(two):
    def doubled(_lm, number):
        return 2 * number

    shared = SharedPool(two)

    def ask(caller):
        return sorted(result for _, result, _ in shared.run(doubled, [(10 * caller + n,) for n in range(5)]))

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(ask, range(3)))
    with pytest.raises(ConfigError, match=r"^a canvas of 68 tokens .* context of 64"):
        list(shared.run(workers._sample, [([list(range(20, 80))], CONFIG, [1], False)]))
    shared.close()
    assert found == [[2 * (10 * caller + n) for n in range(5)] for caller in range(3)]
    assert len(completions(two, 4)) == len(PROMPTS)


def test_no_prompts_no_answers(two):
    assert list(two.slices([], CONFIG, 4)) == []


def test_slices_bring_back_what_was_written_and_leave_out_what_is_done(two, make_lm):
    lm = make_lm()
    expected = Sampler(lm, CONFIG).sample(PROMPTS)
    ended = ended_by_stop(PROMPTS, expected, lm.spec.stop_token_ids)
    every = list(two.slices(PROMPTS, CONFIG, 3))
    assert [part.output.sequences for part in every] == [[]] * 4
    answers = {row: answer for part in every for row, answer in part.answers().items()}
    assert [answers[row].tokens for row in range(len(PROMPTS))] == expected.completions
    assert [answers[row].ended for row in range(len(PROMPTS))] == ended

    whole, begun = every[0].rows, every[1].rows
    rest = list(two.slices(PROMPTS, CONFIG, 3, done=[*whole, begun[0]]))
    assert sorted(part.rows for part in rest) == sorted(part.rows for part in every[1:])
    assert all(answers[row] == answer for part in rest for row, answer in part.answers().items())


def test_a_store_is_filled_with_what_it_lacks_and_keeps_a_drawn_seed(model, two, make_lm, tmp_path):
    drawn = replace(CONFIG, seed=None)
    path = tmp_path / "answers.jsonl"

    class Broken(Exception):
        pass

    def break_off(done: int) -> None:
        if done >= 4:
            raise Broken

    with AnswerStore(path, answer_key(model, drawn, 2, PROMPTS)) as store, pytest.raises(Broken):
        two.fill(store, PROMPTS, drawn, 2, break_off)
    with AnswerStore(path, answer_key(model, drawn, 2, PROMPTS)) as store:
        before = {row: store[row] for row in range(len(PROMPTS)) if row in store}
        assert len(before) == 4
        seconds, progress = store.facts["seconds"], []
        two.fill(store, PROMPTS, drawn, 2, progress.append)
        assert min(progress) >= 5 and progress[-1] == len(PROMPTS)
        assert store.facts["seconds"] > seconds
        expected = Sampler(make_lm(), replace(CONFIG, seed=store.facts["seed"])).sample(PROMPTS)
        found = [store[row] for row in range(len(PROMPTS))]
        assert [answer.tokens for answer in found] == expected.completions
        assert [answer.nfe for answer in found] == expected.row_nfe
        assert all(found[row] == answer for row, answer in before.items())

        two.fill(store, PROMPTS, drawn, 2, lambda _done: pytest.fail("nothing was left to answer"))


def test_a_ray_dataset_is_answered_in_its_order(two, make_lm, tmp_path):
    rows = [{"id": number, "query": f"reverse {'9' * (number % 4)}"} for number in range(9)]

    def slow_start(row):  # the first block is the last to be ready; workers can't import this module
        time.sleep(0.5 * (row["id"] == 0))
        return row

    dataset = ray.data.from_items(rows, override_num_blocks=3).map(slow_start)
    resume = tmp_path / "answers.jsonl"
    found = list(sample_dataset(dataset, two, CONFIG, 4, {"prompt": "query"}, resume))
    assert [{"id": row["id"], "query": row["query"]} for row in found] == rows
    assert not resume.exists()

    tokenizer, *_ = open_tokenizer(two.model.path)
    _, prompts = encode_rows([(str, {"prompt": row["query"]}) for row in rows], tokenizer, {})
    expected = Sampler(make_lm(), CONFIG).sample([list(prompt) for prompt in prompts])
    assert [row["completion_tokens"] for row in found] == [len(tokens) for tokens in expected.completions]
    assert [row["completion"] for row in found] == [
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected.completions
    ]
    assert [row["seed"] for row in found] == row_seeds(CONFIG.seed, range(9))


def test_conversations_of_a_ray_dataset_and_its_broken_rows(two):
    talk = [{"role": "user", "content": "sort 21"}]
    (row,) = sample_dataset(ray.data.from_items([{"messages": talk}]), two, CONFIG)
    assert row["messages"] == talk and row["nfe"] > 0
    with pytest.raises(DataError, match=r"^row 1: no prompt: "):
        sample_dataset(ray.data.from_items([{"prompt": "a"}, {"prompt": None}]), two, CONFIG)
    with pytest.raises(DataError, match=r"^row 0: its column 'seed' is called like one of the answer's"):
        sample_dataset(ray.data.from_items([{"prompt": "a", "seed": 1}]), two, CONFIG)


def test_texts_of_a_ray_dataset_are_filled_in(two, make_lm):
    lm = make_lm()
    dataset = ray.data.from_items([{"text": "The [MASK:4] sat"}, {"text": "[MASK]at [MASK:2]"}])
    rows = list(sample_dataset(dataset, two, CONFIG, infill=True))
    texts, prompts = encode_texts([(str, row) for row in rows], lm.tokenizer, lm.spec.mask_token_id, {})
    expected = Sampler(lm, CONFIG).infill([list(prompt) for prompt in prompts])
    assert [row["completion_tokens"] for row in rows] == [4, 3]
    assert [row["completion"] for row in rows] == [
        lm.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected.sequences
    ]
    assert texts == [row["text"] for row in rows]


def test_a_worker_traces_a_few_prompts(two, make_lm):
    seeds = row_seeds(CONFIG.seed, range(2))
    expected = Sampler(make_lm(), CONFIG).sample(PROMPTS[:2], trace=True, seeds=seeds)
    canvases, found = two.trace(PROMPTS[:2], CONFIG, seeds)
    assert canvases == Sampler(make_lm(), CONFIG).canvases(PROMPTS[:2])
    assert found.sequences == expected.sequences and found.history is None
    assert [[commit.positions for commit in row] for row in found.commits] == [
        [commit.positions for commit in row] for row in expected.commits
    ]


def test_an_interrupted_dataset_goes_on_from_its_file(two, tmp_path):
    dataset = ray.data.from_items([{"prompt": f"sort {number}"} for number in range(6)])
    resume = tmp_path / "answers.jsonl"
    answers = sample_dataset(dataset, two, CONFIG, 2, resume=resume)
    first = next(answers)
    answers.close()
    progress = []
    again = list(sample_dataset(dataset, two, CONFIG, 2, resume=resume, on_progress=progress.append))
    assert again[0] == first and len(again) == 6 and progress == []
    with AnswerStore(resume, {"another": "run"}) as store:
        store.add({0: Answer([1], 1, False)})
    with pytest.raises(OutputError, match="holds 1 answers of an unfinished run"):
        sample_dataset(dataset, two, CONFIG, 2, resume=resume)
