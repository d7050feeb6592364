"""Answers on disk: whole or not there, of one run only, and there again after a kill; and what is told of them."""

import fcntl
import json
import os
import resource
from dataclasses import replace

import pytest

from dllm_ray.answers import (
    ANSWER_COLUMNS,
    Answer,
    AnswerStore,
    answer_columns,
    answer_key,
    base_seed,
    changes,
    ended_by_stop,
)
from dllm_ray.errors import OutputError
from dllm_ray.infilling import encode_gaps
from dllm_ray.models.config import ModelConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.output import SampleOutput

KEY = {"sampler.steps": 4, "sampler.suppress_tokens": (1, 2), "prompts": "2 of abc"}
ANSWERS = {5: Answer([7, 8], 3, True), 0: Answer([], 1, False), 2: Answer([300_000], 9, True)}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "folder" / "answers.jsonl"


def contents(store):
    return {row: store[row] for row in range(10) if row in store}


def test_answers_and_facts_are_there_again_in_another_process(path):
    with AnswerStore(path, KEY) as store:
        store.remember(seed=2**61, run_id="a")
        store.add(ANSWERS, seconds=1.5)
        store.remember(run_id="b")
        assert contents(store) == ANSWERS
    with AnswerStore(path, KEY) as again:
        assert contents(again) == ANSWERS and len(again) == 3
        assert again.facts == {"seed": 2**61, "run_id": "b", "seconds": 1.5}
        again.add({1: Answer([4], 2, False)})
        assert again[1] == Answer([4], 2, False) and again[5] == ANSWERS[5]


def test_wherever_a_kill_cuts_the_file_whole_answers_stay_and_more_can_follow(path):
    with AnswerStore(path, KEY) as store:
        store.add(ANSWERS, seconds=2.0)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with AnswerStore(path, KEY) as store:
            kept = contents(store)
            assert kept == {row: ANSWERS[row] for row in list(ANSWERS)[: len(kept)]}
            assert len(kept) == max(whole[:length].count(b"\n") - 1, 0)
            store.add({9: ANSWERS[5]})
        with AnswerStore(path, KEY) as again:
            assert contents(again) == kept | {9: ANSWERS[5]}


def test_answers_of_other_settings_are_neither_mixed_nor_lost(path):
    with AnswerStore(path, KEY) as store:
        store.add(ANSWERS)
    with pytest.raises(OutputError, match=r"holds 3 answers .*: sampler.steps was 4, is now 8\. .* delete it, or name"):
        AnswerStore(path, KEY | {"sampler.steps": 8})
    with AnswerStore(path, KEY) as store:
        assert contents(store) == ANSWERS


def test_a_fresh_start_and_a_run_that_answered_nothing_make_room(path):
    with AnswerStore(path, KEY) as store:
        store.remember(seed=1)
    with AnswerStore(path, {"other": 1}) as store:
        assert store.facts == {}
        store.add(ANSWERS)
    with AnswerStore(path, KEY, fresh=True) as store:
        assert len(store) == 0 and store.facts == {}
    assert json.loads(path.read_text()) == {"key": json.loads(json.dumps(KEY))}


def test_one_run_at_a_time(path):
    with AnswerStore(path, KEY) as store:
        with pytest.raises(OutputError, match="another run is using"):
            AnswerStore(path, KEY)
        store.add(ANSWERS)
        assert contents(store) == ANSWERS


def test_nothing_stays_when_it_is_removed(path):
    with AnswerStore(path, KEY) as store:
        store.add(ANSWERS)
        store.remove()
    assert list(path.parent.iterdir()) == []


def test_a_folder_that_can_not_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="can't be written"):
        AnswerStore(tmp_path / "file" / "answers.jsonl", KEY)


@pytest.fixture
def full_disk():
    """Limits how large files may become; what doesn't fit is written in part."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_message_and_nothing_that_was_kept_is_lost(path, full_disk):
    kept = {}
    with pytest.raises(OutputError, match=r"answers\.jsonl can't be written: File too large"):
        full_disk(20_000)
        with AnswerStore(path, KEY) as store:
            for row in range(1000):
                store.add({row: Answer([row] * 50, 1, True)})
                kept[row] = Answer([row] * 50, 1, True)
    full_disk(None)
    assert 10 < len(kept) < 1000
    with AnswerStore(path, KEY) as again:
        assert {row: again[row] for row in range(1000) if row in again} == kept


def test_answers_can_follow_when_the_disk_has_room_again(path, full_disk):
    with AnswerStore(path, KEY) as store:
        full_disk(500)
        with pytest.raises(OutputError):
            store.add({1: Answer(list(range(1000)), 1, True)})
        full_disk(None)
        assert 1 not in store
        store.add(ANSWERS)
    with AnswerStore(path, KEY) as again:
        assert contents(again) == ANSWERS


def test_a_file_that_was_removed_between_opening_and_locking_is_opened_anew(path, monkeypatch):
    AnswerStore(path, KEY).close()
    lock = fcntl.flock
    removals = iter([True, True])

    def late(file, how):
        if next(removals, False):
            path.unlink()
        lock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with AnswerStore(path, KEY) as store:
        store.add(ANSWERS)
    with AnswerStore(path, KEY) as again:
        assert contents(again) == ANSWERS


@pytest.mark.parametrize(
    "damage", [b"\0" * 30, b"{}\n", b"no json\n", b'{"key":{x\n', b'{"row":1,"tokens":[],"nfe":1,"ended":true}\n', b"x"]
)
@pytest.mark.parametrize("answers", [True, False])
def test_a_file_that_does_not_begin_like_one_of_answers_is_refused_and_left(path, damage, answers):
    with AnswerStore(path, KEY) as store:
        store.add(ANSWERS)
    whole = path.read_bytes()
    held = damage + (whole[len(damage) :] if answers else b"")
    path.write_bytes(held)
    with pytest.raises(OutputError, match=r"answers.jsonl is damaged, or no file of answers: delete it, or name"):
        AnswerStore(path, KEY)
    assert path.read_bytes() == held
    with AnswerStore(path, KEY, fresh=True) as store:
        assert len(store) == 0


def test_changes_name_what_came_went_and_differs():
    assert changes({"a": 1, "b": 2, "c": 3}, {"a": 1, "b": 3, "d": 4}) == [
        "b was 2, is now 3",
        "d was None, is now 4",
        "c was 3, is now None",
    ]


# --- what answers depend on


def test_what_answers_depend_on_is_in_their_key(make_lm, tmp_path):
    make_lm().save(tmp_path / "model")
    model, config = ModelConfig(path=str(tmp_path / "model")), SamplerConfig(seed=3)
    prompts = [list(range(20, 22 + number % 5)) for number in range(11)]
    key = answer_key(model, config, 2, prompts)
    assert key == answer_key(replace(model, device_map="auto"), config, 2, [tuple(prompt) for prompt in prompts])
    others = [
        answer_key(replace(model, dtype="bfloat16"), config, 2, prompts),
        answer_key(replace(model, adapter=str(tmp_path)), config, 2, prompts),
        answer_key(model, replace(config, seed=4), 2, prompts),
        answer_key(model, config, 3, prompts),
        answer_key(model, config, 2, prompts, infill=True),
        answer_key(model, config, 2, prompts[:-1]),
        answer_key(model, config, 2, [prompts[0] + prompts[1], [], *prompts[2:]]),
    ]
    assert all(other != key for other in others)
    weights = next((tmp_path / "model").glob("*.safetensors"))
    facts = weights.stat()
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns + 10**9))
    assert answer_key(model, config, 2, prompts) != key


def test_a_seed_that_is_left_open_is_drawn_once(path):
    with AnswerStore(path, KEY) as store:
        seed = base_seed(store, SamplerConfig(seed=None))
    with AnswerStore(path, KEY) as again:
        assert base_seed(again, SamplerConfig(seed=None)) == seed
    with AnswerStore(path.with_name("other"), KEY) as other:
        assert base_seed(other, SamplerConfig(seed=5)) == 5


# --- what is told of them


def test_an_answer_has_ended_where_an_end_of_text_token_follows_it():
    output = SampleOutput(
        sequences=[[20, 5, 6, 7, 8], [20, 5, 6, 9, 8], [20, 9, 9, 9, 9]],
        completions=[[5, 6, 7, 8], [5, 6], []],
        row_nfe=[1, 1, 1],
        nfe=1,
        seconds=1.0,
        history=None,
    )
    assert ended_by_stop([[20]] * 3, output, [9]) == [False, True, True]


def test_an_answer_as_columns_of_a_row(make_lm, tokenizer):
    spec = make_lm().spec
    tokens = tokenizer.encode("sort", add_special_tokens=False)
    answer = Answer(tokens, 2, True)
    columns = answer_columns(tokenizer, spec, answer, 7)
    assert (*columns, "sequence") == ANSWER_COLUMNS
    whole = answer_columns(tokenizer, spec, Answer(tokens, 2, True, [*tokens, *tokens]), 7)
    assert whole == {**columns, "sequence": "sortsort"}
    assert columns["completion"] == "sort"
    assert (columns["completion_tokens"], columns["nfe"], columns["seed"]) == (len(tokens), 2, 7)
    assert columns["tpf"] == len(tokens) / 2
    gaps = encode_gaps(tokenizer, spec.mask_token_id, f"a [MASK:{len(tokens)}] b")
    assert answer_columns(tokenizer, spec, answer, 7, gaps)["completion"] == "a sort b"
