"""A pool of workers without Ray."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import Any

from dllm_ray.errors import ResourceError
from dllm_ray.workers import Call


class Death(Exception):
    """Ends the workers."""


class LocalPool:
    """Stands in for a `ModelPool`: its workers are threads of this process, each with a model of its own, and a call
    takes a second, they say."""

    def __init__(self, lms: Sequence[Any]):
        self.workers = len(lms)
        self._idle = SimpleQueue()
        for lm in lms:
            self._idle.put(lm)

    def serve(
        self, take: Callable[[], Call | None], more: Callable[[], bool] = lambda: False, every_s: float | None = None
    ) -> Iterator[tuple[Call, tuple[Any, float] | Exception]]:
        """As `ModelPool.serve`."""
        following: list[Call] = []
        under_way: dict[Future, Call] = {}
        with ThreadPoolExecutor(self.workers) as threads:
            while True:
                while following or (call := take()) is not None:
                    if not following:
                        following.append(call)
                    if len(under_way) == self.workers:
                        break
                    call = following.pop()
                    under_way[threads.submit(self._call, call)] = call
                if not under_way and not following and not more():
                    return
                if not under_way:
                    time.sleep(every_s or 0)
                    continue
                done, _ = wait(under_way, timeout=every_s, return_when=FIRST_COMPLETED)
                for future in done:
                    call, error = under_way.pop(future), future.exception()
                    if isinstance(error, Death):
                        raise ResourceError("workers keep dying")
                    yield call, error or (future.result(), 1.0)

    def run(self, function: Callable[..., Any], work: list[tuple]) -> Iterator[tuple[int, Any, float]]:
        """As `ModelPool.run`, for one caller."""
        calls = iter([Call(index, function, arguments) for index, arguments in enumerate(work)])
        for call, outcome in self.serve(lambda: next(calls, None)):
            if isinstance(outcome, Exception):
                raise outcome
            yield call.name, *outcome

    def close(self) -> None:
        """There is nothing to end."""

    def _call(self, call: Call) -> Any:
        lm = self._idle.get()
        try:
            return call.function(lm, *call.arguments)
        finally:
            self._idle.put(lm)
