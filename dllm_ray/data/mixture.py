"""The Ray Data pipeline: data tasks read and tokenize rows ahead of training, and each Train worker gets its part of
padded global batches.

Ray Data's own split deals whole blocks to workers, so what is in a global batch would depend on their number, and its
iterators can't begin in the middle. Here one small actor beside the workers turns the ordered stream into global
batches and hands every worker its rows of each. `GlobalBatches` plugs that into `ray.train.get_dataset_shard`.
"""

import dataclasses
import logging
import pickle
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import ray.train

from dllm_ray.data.batches import deal, pad
from dllm_ray.data.prepare import Prepared
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import DllmRayError

_AHEAD = 4  # global batches kept ready, beside the batcher and again in each worker


@dataclass(frozen=True)
class TrainStream:
    """The rows of a run, as a description that Train hands to `GlobalBatches`."""

    prepared: Prepared
    batch_size: int
    """Rows in a global batch."""
    total_rows: int
    """Rows in the whole run; the last batch may be smaller."""
    task_cpus: float
    """CPUs that a data task reserves."""


@dataclass(frozen=True)
class WorkerBatch:
    """One worker's part of a global batch."""

    arrays: dict[str, np.ndarray]
    """`input_ids`, `labels` and perhaps `attention_mask`, [b, T] int64."""
    start: int
    """Which row of the global batch the first row is."""
    total: int
    """Rows of the global batch; rows beyond it are filler without labels."""
    tokens: int
    """Tokens of the global batch without padding."""


def token_rows(stream: TrainStream, start: int) -> ray.data.Dataset:
    """The run's token rows from row `start` on, in order: `position`, `ids`, `labels`. Lazy."""
    prepared = stream.prepared
    windows = list(prepared.plan.windows(start, stream.total_rows))
    sizes = [prepared.plan.size(window) for window in windows]
    firsts = start + np.cumsum([0, *sizes[:-1]])
    items = [{"window": number, "first": int(first)} for number, first in enumerate(firsts)]
    shared = ray.put(prepared)

    def load(batch: dict[str, np.ndarray]) -> pa.Table:
        rows = ray.get(shared).read(windows[int(batch["window"][0])])
        first = int(batch["first"][0])
        rows_left = stream.total_rows - first
        return _to_table(rows if len(rows) <= rows_left else rows.take(np.arange(rows_left)), first)

    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    return dataset.map_batches(load, batch_size=1, num_cpus=stream.task_cpus)


def map_shards(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`[function(item) for item in items]`, by Ray Data tasks. Errors of `dllm_ray.errors` are raised as themselves."""
    _quiet()
    shared = ray.put(function)

    def call(row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            result = ray.get(shared)(pickle.loads(row["item"]))
        except DllmRayError as error:
            result = error  # Ray Data would log it and raise an error of its own in its place
        return {"result": pickle.dumps(result)}

    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    dataset = ray.data.from_items(rows, override_num_blocks=max(len(rows), 1))
    dataset.context.execution_options.preserve_order = True
    results = []
    for row in dataset.map(call).iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, DllmRayError):
            raise result
        results.append(result)
    return results


class GlobalBatches(ray.train.DataConfig):
    """Gives each Train worker a `WorkerBatches` for the `TrainStream` passed as a data set."""

    def configure(self, datasets: dict[str, TrainStream], world_size: int, **_ignored) -> list[dict[str, Any]]:
        servers = {
            name: ray.remote(_BatchServer)
            .options(num_cpus=0, max_concurrency=world_size + 1)
            .remote(stream, world_size)
            for name, stream in datasets.items()
        }
        return [{name: WorkerBatches(server, rank) for name, server in servers.items()} for rank in range(world_size)]


class WorkerBatches:
    """A worker's side: a thread fetches the worker's parts of the next global batches while it trains."""

    def __init__(self, server, rank: int):
        self._server = server
        self._rank = rank

    def start(self, step: int) -> Iterator[WorkerBatch]:
        """The batches of step `step`, `step + 1`, ... to the end of the run. Every worker names the same step."""
        ray.get(self._server.open.remote(step))
        fetched: queue.Queue[WorkerBatch | BaseException | None] = queue.Queue(maxsize=_AHEAD)
        stopped = threading.Event()
        threading.Thread(target=self._fetch, args=(step, fetched, stopped), daemon=True).start()
        try:
            while (batch := fetched.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stopped.set()

    def _fetch(self, step: int, fetched: queue.Queue, stopped: threading.Event) -> None:
        try:
            while not stopped.is_set():
                batches = ray.get(self._server.get.remote(self._rank, step))
                for batch in batches:
                    # what comes out of Ray's object store is read-only memory
                    arrays = {name: array.copy() for name, array in batch.arrays.items()}
                    fetched.put(dataclasses.replace(batch, arrays=arrays))
                step += len(batches)
                if not batches:
                    break
            fetched.put(None)
        except BaseException as error:
            fetched.put(error)


class _BatchServer:
    """The actor that forms global batches. Calls of different workers run in threads of their own."""

    def __init__(self, stream: TrainStream, world_size: int):
        self._stream = stream
        self._world_size = world_size
        self._changed = threading.Condition()
        self._ready: dict[int, dict[int, WorkerBatch]] = {}  # step -> rank -> part not yet fetched
        self._producer: threading.Thread | None = None
        self._ended = False
        self._error: BaseException | None = None

    def open(self, step: int) -> None:
        """Begins to produce at `step`; the first caller starts, the others find it started."""
        with self._changed:
            if self._producer is None:
                self._producer = threading.Thread(target=self._produce, args=(step,), daemon=True)
                self._producer.start()

    def get(self, rank: int, step: int) -> list[WorkerBatch]:
        """The parts of `rank` in the batches that are ready, from `step` on; none after the last step."""
        with self._changed:
            self._changed.wait_for(lambda: step in self._ready or self._ended)
            if self._error is not None:
                raise self._error
            parts = []
            while step in self._ready:
                waiting = self._ready[step]
                parts.append(waiting.pop(rank))
                if not waiting:
                    del self._ready[step]
                step += 1
            self._changed.notify_all()
            return parts

    def _produce(self, step: int) -> None:
        try:
            for number, parts in enumerate(self._global_batches(step), start=step):
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < _AHEAD)
                    self._ready[number] = dict(enumerate(parts))
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _global_batches(self, step: int) -> Iterator[Sequence[WorkerBatch]]:
        _quiet()
        stream = self._stream
        expected = step * stream.batch_size
        if expected >= stream.total_rows:
            return
        dataset = token_rows(stream, expected)
        dataset.context.execution_options.preserve_order = True
        for table in dataset.iter_batches(batch_size=stream.batch_size, batch_format="pyarrow", prefetch_batches=2):
            positions = table["position"].to_numpy()
            if not np.array_equal(positions, np.arange(expected, expected + len(positions))):
                raise RuntimeError(f"rows arrived out of order: expected {expected}..., got {positions[:4]}...")
            expected += len(positions)
            rows = _from_table(table)
            parts = deal(pad(rows, stream.prepared.padding), self._world_size)
            each = len(parts[0]["input_ids"])
            yield [
                WorkerBatch(arrays, rank * each, len(rows), int(rows.lengths.sum()))
                for rank, arrays in enumerate(parts)
            ]


def _to_table(rows: TokenRows, first: int) -> pa.Table:
    offsets = pa.array(np.concatenate([[0], np.cumsum(rows.lengths)]).astype(np.int32))
    return pa.table(
        {
            "position": pa.array(np.arange(first, first + len(rows))),
            "ids": pa.ListArray.from_arrays(offsets, pa.array(rows.ids)),
            "labels": pa.ListArray.from_arrays(offsets, pa.array(rows.labels)),
        }
    )


def _from_table(table: pa.Table) -> TokenRows:
    return TokenRows(
        ids=pc.list_flatten(table["ids"]).to_numpy(),
        labels=pc.list_flatten(table["labels"]).to_numpy(),
        lengths=pc.list_value_length(table["ids"]).to_numpy(),
    )


def _quiet() -> None:
    """No progress bars or console logs of Ray Data: the job draws its own progress."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
