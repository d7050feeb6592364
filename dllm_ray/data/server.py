"""The actor that forms a run's global batches, and the tasks that read and tokenize rows ahead of it.

`BatchServer` runs the run's stream (`stream`) and hands every worker its rows of each batch. What the stream will want
next is known from the plans of the sources: `_ReadAhead` has it read by Ray tasks, as far ahead as memory allows.
(A Ray Data pipeline would be needed for each source and each pass, with a start and buffers of its own, and can't begin
in the middle of one.) Imports little: every process that runs a task imports this module.
"""

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from dllm_ray.data import stream as streams
from dllm_ray.data.batches import PaddingRule, deal
from dllm_ray.data.batching import Batching
from dllm_ray.data.compact import from_arrays, to_arrays
from dllm_ray.data.feed import Feed
from dllm_ray.data.plan import Window
from dllm_ray.data.sources import SHARD_BYTES
from dllm_ray.data.tokenize import Account, TokenRows
from dllm_ray.errors import DllmRayError

AHEAD = 4
"""Global batches kept ready, beside the server and again in each worker."""
_AHEAD_BYTES = 96 << 20  # tokenized rows read ahead, in Ray's object store, over all sources
_AHEAD_WINDOWS = 4  # of one source


@dataclass(frozen=True)
class TrainStream:
    """The data of a run, as a description that Train hands to `GlobalBatches`."""

    feed: Feed
    """Where rows come from."""
    batching: Batching
    """How they become global batches."""
    padding: PaddingRule
    """How a batch is filled up."""
    run: streams.Run
    """How long the run is."""
    task_cpus: float
    """CPUs that a data task reserves."""
    pairs: Callable[[Mapping[str, np.ndarray], int], dict[str, np.ndarray]] | None = None
    """What the objective adds to a batch, from its arrays and its number; None: nothing."""


@dataclass(frozen=True)
class WorkerBatch:
    """One worker's part of a global batch."""

    arrays: dict[str, np.ndarray]
    """As `batches.pad` or `batches.pack` gives them, [b, T] int64."""
    start: int
    """Which row of the global batch the first row is."""
    total: int
    """Rows of the global batch; rows beyond it are filler without labels."""
    tokens: int
    """Tokens of the global batch without padding."""
    cursor: streams.Cursor
    """Where the stream stands after the batch; given back to `WorkerBatches.start`, it goes on with the next one."""
    origins: np.ndarray
    """[samples of the global batch, 4]: its row in it, source, shard and raw row (`Prepared.where` names these)."""


class BatchServer:
    """The actor that forms global batches. Calls of different workers run in threads of their own."""

    def __init__(self, stream: TrainStream, world_size: int):
        self._stream = stream
        self._world_size = world_size
        self._changed = threading.Condition()
        self._ready: dict[int, dict[int, WorkerBatch]] = {}  # steps before it -> rank -> part not yet fetched
        self._producer: threading.Thread | None = None
        self._reader: _ReadAhead | None = None
        self._ended = False
        self._error: BaseException | None = None

    def open(self, cursor: streams.Cursor | None) -> None:
        """Begins to produce after `cursor`; the first caller starts, the others find it started."""
        with self._changed:
            if self._producer is None:
                self._producer = threading.Thread(target=self._produce, args=(cursor,), daemon=True)
                self._producer.start()

    def get(self, rank: int, step: int) -> list[WorkerBatch] | DllmRayError:
        """The parts of `rank` in the batches that are ready, from `step` on; none after the last step."""
        with self._changed:
            self._changed.wait_for(lambda: step in self._ready or self._ended)
            if step not in self._ready and self._error is not None:
                if isinstance(self._error, DllmRayError):
                    return self._error  # raised, it would reach the worker as an error of Ray's
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

    def accounts(self) -> dict[str, Account]:
        """What became of the rows read so far in the first pass over each source."""
        return {} if self._reader is None else dict(self._reader.accounts)

    def _produce(self, cursor: streams.Cursor | None) -> None:
        feed, run = self._stream.feed, self._stream.run
        try:
            self._reader = _ReadAhead(feed, run, cursor, self._stream.task_cpus)
            for batch in streams.batches(
                feed, self._stream.batching, self._stream.padding, run, cursor, self._reader.read
            ):
                if self._stream.pairs is not None:
                    arrays = self._stream.pairs(batch.arrays, batch.cursor["step"])
                    batch = dataclasses.replace(batch, arrays=arrays)
                parts = self._deal(batch)
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < AHEAD)
                    self._ready[batch.cursor["step"] - 1] = parts
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _deal(self, batch: streams.GlobalBatch) -> dict[int, WorkerBatch]:
        parts = deal(batch.arrays, self._world_size)
        each = len(parts[0]["input_ids"])
        return {
            rank: WorkerBatch(arrays, rank * each, batch.total, batch.tokens, batch.cursor, batch.origins)
            for rank, arrays in enumerate(parts)
        }


class _ReadAhead:
    """Has the windows of the sources read by Ray tasks, in the order in which they will be wanted.

    Args:
        feed: the sources.
        run: how long the run is.
        cursor: where it begins.
        task_cpus: CPUs that a task reserves.
    """

    def __init__(self, feed: Feed, run: streams.Run, cursor: streams.Cursor | None, task_cpus: float):
        self.accounts: dict[str, Account] = {}
        """Source -> what became of its rows so far in the first pass."""
        self._feed, self._run = feed, run
        # in a list Ray leaves it as it is: a reference
        self._shared = [ray.put(dataclasses.replace(feed, kept={}))]
        self._task = ray.remote(_read_shards).options(num_cpus=task_cpus, max_retries=-1)
        plans = feed.plans
        places = [place[:2] for place in cursor["sources"]] if cursor else [[0, 0]] * len(plans)
        self._windows = [plan.windows(*place) for plan, place in zip(plans, places, strict=True)]
        self._next = [next(windows) for windows in self._windows]
        self._under_way: list[deque[tuple[Window, list, int]]] = [deque() for _ in plans]
        self._bytes = 0
        self._ahead()

    def read(self, source: int, window: Window) -> TokenRows:
        """The training rows of a window. The windows of each source are read in the order of its plan.

        Raises:
            DataError: a file is broken.
        """
        if not self._under_way[source]:
            self._launch(source)
        expected, tasks, size = self._under_way[source].popleft()
        if expected != window:
            raise RuntimeError(f"windows are read out of order: {window} in place of {expected}")
        self._ahead()
        rows = self._fetch(source, window, tasks)
        self._bytes -= size
        self._ahead()
        return rows

    def _fetch(self, source: int, window: Window, tasks: list) -> TokenRows:
        """The rows, copied: their part of the object store is free again."""
        if tasks:
            found = map(_arrived, tasks)
        else:
            found = (self._feed.read_shard(source, shard) for shard in window.shards)
        parts = []
        for rows, account in found:
            parts.append(rows)
            name = self._feed.names[source]
            if window.epoch == 0:
                self.accounts[name] = self.accounts[name] + account if name in self.accounts else account
        return TokenRows.join(parts)

    def _ahead(self) -> None:
        """Launches what is wanted soonest, while there is room."""
        while self._bytes < _AHEAD_BYTES:
            wanted = [
                (self._due(source), source)
                for source in range(len(self._next))
                if len(self._under_way[source]) < _AHEAD_WINDOWS and self._due(source) < self._run.until
            ]
            if not wanted:
                return
            self._launch(min(wanted)[1])

    def _due(self, source: int) -> float:
        """Virtual time at which the next window of a source will be wanted, roughly."""
        window = self._next[source]
        return (window.epoch + window.begin) * self._feed.pass_times[source]

    def _launch(self, source: int) -> None:
        window, self._next[source] = self._next[source], next(self._windows[source])
        tasks, size = [], 0
        if not all((source, shard) in self._feed.kept for shard in window.shards):
            sizes = self._feed.plans[source].shard_bytes
            tasks = [self._task.remote(self._shared, source, shards) for shards in _groups(window.shards, sizes)]
            size = int(sum(sizes[shard] for shard in window.shards) * self._feed.inflation[source])
        self._under_way[source].append((window, tasks, size))
        self._bytes += size


def _read_shards(shared: list, source: int, shards: Sequence[int]) -> tuple[dict, Account] | DllmRayError:
    """Runs as a Ray task: the training rows of shards, and what became of all of theirs."""
    feed: Feed = unpickled(shared[0])
    try:
        found = [feed.read_shard(source, shard) for shard in shards]
    except DllmRayError as error:
        return error
    accounts = [account for _, account in found]
    return to_arrays(TokenRows.join([rows for rows, _ in found])), sum(accounts[1:], accounts[0])


def _arrived(task: ray.ObjectRef) -> tuple[TokenRows, Account]:
    """The result of `_read_shards`, waited for."""
    found = ray.get(task)
    if isinstance(found, DllmRayError):
        raise found
    arrays, account = found
    return from_arrays(arrays), account


def _groups(shards: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Consecutive shards, so that a task has some megabytes to read."""
    groups: list[list[int]] = []
    room = 0
    for shard in shards:
        if room < sizes[shard]:
            groups.append([])
            room = SHARD_BYTES
        groups[-1].append(shard)
        room -= sizes[shard]
    return groups


_UNPICKLED: dict[str, Any] = {}


def unpickled(reference: ray.ObjectRef) -> Any:
    """What a reference stands for, unpickled once in each process: a tokenizer takes its time."""
    key = reference.hex()
    if key not in _UNPICKLED:
        _UNPICKLED.clear()
        _UNPICKLED[key] = ray.get(reference)
    return _UNPICKLED[key]
