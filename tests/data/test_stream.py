"""A run's global batches: complete, of the promised length, and the same from any cursor on."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.data import sources
from dllm_ray.data.config import SourceConfig
from dllm_ray.data.stream import Run

RULES = {
    "fixed": {},
    "packed": {"packing": True},
    "packed blocks": {"packing": True, "padding": "block"},
    "bucketed": {"max_tokens_per_batch": 128},
}
EPOCHS = 2


def rows(count: int, first: int) -> list[dict]:
    return [{"prompt": f"{n}", "response": "0" * (n % 7) + f"{n}"} for n in range(first, first + count)]


@pytest.fixture(scope="module")
def three(tmp_path_factory, prepare_data):
    """Three sources of 90, 40 and 25 rows, in shards of a few rows: `three(weights=..., rule settings)`."""
    folder = tmp_path_factory.mktemp("three")
    paths = []
    for number, count in enumerate((90, 40, 25)):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(count, 1000 * number)))
        paths.append(str(path))

    def run(weights=(None,) * 3, by="tokens", repeat=(1, 1, 1), **settings):
        config = [
            SourceConfig(path, name=f"s{number}", weight=weight, repeat=times)
            for number, (path, weight, times) in enumerate(zip(paths, weights, repeat, strict=True))
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "SHARD_BYTES", 300)
            return prepare_data(
                sources=config, weight_by=by, batch_size=4, max_length=32, shuffle_mb=0.001, valid_rows=10, **settings
            )

    return run


@pytest.fixture(scope="module", params=[*RULES])
def run_of(request, three):
    """A run under each rule by which batches are formed: prepared data, length, all batches."""
    prepared = three(**RULES[request.param])
    run = prepared.run(EPOCHS, None)
    return prepared, run, list(prepared.batches(run))


def origins(batches) -> list[tuple[int, int, int]]:
    return [tuple(origin) for batch in batches for origin in batch.origins[:, 1:].tolist()]


def test_a_run_is_as_long_as_was_said(run_of):
    prepared, run, batches = run_of
    assert len(batches) == run.steps
    assert sum(len(batch.origins) for batch in batches) == run.rows == EPOCHS * prepared.rows
    assert [batch.cursor["step"] for batch in batches] == list(range(1, run.steps + 1))


def test_progress_grows_with_the_batches_to_the_epochs_asked_for(run_of):
    _, _, batches = run_of
    epochs = [batch.cursor["epoch"] for batch in batches]
    assert epochs == sorted(epochs) and epochs[-1] == pytest.approx(EPOCHS)
    for number, epoch in enumerate(epochs, start=1):  # batches of a chunk come in any order, its progress doesn't
        assert epoch == pytest.approx(EPOCHS * number / len(epochs), abs=0.35)


def test_an_epoch_holds_every_training_row_once(run_of):
    prepared, _, batches = run_of
    seen = origins(batches)
    assert len(set(seen)) == prepared.rows == 155 - 10
    assert {seen.count(origin) for origin in seen} == {EPOCHS}


def test_origins_name_the_rows_that_are_trained_on(three, tokenizer):
    prepared = three()
    batch = next(prepared.batches(Run(1, None)))
    for origin, ids in zip(batch.origins[:, 1:].tolist(), batch.arrays["input_ids"], strict=True):
        name, _, line = prepared.where(*origin).partition(", line ")
        number = 1000 * origin[0] + int(line) - 1
        assert name.endswith(f"{origin[0]}.jsonl")
        assert tokenizer.decode(ids, skip_special_tokens=True) == f"{number}" + "0" * (number % 7) + f"{number}"


@settings(max_examples=20)
@given(data=st.data())
def test_from_any_cursor_on_the_rest_is_the_same(run_of, data):
    prepared, run, batches = run_of
    step = data.draw(st.integers(0, run.steps))
    cursor = json.loads(json.dumps(batches[step - 1].cursor)) if step else None
    rest = list(prepared.batches(run, cursor))
    assert [batch.cursor for batch in rest] == [batch.cursor for batch in batches[step:]]
    for one, other in zip(rest, batches[step:], strict=True):
        assert one.arrays.keys() == other.arrays.keys()
        assert all(np.array_equal(one.arrays[name], other.arrays[name]) for name in one.arrays)
        assert (one.tokens, one.origins.tolist()) == (other.tokens, other.origins.tolist())


def test_cursors_count_what_was_given(run_of):
    _, _, batches = run_of
    for step in (1, len(batches) // 2, len(batches)):
        seen = np.array(origins(batches[:step]))
        given = batches[step - 1].cursor["given"]
        assert [given[name][0] for name in ("s0", "s1", "s2")] == np.bincount(seen[:, 0], minlength=3).tolist()
        assert sum(tokens for _, tokens in given.values()) == sum(batch.tokens for batch in batches[:step])
    assert batches[-1].cursor["epoch"] == EPOCHS


def test_origins_tell_the_row_of_the_batch_that_each_sample_lies_in(run_of):
    prepared, _, batches = run_of
    for batch in batches:
        rows = batch.origins[:, 0]
        assert np.unique(rows).tolist() == list(range(batch.total))
        if prepared.batching.rule == "packed":
            assert np.bincount(rows).tolist() == batch.arrays["segment_ids"].max(axis=1).tolist()


def test_a_run_told_by_steps_goes_on_as_long_as_it_takes(three):
    prepared = three()
    told = list(prepared.batches(prepared.run(1.0, 100)))
    assert len(told) == 100
    assert {len(batch.origins) for batch in told} == {4}
    by_epochs = list(prepared.batches(prepared.run(2.0, None)))
    assert [batch.origins.tolist() for batch in by_epochs[:-1]] == [
        batch.origins.tolist() for batch in told[: len(by_epochs) - 1]
    ]


def test_nothing_is_read_for_a_run_that_is_over(three):
    prepared = three()
    run = prepared.run(1.0, None)
    *_, last = prepared.batches(run)
    assert list(prepared.batches(run, last.cursor)) == []


@pytest.mark.parametrize("by", ["rows", "tokens"])
def test_weights_share_out_an_epoch_that_ends_with_the_first_source(three, by):
    prepared = three(weights=(0.5, 0.3, 0.2), by=by)
    *_, last = prepared.batches(prepared.run(1.0, None))
    given = np.array([last.cursor["given"][name][by == "tokens"] for name in ("s0", "s1", "s2")])
    assert given / given.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    in_a_pass = [sum(map(len, shards)) for shards in prepared.lengths]
    passes = [rows / most for (rows, _), most in zip(last.cursor["given"].values(), in_a_pass, strict=True)]
    assert max(passes) == 1.0
    assert last.cursor["epoch"] == pytest.approx(1.0)


def test_repeats_give_a_source_more_often(three):
    prepared = three(repeat=(1, 2, 3))
    seen = origins(prepared.batches(prepared.run(1.0, None)))
    for source, times in enumerate((1, 2, 3)):
        assert {seen.count(origin) for origin in seen if origin[0] == source} == {times}


def test_the_mixture_of_real_data_keeps_its_shares(real_data, prepare_data):
    names = ("instruct/alpaca_en_demo.json", "instruct/multiturn_demo.jsonl", "gsm8k/test.jsonl")
    weights = (0.5, 0.3, 0.2)
    config = [SourceConfig(str(real_data / name), weight=weight) for name, weight in zip(names, weights, strict=True)]
    prepared = prepare_data(sources=config, max_length=512)
    *_, last = prepared.batches(prepared.run(1.0, None))
    tokens = np.array([tokens for _, tokens in last.cursor["given"].values()])
    assert tokens / tokens.sum() == pytest.approx(weights, rel=0.01)
