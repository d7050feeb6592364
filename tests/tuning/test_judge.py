"""Settings that are asked at the same time get what a plain evaluation gives each, and nothing is asked twice."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sharing_testing import LocalPool

from dllm_ray.cluster import Shares
from dllm_ray.config import to_dict
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.evaluation import answering
from dllm_ray.evaluation.asking import Asker
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig
from dllm_ray.evaluation.suite import Ask
from dllm_ray.metrics import Labels
from dllm_ray.models.config import ModelConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning import judge as judging
from dllm_ray.tuning.answered import Answered
from dllm_ray.tuning.judge import Budget, Judge
from dllm_ray.tuning.scores import per_document

ROWS, SLICE = 12, 2
LABELS = Labels("sweep", "it", "model")
SAMPLER = SamplerConfig(max_new_tokens=8, block_size=4, steps=4, temperature=1.0, seed=3)
OTHERS = [replace(SAMPLER, temperature=0.7), replace(SAMPLER, steps=2), replace(SAMPLER, block_size=8, steps=8)]

# The score is a number that hardly two answers share.
SCORING = """
from zlib import crc32

def score(doc, results):
    return {"value": crc32(results[0].encode()) / 2**32}
"""
TASK = """
task: crc
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: question
process_results: !function scoring.score
generation_kwargs: {until: []}
metric_list:
  - {metric: value, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def lms(make_lm):
    return [make_lm(), make_lm()]


@pytest.fixture(scope="module")
def model(lms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    lms[0].save(folder)
    return ModelConfig(path=str(folder))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """Makes a task of questions."""

    def make(questions):
        folder = tmp_path_factory.mktemp("task")
        (folder / "rows.jsonl").write_text("".join(json.dumps({"question": text}) + "\n" for text in questions))
        (folder / "scoring.py").write_text(SCORING)
        (folder / "crc.yaml").write_text(TASK.replace("FILE", str(folder / "rows.jsonl")))
        config = EvaluateConfig(tasks=("crc",), include_path=str(folder), chat_template=False, batch_size=SLICE)
        return Ask("", config, SAMPLER, LikelihoodConfig())

    return make


@pytest.fixture(scope="module")
def ask(task):
    return task([f"sort {number * 37 % 1000} {'9' * (number % 4)}" for number in range(ROWS)])


@pytest.fixture
def judge(lms, model, ask, tmp_path, monkeypatch):
    """Makes a judge whose workers are threads of this process."""
    monkeypatch.setattr(judging, "ModelPool", lambda *_: LocalPool(lms))
    opened = []

    def make(asked=ask, **budget):
        arguments = (model, Shares(2, 0.5, 0, 1), 1, asked, 0, str(tmp_path / "answers"), ("value", "none"))
        opened.append(Judge(*arguments, Budget(**budget), {"machine": "mine"}, LABELS))
        return opened[-1]

    yield make
    for one in opened:
        one._pool.close()
        one._metrics.close()


@pytest.fixture(scope="module")
def plain(lms, model, ask, tmp_path_factory):
    """A plain evaluation of the first documents: scores and figures."""

    def evaluate(sampler, documents=ROWS, asked=ask):
        asked = replace(asked, sampler=sampler, evaluate=replace(asked.evaluate, limit=documents))
        cache = str(tmp_path_factory.mktemp("answers"))
        results, figures = Asker(model, 0).ask(asked, LocalPool(lms), cache)
        return per_document(results, "value", "none"), figures

    return evaluate


@pytest.fixture
def put(tmp_path):
    """Asks a judge."""

    def answer(judge, sampler=SAMPLER, documents=range(ROWS), name="it"):
        return judge.answer(to_dict(sampler), documents, str(tmp_path / "results" / name), name)

    return answer


def test_settings_asked_at_once_get_what_a_plain_evaluation_gives(judge, put, plain):
    one, settings = judge(), [SAMPLER, *OTHERS]
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(put, one, sampler, name=f"s{n}") for n, sampler in enumerate(settings)]
    found = [call.result() for call in calls]
    for answered, sampler in zip(found, settings, strict=True):
        scores, figures = plain(sampler)
        assert answered.scores == scores and list(answered.scores) == [f"crc/{place}" for place in range(ROWS)]
        assert (answered.tpf, answered.nfe) == (figures["tpf"], figures["nfe"] / ROWS)
        assert (answered.asked, answered.truncated) == (ROWS, 0)
    assert len({answered.score for answered in found}) == 4
    assert one.work() == (4 * ROWS, 4 * ROWS / SLICE / 2)  # a second for a slice, of two workers


def test_a_setting_asked_twice_at_once_is_answered_once(judge, put):
    one = judge()
    with ThreadPoolExecutor(3) as threads:
        calls = [threads.submit(put, one, name=name) for name in ("a", "b", "c")]
    found = [call.result() for call in calls]
    assert sorted(answered.asked for answered in found) == [0, 0, ROWS]
    assert found[0].scores == found[1].scores == found[2].scores
    assert one.work()[0] == ROWS


def test_more_documents_of_a_setting_ask_only_those(judge, put, plain):
    one = judge()
    found = [put(one, documents=range(number)) for number in (4, 8, ROWS)]
    assert [answered.asked for answered in found] == [4, 4, 4]
    whole, figures = plain(SAMPLER)
    assert found[-1].scores == whole and found[-1].tpf == figures["tpf"]
    assert found[0].scores == dict(list(whole.items())[:4])
    assert one.work()[0] == ROWS


def test_held_out_documents_are_those_behind_the_search(judge, put, plain):
    found = put(judge(), documents=range(8, ROWS))
    assert found.scores == dict(list(plain(SAMPLER)[0].items())[8:])
    assert list(found.scores) == [f"crc/{place}" for place in range(8, ROWS)]


def test_results_are_kept_in_lm_evals_form(judge, put, tmp_path):
    answered = put(judge(), documents=range(4))
    folder = tmp_path / "results" / "it"
    assert Answered.read(folder) == answered
    results = json.loads((folder / "results.json").read_text())
    assert results["results"]["crc"]["value,none"] == pytest.approx(answered.score)
    assert results["setting"]["name"] == "it" and results["environment"] == {"machine": "mine"}
    lines = [json.loads(line) for line in (folder / "samples_crc.jsonl").read_text().splitlines()]
    assert {f"crc/{line['doc_id']}": line["value"] for line in lines} == answered.scores


def test_answering_ends_between_slices_when_the_time_is_over(judge, put, monkeypatch):
    clock = SimpleNamespace(now=0.0, time=lambda: clock.now)
    monkeypatch.setattr(judging, "time", clock)
    one = judge(until=2.0)
    count = one._count

    def tick(requests, seconds):
        clock.now += 1
        count(requests, seconds)

    one._count = tick
    assert put(one) is None
    assert one.work()[0] == 2 * SLICE
    assert put(one, documents=range(SLICE)) is None  # nothing is begun any more
    one._pool.close()  # a slice that was handed out ahead is over: the next judge's workers hold the same model
    assert put(judge()).asked == ROWS - 2 * SLICE  # what was finished is on disk


def test_documents_are_counted_when_settings_are_begun(judge, put):
    one = judge(documents=5)
    assert put(one, documents=range(4)).asked == 4
    assert put(one, OTHERS[0], range(8)).asked == 8  # begun, and so ended
    assert put(one, OTHERS[1], range(2)) is None
    assert put(one, documents=range(8)) is None
    assert one.work()[0] == 12


def test_answers_from_disk_are_not_counted(judge, put):
    put(judge())
    one = judge(documents=4)
    assert put(one).asked == 0 and put(one).asked == 0
    assert put(one, OTHERS[0]).asked == ROWS
    assert one.work()[0] == ROWS


def test_prompts_that_were_cut_are_counted(judge, put, task):
    long = task(["sort 1", "the quick brown fox " * 40, "sort 2", "jumps over the lazy dog " * 40])
    one = judge(long)
    assert put(one, documents=range(4)).truncated == 2
    assert put(one, documents=range(1)).truncated == 0


def test_equal_questions_are_asked_once_and_take_as_long_each(judge, put, task):
    same = task(["sort 21"] * 3 + ["sort 12"])
    exact = replace(SAMPLER, eos_early_stop=False)
    answered = put(judge(same), exact, range(4))
    assert (answered.asked, len(answered.scores), answered.nfe) == (2, 4, 4.0)


def test_settings_that_do_not_work_are_refused_and_others_go_on(judge, put, plain, tmp_path):
    one = judge()
    with pytest.raises(ConfigError, match="leaves no room for a prompt in the model's context of 64"):
        put(one, replace(SAMPLER, max_new_tokens=64, block_size=64))
    with pytest.raises(ConfigError, match="temprature"):
        one.answer({"temprature": 1.0}, range(2), str(tmp_path), "it")
    assert put(one, documents=range(2)).scores == plain(SAMPLER, 2)[0]


def test_what_a_worker_met_under_one_setting_is_no_affair_of_the_others(judge, put, plain, monkeypatch):
    generate = answering._generate

    def fails(lm, units, config):
        if config.temperature == 0.7:
            raise DataError("it is too warm")
        return generate(lm, units, config)

    monkeypatch.setattr(answering, "_generate", fails)
    one = judge()
    with ThreadPoolExecutor(2) as threads:
        good, bad = threads.submit(put, one, name="good"), threads.submit(put, one, OTHERS[0], name="bad")
        with pytest.raises(DataError, match="it is too warm"):
            bad.result(60)
        assert good.result(60).asked == ROWS
    monkeypatch.undo()
    assert good.result().scores == plain(SAMPLER)[0]
