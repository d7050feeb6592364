"""The server gives the workers exactly the global batches that one process reads, however many they are."""

import dataclasses
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from dllm_ray.data import prepare, sources
from dllm_ray.data.config import SourceConfig
from dllm_ray.data.feed import Feed
from dllm_ray.data.mixture import GlobalBatches, TrainStream, map_shards
from dllm_ray.data.prepare import Prepared
from dllm_ray.data.stream import Run
from dllm_ray.errors import DataError

pytestmark = pytest.mark.slow

ROWS = (120, 60)
EPOCHS = 2
BATCH = 16


@pytest.fixture(scope="module", autouse=True)
def ray_here():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for number, rows in enumerate(ROWS):
        lines = [f'{{"prompt": "{n}", "response": "{"0" * (n % 5)}{n}"}}\n' for n in range(rows)]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return [str(folder / f"{number}.jsonl") for number in range(len(ROWS))]


@pytest.fixture(scope="module")
def prepare_here(paths, prepare_data):
    """Two sources in a dozen shards, too large to be kept in memory."""

    def run(**settings) -> Prepared:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sources, "SHARD_BYTES", 600)
            patch.setattr(prepare, "LOCAL_BYTES", 0)
            return prepare_data(
                sources=[SourceConfig(path) for path in paths], shuffle_mb=0.001, valid_rows=10, **settings
            )

    return run


@pytest.fixture(scope="module")
def prepared(prepare_here) -> Prepared:
    return prepare_here()


def stream_of(prepared: Prepared, run: Run | None = None) -> TrainStream:
    run = run or prepared.run(EPOCHS, None)
    return TrainStream(prepared.feed, prepared.batching, prepared.padding, run, task_cpus=1)


def read_parts(stream: TrainStream, workers: int, cursor=None) -> list[tuple]:
    """Each step's parts, one for each worker; all workers advance together, as in training."""
    shards = GlobalBatches().configure({"train": stream}, world_size=workers)
    step = cursor["step"] if cursor else 0
    return list(zip(*[shard["train"].start(step, cursor) for shard in shards], strict=True))


def together(parts: tuple) -> dict[str, np.ndarray]:
    """The global batch that workers' parts make, without the filler at its end."""
    return {name: np.concatenate([part.arrays[name] for part in parts])[: parts[0].total] for name in parts[0].arrays}


def assert_equal(steps: list[tuple], wanted: list) -> None:
    assert len(steps) == len(wanted)
    for parts, batch in zip(steps, wanted, strict=True):
        found = together(parts)
        assert found.keys() == batch.arrays.keys()
        assert all(np.array_equal(found[name], array) for name, array in batch.arrays.items())
        for part in parts:
            assert (part.total, part.tokens, part.cursor) == (batch.total, batch.tokens, batch.cursor)
            assert np.array_equal(part.origins, batch.origins)


@pytest.fixture(scope="module")
def three_workers(prepared):
    return read_parts(stream_of(prepared), workers=3)


def test_the_workers_parts_are_the_global_batches_in_order(prepared, three_workers):
    assert_equal(three_workers, list(prepared.batches(prepared.run(EPOCHS, None))))


def test_a_run_goes_on_from_a_checkpoint_on_another_number_of_workers(prepare_here):
    prepared = prepare_here(packing=True, batch_size=4)
    run = prepared.run(EPOCHS, None)
    batches = list(prepared.batches(run))
    stop = run.steps // 2 + 1
    cursor = json.loads(json.dumps(batches[stop - 1].cursor))
    assert_equal(read_parts(stream_of(prepared), 2, cursor), batches[stop:])


def test_data_that_is_met_as_training_goes_along_is_accounted_for(prepare_here):
    prepared = prepare_here(max_steps=15)
    run = prepared.run(1.0, 15)
    shards = GlobalBatches().configure({"train": stream_of(prepared, run)}, world_size=1)
    found = list(shards[0]["train"].start())
    assert_equal([(part,) for part in found], list(prepared.batches(run)))
    accounts = shards[0]["train"].accounts()
    assert {name.rpartition("/")[2]: account.read for name, account in accounts.items()} == {
        "0.jsonl": ROWS[0],
        "1.jsonl": ROWS[1],
    }


def test_a_slow_data_task_does_not_change_the_order(prepared):
    class SlowAtFirst(Feed):
        def read_shard(self, source, shard):
            time.sleep(1.0 if (source, shard) == (1, 0) else 0.0)
            return super().read_shard(source, shard)

    slow = dataclasses.replace(prepared, feed=SlowAtFirst(**vars(prepared.feed)))
    run = prepared.run(1, None)
    assert_equal(read_parts(stream_of(slow, run), workers=1), list(prepared.batches(run)))


class TestParts:
    """Batches of 16 rows, and a last one of 4, dealt to 3 workers."""

    def test_they_say_where_they_are_in_a_global_batch_of_which_size(self, three_workers):
        assert [[(part.start, part.total) for part in parts] for parts in three_workers[-2:]] == [
            [(0, 16), (6, 16), (12, 16)],
            [(0, 4), (2, 4), (4, 4)],
        ]

    def test_they_are_equal_and_filler_has_no_labels(self, three_workers):
        assert [len(part.arrays["labels"]) for part in three_workers[0]] == [6, 6, 6]
        assert (three_workers[0][2].arrays["labels"][4:] == -100).all()

    def test_they_may_be_written_to(self, three_workers):
        assert all(array.flags.writeable for array in three_workers[0][0].arrays.values())


def test_small_data_is_served_from_memory(prepare_data, paths):
    prepared = prepare_data(paths, valid_rows=10)
    assert len(prepared.feed.kept) == 2
    run = prepared.run(EPOCHS, None)
    shards = GlobalBatches().configure({"train": stream_of(prepared)}, world_size=1)
    found = list(shards[0]["train"].start())
    assert_equal([(part,) for part in found], list(prepared.batches(run)))
    assert shards[0]["train"].accounts() == prepared.accounts


def test_a_step_without_its_cursor_is_refused(prepared):
    (shard,) = GlobalBatches().configure({"train": stream_of(prepared)}, world_size=1)
    with pytest.raises(ValueError, match="step 3 begins at a cursor of its own"):
        next(shard["train"].start(3))


def test_a_survey_by_ray_finds_what_one_in_this_process_finds(prepare_here, prepared):
    other = prepare_here(mapper=map_shards)
    assert other.accounts == prepared.accounts
    assert other.fingerprint == prepared.fingerprint
    assert other.valid.ids.tolist() == prepared.valid.ids.tolist()
    run = prepared.run(EPOCHS, None)
    assert other.run(EPOCHS, None) == run


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


def test_a_file_that_is_broken_further_on_is_a_user_error_at_every_worker(prepare_here, paths):
    prepared = prepare_here(max_steps=15)
    path = Path(paths[0])
    content = path.read_text()
    path.write_text(content.replace('{"prompt": "60"', '{"prompt" = "60"'))
    try:
        shards = GlobalBatches().configure({"train": stream_of(prepared, Run(15, None))}, world_size=2)
        for shard in shards:
            with pytest.raises(DataError, match=r"0\.jsonl, line 61: not valid JSON") as caught:
                list(shard["train"].start())
            assert type(caught.value) is DataError
    finally:
        path.write_text(content)
