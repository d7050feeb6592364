"""One pool of workers for several callers at a time, each in a thread of its own."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

from dllm_ray.workers import Call, ModelPool

_EVERY_S = 0.02  # how often new callers are looked for while workers are busy


class SharedPool:
    """Hands the work of several callers to a pool's workers. Whoever came first is served first; workers that he leaves
    idle go to the next.

    Args:
        pool: the workers. Nobody else may use them until `close`.
    """

    def __init__(self, pool: ModelPool):
        self.workers = pool.workers
        """How many there are."""
        self._pool = pool
        self._callers: list[_Caller] = []
        self._lock = threading.Lock()
        self._wanted = threading.Event()  # there is a caller, or no more will come
        self._closed = False
        self._broken: Exception | None = None
        self._thread = threading.Thread(target=self._serve, name="shared pool", daemon=True)
        self._thread.start()

    def run(self, function: Callable[..., Any], work: Sequence[tuple]) -> Iterator[tuple[int, Any, float]]:
        """As `ModelPool.run`. Work that a caller hasn't taken when he stops taking is dropped."""
        caller = _Caller(function, work)
        with self._lock:
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._callers.append(caller)
            if self._broken is not None:
                caller.finished.put(self._broken)
            self._wanted.set()
        try:
            for _ in work:
                outcome = caller.finished.get()
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            with self._lock:
                self._callers.remove(caller)

    def close(self) -> None:
        """Ends the sharing; the pool is the caller's again. Callers that still wait get an error."""
        with self._lock:
            self._closed = True
            self._wanted.set()
        self._thread.join()

    def _serve(self) -> None:
        error: Exception = RuntimeError("the pool was closed")
        try:
            while not self._closed:
                self._wanted.wait()
                for call, outcome in self._pool.serve(self._take, self._more, _EVERY_S):
                    caller, index = call.name
                    caller.finished.put(outcome if isinstance(outcome, Exception) else (index, *outcome))
        except Exception as broken:
            error = self._broken = broken
        with self._lock:
            for caller in self._callers:
                caller.finished.put(error)

    def _take(self) -> Call | None:
        with self._lock:
            if self._closed:
                return None
            for caller in self._callers:
                if caller.todo:
                    return caller.todo.popleft()
        return None

    def _more(self) -> bool:
        """Whether to go on looking for work; else the thread sleeps until there is a caller."""
        with self._lock:
            if not self._callers and not self._closed:
                self._wanted.clear()
            return bool(self._callers) and not self._closed


class _Caller:
    """Somebody's work, and what of it is finished."""

    def __init__(self, function: Callable[..., Any], work: Sequence[tuple]):
        self.todo = deque(Call((self, index), function, arguments) for index, arguments in enumerate(work))
        self.finished: SimpleQueue[tuple[int, Any, float] | Exception] = SimpleQueue()
