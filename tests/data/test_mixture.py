"""The Ray Data pipeline gives the workers exactly the global batches that one process reads, however many they are."""

import dataclasses
import os
import time

import numpy as np
import pytest
import ray

from dllm_ray.data import sources
from dllm_ray.data.batches import pad
from dllm_ray.data.mixture import GlobalBatches, TrainStream, map_shards, token_rows
from dllm_ray.data.plan import Window
from dllm_ray.data.prepare import Prepared
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import DataError

pytestmark = pytest.mark.slow

ROWS = 120
TOTAL = 150
"""More than one pass, and no multiple of the batch size."""
BATCH = 16


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [f'{{"prompt": "{n}", "response": "{"0" * (n % 5)}{n}"}}\n' for n in range(ROWS)]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def prepare_here(path, prepare_data):
    """Prepared rows in some eight shards and four windows."""

    def run(**settings):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "SHARD_BYTES", 600)
            return prepare_data(str(path), shuffle_window=30, valid_rows=10, **settings)

    return run


@pytest.fixture(scope="module")
def stream(prepare_here) -> TrainStream:
    prepared = prepare_here()
    assert len(prepared.plan.shard_rows) > 5
    return TrainStream(prepared, BATCH, TOTAL, task_cpus=1)


def read_parts(stream: TrainStream, workers: int, step: int = 0) -> list[tuple]:
    """Each step's parts, one for each worker; all workers advance together, as in training."""
    shards = GlobalBatches().configure({"train": stream}, world_size=workers)
    return list(zip(*[shard["train"].start(step) for shard in shards], strict=True))


def expected(stream: TrainStream, step: int = 0) -> list[dict[str, np.ndarray]]:
    batches = stream.prepared.global_batches(stream.batch_size, stream.total_rows, step * stream.batch_size)
    return [pad(rows, stream.prepared.padding) for rows in batches]


def together(parts: tuple) -> dict[str, np.ndarray]:
    """The global batch that workers' parts make, without the filler at its end."""
    return {name: np.concatenate([part.arrays[name] for part in parts])[: parts[0].total] for name in parts[0].arrays}


def assert_equal(found: list[dict[str, np.ndarray]], wanted: list[dict[str, np.ndarray]]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("start", [0, 33])
def test_token_rows_are_the_rows_of_the_plan_from_anywhere(stream, start):
    (wanted,) = stream.prepared.global_batches(TOTAL, TOTAL, start)
    # sorted here: setting preserve_order would hold for all later tests of this process
    rows = sorted(token_rows(stream, start).take_all(), key=lambda row: row["position"])
    assert [row["position"] for row in rows] == list(range(start, TOTAL))
    assert np.concatenate([row["ids"] for row in rows]).tolist() == wanted.ids.tolist()
    assert np.concatenate([row["labels"] for row in rows]).tolist() == wanted.labels.tolist()


@pytest.mark.parametrize(("workers", "step"), [(1, 0), (2, 0), (3, 0), (2, 5)])
def test_the_workers_parts_are_the_global_batches_in_order(stream, workers, step):
    steps = read_parts(stream, workers, step)
    assert_equal([together(parts) for parts in steps], expected(stream, step))
    assert len(steps) == 10 - step


def test_a_slow_data_task_does_not_change_the_order(stream):
    class SlowAtFirst(Prepared):
        def read(self, window: Window) -> TokenRows:
            time.sleep(1.0 if window.number == 0 else 0.0)
            return Prepared.read(self, window)

    slow = dataclasses.replace(stream, prepared=SlowAtFirst(**vars(stream.prepared)))
    assert_equal([together(parts) for parts in read_parts(slow, workers=1)], expected(stream))


class TestParts:
    """A whole batch of 16 rows and a last one of 6, dealt to 3 workers."""

    @pytest.fixture(scope="class")
    def steps(self, stream):
        return read_parts(stream, workers=3, step=8)

    def test_they_say_where_they_are_in_a_global_batch_of_which_size(self, steps):
        assert [[(part.start, part.total) for part in parts] for parts in steps] == [
            [(0, 16), (6, 16), (12, 16)],
            [(0, 6), (2, 6), (4, 6)],
        ]

    def test_they_count_the_tokens_of_the_global_batch_without_padding(self, stream, steps):
        batches = stream.prepared.global_batches(BATCH, TOTAL, 8 * BATCH)
        assert [{part.tokens for part in parts} for parts in steps] == [{int(rows.lengths.sum())} for rows in batches]

    def test_they_are_equal_and_filler_has_no_labels(self, steps):
        assert [len(part.arrays["labels"]) for part in steps[0]] == [6, 6, 6]
        assert (steps[0][2].arrays["labels"][4:] == -100).all()

    def test_they_may_be_written_to(self, steps):
        assert all(array.flags.writeable for array in steps[0][0].arrays.values())


def test_padding_that_is_ignored_comes_with_its_mask(prepare_here):
    stream = TrainStream(prepare_here(padding="ignore"), BATCH, 2 * BATCH, task_cpus=1)
    found = [together(parts) for parts in read_parts(stream, workers=2)]
    assert found[0].keys() == {"input_ids", "labels", "attention_mask"}
    assert_equal(found, expected(stream))


def test_a_run_that_is_over_has_no_batches(stream):
    assert read_parts(stream, workers=2, step=10) == []


def test_a_survey_by_ray_finds_what_one_in_this_process_finds(prepare_here, stream):
    prepared = prepare_here(mapper=map_shards)
    assert prepared.account == stream.prepared.account
    assert prepared.plan == stream.prepared.plan
    assert prepared.valid.ids.tolist() == stream.prepared.valid.ids.tolist()


def test_map_shards_keeps_the_order_and_runs_elsewhere():
    def slow_at_first(number: int) -> tuple[int, int]:
        time.sleep(1.0 if number == 0 else 0.0)
        return number * number, os.getpid()

    results = map_shards(slow_at_first, range(20))
    assert [square for square, _ in results] == [number * number for number in range(20)]
    assert os.getpid() not in {pid for _, pid in results}


def test_a_user_error_in_a_task_is_raised_here_as_itself():
    def read(number):
        if number == 1:
            raise DataError(f"line {number} is broken")
        return number

    with pytest.raises(DataError, match=r"^line 1 is broken$"):
        map_shards(read, range(3))


def test_any_other_error_in_a_task_ends_the_survey_too():
    with pytest.raises(Exception, match="ZeroDivisionError"):
        map_shards(lambda number: 1 // number, [1, 0])


def test_a_file_that_breaks_after_the_survey_is_an_error_at_every_worker(prepare_here, path):
    content = path.read_text()
    stream = TrainStream(prepare_here(), BATCH, TOTAL, task_cpus=1)
    path.write_text(content.replace('{"prompt": "60"', '{"prompt" = "60"'))
    try:
        shards = GlobalBatches().configure({"train": stream}, world_size=2)
        for shard in shards:
            with pytest.raises(Exception, match=r"rows\.jsonl, line 61: not valid JSON"):
                list(shard["train"].start(0))
    finally:
        path.write_text(content)
