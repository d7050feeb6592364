"""Continuous batching: a thread that owns an engine, whose rows join and leave between steps.

It knows rows and commits: no text, no calls, no HTTP, no Ray. A row's tokens are `Sampler`'s, whatever else runs.
"""

import dataclasses
import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch

from dllm_ray.errors import ConfigError, DllmRayError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.engine import Commit, Finished, Row
from dllm_ray.sampling.sampler import engine_for
from dllm_ray.serving.limits import Limits

logger = logging.getLogger(__name__)

_WINDOW_S = 10.0  # figures are of so many seconds
_REMEMBERED = 4096  # steps, at most
_RETRY_S = (1.0, 60.0)  # least and most that a client is told to wait
_BROKEN_AFTER = 3  # steps that fail one after the other


_TURNS: WeakKeyDictionary[torch.nn.Module, threading.Lock] = WeakKeyDictionary()


def turn_of(lm: DiffusionLM) -> threading.Lock:
    """Held while a model runs: two forwards at a time would disturb each other."""
    return _TURNS.setdefault(lm.model, threading.Lock())


class QueueFull(Exception):
    """So many calls wait that no more are taken."""

    def __init__(self, retry_after_s: float):
        super().__init__(f"the queue is full; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class Draining(Exception):
    """No more rows are taken: the loop is about to end."""


@dataclass(frozen=True)
class Dropped:
    """The end of a row that wasn't finished."""

    reason: Literal["cancelled", "deadline", "failed", "closed"]
    """failed: a step raised; closed: the loop ended."""
    so_far: Finished | None = None
    """What it had come to; None: it never began, or is lost."""
    message: str = ""
    """What failed, fit to be shown."""


RowEvent = Commit | Finished | Dropped
OnRowEvent = Callable[["Ticket", RowEvent], None]
"""Called in the loop's thread, which waits for it: commits, then one `Finished` or `Dropped`."""


class Ticket:
    """A row in the loop."""

    def __init__(self, loop: "EngineLoop", row: Row, client: str, on_event: OnRowEvent, deadline: float | None):
        self.row = row
        self.client = client
        self.deadline = deadline
        self._loop = loop
        self._on_event = on_event
        self._call: object = self  # rows that were submitted together share one

    def cancel(self) -> None:
        """Lets the row go before the next step; from any thread. One that is finished stays so."""
        self._loop._cancel(self)


@dataclass
class Figures:
    """How a loop is doing; rates are of the last ten seconds."""

    queued: int
    """Rows that wait."""
    active: int
    """Rows in the batch."""
    steps: int
    """Steps since it began."""
    tokens: int
    """Tokens written since it began."""
    tokens_per_s: float
    rows_per_s: float
    """Rows finished."""
    mean_batch: float
    """Rows in a step."""


class EngineLoop:
    """Denoises rows of many clients together.

    Rows join between steps while there is room (`Limits.max_rows`, `Limits.max_tokens`): clients take turns, and the
    rows of one client are taken in order. A step that raises fails the rows in flight; those that wait go on.

    Args:
        lm: the model, in eval mode. Loops may share it; whoever else runs it meanwhile takes `turn_of` it.
        limits: how many rows are denoised together, and how many calls may wait.
        observe: told after each step: rows in it, tokens it wrote, seconds it took.
        make_engine: what denoises rows; None: the model's engine (`engine_for`).
        threads: torch threads on a CPU; None: as they are. Set in the loop's own thread only: once the teams of all
            threads have more members than there are cores, OpenMP lets them sleep between operations, and waking takes.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        limits: Limits,
        observe: Callable[[int, int, float], None] | None = None,
        make_engine: Callable[[], Any] | None = None,
        threads: int | None = None,
    ):
        self.lm = lm
        self.limits = limits
        self._observe = observe
        self._threads = threads
        self._make_engine = make_engine or (lambda: engine_for(lm, events=True))
        self._engine = self._make_engine()
        self._turn = turn_of(lm)
        self._room = _Room(limits)
        self._keys = itertools.count()
        self._changed = threading.Condition()  # guards what follows, as far as other threads see it
        self._queues: OrderedDict[str, deque[Ticket]] = OrderedDict()  # clients, whose turn it is first
        self._waiting: dict[object, int] = {}  # rows that wait, by call
        self._active: dict[int, Ticket] = {}
        self._cancelled: list[Ticket] = []
        self._is_open, self._is_ending = True, False
        self._steps = self._tokens = self._failures = 0
        self._lately: deque[tuple[float, int, int, int]] = deque(maxlen=_REMEMBERED)  # time, rows, tokens, finished
        self._thread = threading.Thread(target=self._run, name="dllm-ray-engine", daemon=True)
        self._thread.start()

    # --- for other threads

    def submit(self, row: Row, client: str, on_event: OnRowEvent, deadline: float | None = None) -> Ticket:
        """Queues a row.

        Args:
            row: its key is replaced.
            client: who asks.
            on_event: told what becomes of it.
            deadline: time (`time.time()`) after which it is let go; None: never.

        Raises:
            ConfigError: as `Engine.check`.
            QueueFull: at once, where `Limits.max_queue` calls wait.
            Draining: the loop is about to end.
        """
        return self.submit_all([row], client, [on_event], deadline)[0]

    def submit_all(
        self, rows: Sequence[Row], client: str, on_events: Sequence[OnRowEvent], deadline: float | None = None
    ) -> list[Ticket]:
        """`submit` for the rows of one call: all of them, or none."""
        for row in rows:
            self._engine.check(row)
        tickets = [
            Ticket(self, dataclasses.replace(row, key=next(self._keys)), client, on_event, deadline)
            for row, on_event in zip(rows, on_events, strict=True)
        ]
        with self._changed:
            self._require_room()
            for ticket in tickets:
                ticket._call = tickets[0]
                self._queues.setdefault(client, deque()).append(ticket)
            self._waiting[tickets[0]] = len(tickets)
            self._changed.notify_all()
        return tickets

    def require_room(self) -> None:
        """Raises what `submit` would raise now for want of room, before anything is prepared for it."""
        with self._changed:
            self._require_room()

    def figures(self) -> Figures:
        """How it is doing."""
        with self._changed:
            queued, active, lately = sum(self._waiting.values()), len(self._active), list(self._lately)
        rate, finished, mean = _rates(lately)
        return Figures(queued, active, self._steps, self._tokens, rate, finished, mean)

    @property
    def healthy(self) -> bool:
        """Whether it runs, and its last steps didn't all fail."""
        return self._thread.is_alive() and self._failures < _BROKEN_AFTER

    @property
    def is_open(self) -> bool:
        """Whether it takes rows."""
        return self._is_open

    def drain(self, timeout: float | None = None) -> bool:
        """Takes no more rows, and waits for those it has.

        Args:
            timeout: seconds; None: as long as it takes.

        Returns:
            Whether all have ended.
        """
        with self._changed:
            self._is_open = False
            return self._changed.wait_for(lambda: not (self._active or self._waiting), timeout)

    def close(self) -> None:
        """Lets all rows go, and ends."""
        with self._changed:
            self._is_open, self._is_ending = False, True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _require_room(self) -> None:
        if not self._is_open:
            raise Draining("the model is being put away")
        if len(self._waiting) >= self.limits.max_queue:
            raise QueueFull(self._retry_after())

    def _retry_after(self) -> float:
        """Seconds in which those that wait now will have had their turn."""
        _, per_s, _ = _rates(list(self._lately))
        least, most = _RETRY_S
        return min(max(sum(self._waiting.values()) / per_s, least), most) if per_s else least

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            self._cancelled.append(ticket)
            self._changed.notify_all()

    # --- in its own thread

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._active or self._cancelled or self._is_ending)
                    if self._is_ending:
                        break
                    leaving = self._take_leaving()
                    joining = self._take_joining()
                for ticket, event in leaving:
                    self._drop(ticket, event)
                for ticket in joining:
                    self._join(ticket)
                if self._active:
                    self._step()
                self._rest()
        except BaseException:
            logger.exception("the engine's thread ended")
            raise
        finally:
            self._end()

    def _take_leaving(self) -> list[tuple[Ticket, str]]:
        """Rows that were cancelled or are late, with the reason; those that wait leave their queues here."""
        leaving = dict.fromkeys(self._cancelled, "cancelled")
        self._cancelled = []
        now = time.time()
        queued = [ticket for queue in self._queues.values() for ticket in queue]
        for ticket in itertools.chain(queued, self._active.values()):
            if ticket.deadline is not None and ticket.deadline <= now:
                leaving.setdefault(ticket, "deadline")
        if not leaving:
            return []
        for ticket in queued:
            if ticket in leaving:
                self._queues[ticket.client].remove(ticket)
                self._unqueue(ticket)
        there = {*queued, *self._active.values()}
        return [(ticket, reason) for ticket, reason in leaving.items() if ticket in there]

    def _take_joining(self) -> list[Ticket]:
        """Rows whose turn it is, as many as fit; none overtakes one that has to wait for room."""
        joining = []
        while self._queues:
            client, queue = next(iter(self._queues.items()))
            if not self._room.fits(queue[0].row):
                break
            ticket = queue.popleft()
            if queue:
                self._queues.move_to_end(client)
            self._unqueue(ticket)
            if self._room.is_new(ticket.row):  # nothing is active, and what was kept for others is too much
                self._renew()
            self._room.take(ticket.row)
            self._active[ticket.row.key] = ticket
            joining.append(ticket)
        return joining

    def _unqueue(self, ticket: Ticket) -> None:
        """Keeps the books on a row that waits no more."""
        if not self._queues[ticket.client]:
            del self._queues[ticket.client]
        self._waiting[ticket._call] -= 1
        if not self._waiting[ticket._call]:
            del self._waiting[ticket._call]

    def _join(self, ticket: Ticket) -> None:
        try:
            self._engine.admit(ticket.row)
        except ConfigError as error:  # checked before: the model has changed meanwhile
            self._leave(ticket, Dropped("failed", message=str(error)))

    def _drop(self, ticket: Ticket, reason: Literal["cancelled", "deadline"]) -> None:
        if ticket.row.key in self._active:
            self._leave(ticket, Dropped(reason, self._engine.cancel(ticket.row.key)))
        else:
            self._tell(ticket, Dropped(reason))

    def _step(self) -> None:
        rows, began = len(self._active), time.perf_counter()
        try:
            with self._turn:
                commits = self._engine.step()
            finished = self._engine.take_finished()
        except Exception as error:
            self._fail(error)
            return
        seconds, tokens = time.perf_counter() - began, sum(len(commit.positions) for commit in commits)
        self._failures = 0
        self._steps += 1
        self._tokens += tokens
        self._lately.append((time.monotonic(), rows, tokens, len(finished)))
        for commit in commits:
            self._tell(self._active[commit.row], commit)
        for item in finished:
            self._leave(self._active[item.row], item)
        if self._observe is not None:
            try:
                self._observe(rows, tokens, seconds)
            except Exception:
                logger.exception("a step can't be observed")

    def _fail(self, error: Exception) -> None:
        """A step raised: what its rows have come to can't be trusted, nor the engine."""
        self._failures += 1
        logger.error("a step of %d rows failed", len(self._active), exc_info=error)
        # a message of ours is fit to be shown; another may tell of paths and addresses
        message = str(error) if isinstance(error, DllmRayError) else f"the model failed ({type(error).__name__})"
        self._renew()
        for ticket in list(self._active.values()):
            self._leave(ticket, Dropped("failed", message=message))

    def _renew(self) -> None:
        self._engine = self._make_engine()
        self._room.renew()
        if self.lm.device.type == "cuda":
            torch.cuda.empty_cache()

    def _leave(self, ticket: Ticket, event: Finished | Dropped) -> None:
        with self._changed:
            del self._active[ticket.row.key]
        self._room.free(ticket.row)
        self._tell(ticket, event)

    def _tell(self, ticket: Ticket, event: RowEvent) -> None:
        try:
            ticket._on_event(ticket, event)
        except Exception:
            logger.exception("an answer's events can't be taken; it is let go")
            ticket.cancel()

    def _rest(self) -> None:
        if not self._active:
            with self._changed:
                self._changed.notify_all()  # who waits in `drain`

    def _end(self) -> None:
        with self._changed:
            self._is_open = False
            left = [*self._active.values(), *(ticket for queue in self._queues.values() for ticket in queue)]
            self._active, self._queues, self._waiting, self._cancelled = {}, OrderedDict(), {}, []
        for ticket in left:
            self._tell(ticket, Dropped("closed"))
        with self._changed:
            self._cancelled = []
            self._changed.notify_all()


class _Room:
    """Counts the rows in the batch and their positions against the limits.

    Keys and values are kept for as many rows as there were at most, each as long as the longest was; so with a cache
    it is that rectangle which must fit.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._lengths: list[int] = []
        self._rows = self._tokens = 0
        self.renew()

    def renew(self) -> None:
        """The engine is a new one: nothing is kept."""
        self._kept = (0, 0)  # rows, positions

    def fits(self, row: Row) -> bool:
        """Whether a row may join those in the batch."""
        if not self._rows:
            return True
        if self._rows >= self._limits.max_rows or self._tokens + _cost(row) > self._limits.max_tokens:
            return False
        return not self.is_new(row)

    def is_new(self, row: Row) -> bool:
        """Whether the row doesn't fit what the engine keeps already: it needs a new engine, or to wait for one."""
        if row.config.cache == "none" or self._kept == (0, 0):
            return False
        rows, width = self._rectangle(row)
        return rows * width > self._limits.max_tokens

    def take(self, row: Row) -> None:
        """A row joins."""
        if row.config.cache != "none":
            self._kept = self._rectangle(row)
        self._rows += 1
        self._tokens += _cost(row)
        self._lengths.append(_width(row))

    def free(self, row: Row) -> None:
        """A row has left."""
        self._rows -= 1
        self._tokens -= _cost(row)
        self._lengths.remove(_width(row))

    def _rectangle(self, row: Row) -> tuple[int, int]:
        rows, width = self._kept
        twins = 2 if row.config.cfg_scale > 0 else 1
        return max(rows, twins * (self._rows + 1)), max(width, _width(row), *self._lengths)


def _cost(row: Row) -> int:
    """Positions that a forward computes for a row; a guided one has a twin."""
    return _width(row) * (2 if row.config.cfg_scale > 0 else 1)


def _width(row: Row) -> int:
    """Positions that a row may come to have."""
    return max(len(row.tokens), row.longest or 0)


def _rates(lately: Sequence[tuple[float, int, int, int]]) -> tuple[float, float, float]:
    """Tokens and finished rows a second, and rows in a step, of the last seconds."""
    now = time.monotonic()
    steps = [step for step in lately if step[0] > now - _WINDOW_S]
    if not steps:
        return 0.0, 0.0, 0.0
    seconds = max(now - steps[0][0], 1e-3) if len(steps) > 1 else _WINDOW_S
    _, rows, tokens, finished = (sum(column) for column in zip(*steps, strict=True))
    return tokens / seconds, finished / seconds, rows / len(steps)
