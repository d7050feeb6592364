"""Training data on Ray: the survey's tasks, and each Train worker's part of every global batch.

Ray Data's own split deals whole blocks to workers, so what is in a global batch would depend on their number, and its
iterators can't begin in the middle. Here one small actor beside the workers, `server.BatchServer`, forms the global
batches and hands every worker its rows of each. `GlobalBatches` plugs that into `ray.train.get_dataset_shard`.
"""

import dataclasses
import logging
import pickle
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ray
import ray.train

from dllm_ray.data.server import AHEAD, BatchServer, TrainStream, WorkerBatch, unpickled
from dllm_ray.data.stream import Cursor
from dllm_ray.data.tokenize import Account
from dllm_ray.errors import DllmRayError

__all__ = ["GlobalBatches", "TrainStream", "WorkerBatch", "WorkerBatches", "map_shards"]


def map_shards(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`[function(item) for item in items]`, by Ray Data tasks. Errors of `dllm_ray.errors` are raised as themselves."""
    import ray.data  # takes a second, which workers need not wait for

    _quiet()
    shared = ray.put(function)

    def call(row: dict[str, bytes]) -> dict[str, bytes]:
        try:
            result = unpickled(shared)(pickle.loads(row["item"]))
        except DllmRayError as error:
            result = error  # Ray Data would log it and raise an error of its own in its place
        return {"result": pickle.dumps(result)}

    rows = [{"number": number, "item": pickle.dumps(item)} for number, item in enumerate(items)]
    if not rows:
        return []
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
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
            name: ray.remote(BatchServer).options(num_cpus=0, max_concurrency=world_size + 2).remote(stream, world_size)
            for name, stream in datasets.items()
        }
        return [{name: WorkerBatches(server, rank) for name, server in servers.items()} for rank in range(world_size)]


class WorkerBatches:
    """A worker's side: a thread fetches the worker's parts of the next global batches while it trains."""

    def __init__(self, server, rank: int):
        self._server = server
        self._rank = rank

    def start(self, step: int = 0, cursor: Cursor | None = None) -> Iterator[WorkerBatch]:
        """The batches of steps `step`, `step + 1`, ... to the end of the run.

        Args:
            step: how many batches came before. Every worker names the same.
            cursor: of the last of them.

        Raises:
            DllmRayError: a source turned out to be broken.
        """
        if step != (cursor["step"] if cursor else 0):
            raise ValueError(f"step {step} begins at a cursor of its own, got {cursor}")
        ray.get(self._server.open.remote(cursor))
        fetched: queue.Queue[WorkerBatch | BaseException | None] = queue.Queue(maxsize=AHEAD)
        stopped = threading.Event()
        threading.Thread(target=self._fetch, args=(step, fetched, stopped), daemon=True).start()
        try:
            while (batch := fetched.get()) is not None:
                if isinstance(batch, BaseException):
                    raise batch
                yield batch
        finally:
            stopped.set()

    def accounts(self) -> dict[str, Account]:
        """Source -> what became of the rows read so far in its first pass, by the server that now runs."""
        return ray.get(self._server.accounts.remote())

    def _fetch(self, step: int, fetched: queue.Queue, stopped: threading.Event) -> None:
        try:
            while not stopped.is_set():
                batches = ray.get(self._server.get.remote(self._rank, step))
                if isinstance(batches, BaseException):
                    raise batches
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


def _quiet() -> None:
    """No progress bars or console logs of Ray Data: the job draws its own progress."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
