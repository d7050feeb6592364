"""The sequences and clocks of rows that are edited: what may happen, what does, and what comes of it. Host arithmetic,
in compiled loops over rows and positions; no model.

Shapes: R rows, T positions, S steps, P parts of an answer, N edits with a token. The 3 kinds of edits are
substitutions, deletions and insertions.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numba
import numpy as np
import torch
from torch import Tensor

from dllm_ray.objectives.schedules import KappaSchedule, edit_share, kappa_schedule
from dllm_ray.sampling.batch import Row
from dllm_ray.sampling.compiled_noise import uniform_of_each, uniform_of_one
from dllm_ray.sampling.config import KAPPAS, SamplerConfig
from dllm_ray.sampling.noise import DELETE, EDIT, INSERT

_SUREST = 1 - 1e-6  # probability of an edit in one step
_END = 1 - 1e-9  # of time
_AHEAD, _MOST_AHEAD = 4, 64  # steps whose lengths are found together, at first and at most
_UNBOUNDED = np.iinfo(np.int64).max


@dataclass
class State:
    """[R] each, unless another shape is named."""

    pad: int
    """The token behind the ends of rows."""
    canvas: np.ndarray
    """[R, T] tokens, as the other grids."""
    open: np.ndarray
    """Tokens that may give way."""
    gate: np.ndarray
    """Number of the part of the answer that may begin behind a token, from 1; 0: none. Such tokens are not deleted."""
    part: np.ndarray
    """Number of the part of the answer that a token belongs to; 0: none."""
    length: np.ndarray
    longest: np.ndarray
    most: np.ndarray
    """[R, P] tokens that each part may have; part 0 is bounded by `longest` alone."""
    seed: np.ndarray
    step: np.ndarray
    """Steps done."""
    time: np.ndarray
    """Where the clock stands, from 0 to 1."""
    nfe: np.ndarray
    steps: np.ndarray
    """Steps of equal length that there would be."""
    probability: np.ndarray
    """Of an edit, up to which a step may be longer; 0: steps are equal."""
    kappa: np.ndarray
    """Number of the schedule."""
    shares: np.ndarray
    """[R, S] share of what is left that is made in each step of equal length."""

    @classmethod
    def of(cls, rows: list[Row], pad: int) -> "State":
        """The state of rows that come."""
        width = max((len(row.tokens) for row in rows), default=1)
        parts = max((len(row.gates) for row in rows), default=0) + 1
        canvas = np.full((len(rows), width), pad, np.int64)
        is_open, gate = np.zeros((len(rows), width), np.bool_), np.zeros((len(rows), width), np.int64)
        most = np.full((len(rows), parts), _UNBOUNDED)
        for number, row in enumerate(rows):
            canvas[number, : len(row.tokens)] = row.tokens
            is_open[number, : len(row.tokens)] = row.open
            for part, (place, room) in enumerate(row.gates, start=1):
                gate[number, place], most[number, part] = part, room
        begun = np.maximum.accumulate(np.pad(gate[:, :-1], ((0, 0), (1, 0))), axis=1)  # by gates further left
        configs = [row.config for row in rows]
        return cls(
            pad=pad,
            canvas=canvas,
            open=is_open,
            gate=gate,
            part=np.where(is_open, begun, 0),
            length=np.array([len(row.tokens) for row in rows], np.int64),
            longest=np.array([row.longest or len(row.tokens) for row in rows], np.int64),
            most=most,
            seed=np.array([row.seed for row in rows], np.int64),
            step=np.zeros(len(rows), np.int64),
            time=np.zeros(len(rows), np.float64),
            nfe=np.zeros(len(rows), np.int64),
            steps=np.array([config.steps for config in configs], np.int64),
            probability=np.array([config.edit_probability or 0.0 for config in configs]),
            kappa=np.array([KAPPAS.index(config.kappa) for config in configs], np.int64),
            shares=_shares(configs),
        )

    @property
    def done(self) -> np.ndarray:
        """[R] bool, whose time is over."""
        return self.time >= _END

    def valid(self) -> np.ndarray | None:
        """[R, T] bool, which positions are tokens; None: all."""
        width = self.canvas.shape[1]
        return None if self.length.min() == width else np.arange(width) < self.length[:, None]

    def text(self, number: int) -> np.ndarray:
        """A row's tokens."""
        return self.canvas[number, : self.length[number]].copy()

    def next_change(self, rates_RT3: np.ndarray, one_step: bool) -> np.ndarray:
        """Moves each row's clock behind its next step in which something happens, or to the end.

        Args:
            rates_RT3: float32 rates on the rows as they are.
            one_step: rates change with every step: move the clocks by one, whatever happens.

        Returns:
            [R, T, 3] bool, what happens in that step.
        """
        rates_RT3, room_RP = _allowed(
            np.ascontiguousarray(rates_RT3), self.open, self.gate, self.part, self.length, self.longest, self.most
        )
        happened_RT3 = np.zeros(rates_RT3.shape, np.bool_)

        def leap(rows: np.ndarray, began: np.ndarray, first: np.ndarray, stop: np.ndarray, shares: np.ndarray) -> None:
            self.step[rows] = _leap(
                *(rows, began, first, stop, shares, rates_RT3, room_RP, happened_RT3),
                *(self.seed, self.gate, self.part, self.length, self.longest),
            )

        is_even = self.probability == 0
        if is_even.any():
            rows = np.flatnonzero(is_even)
            step, steps = self.step[rows], self.steps[rows]
            leap(rows, np.zeros_like(step), step, np.minimum(steps, step + 1) if one_step else steps, self.shares)
            self.time[rows] = self.step[rows] / steps
        rows, ahead = np.flatnonzero(~is_even), 1 if one_step else _AHEAD
        while len(rows):
            gives_way_PT = rates_RT3[rows, :, 0] + rates_RT3[rows, :, 1]
            fastest_P = np.maximum(gives_way_PT, rates_RT3[rows, :, 2]).max(axis=1)
            shares_PS, time_PS = self.schedule(rows, fastest_P, ahead)
            began, first = self.step[rows], np.zeros(len(rows), np.int64)
            shares_RS = np.zeros((len(is_even), ahead))
            shares_RS[rows] = shares_PS
            leap(rows, began, first, first + ahead, shares_RS)
            self.time[rows] = time_PS[np.arange(len(rows)), self.step[rows] - began - 1]
            rows = rows[~happened_RT3[rows].any(axis=(1, 2)) & (self.time[rows] < _END)]
            if one_step:
                break
            ahead = min(2 * ahead, _MOST_AHEAD)
        return happened_RT3

    def schedule(self, rows: np.ndarray, fastest_P: np.ndarray, count: int) -> tuple[np.ndarray, ...]:
        """The next steps of rows whose steps may be longer, as long as their rates stay what they are.

        Returns:
            [P, count] each: share of what is left that is made in the step; time after it.
        """
        time, even = self.time[rows], 1 / self.steps[rows]
        shares, times = np.zeros((2, len(rows), count))
        surest = np.divide(
            self.probability[rows], fastest_P, out=np.ones(len(rows)), where=fastest_P > self.probability[rows]
        )
        for number in range(count):
            after = np.maximum(time + even, self._by_kappa(rows, _after, time, surest))
            after = np.where(after >= _END, 1.0, after)
            shares[:, number] = self._by_kappa(rows, edit_share, time, after)
            time = times[:, number] = after
        return shares, times

    def _by_kappa(self, rows: np.ndarray, function: Callable[..., Tensor], *arguments: np.ndarray) -> np.ndarray:
        """What a function of a schedule and numbers gives for some rows' own."""
        found = np.zeros(len(rows))
        for number, name in enumerate(KAPPAS):
            members = self.kappa[rows] == number
            if members.any():
                numbers = (torch.from_numpy(argument[members]) for argument in arguments)
                found[members] = function(kappa_schedule(name), *numbers).numpy()
        return found

    def draws(self, row_N: np.ndarray, column_N: np.ndarray, stream_N: np.ndarray) -> np.ndarray:
        """[N] uniform random numbers of the step that the rows' clocks have just passed."""
        return uniform_of_each(self.seed[row_N], self.step[row_N] - 1, column_N, stream_N)

    def apply(self, happened_RT3: np.ndarray, token_N: np.ndarray) -> np.ndarray:
        """Makes the edits.

        Args:
            happened_RT3: out of `next_change`.
            token_N: new tokens in order of rows and positions, a substitution before an insertion behind it.

        Returns:
            [N] where the new tokens stand then.
        """
        self.canvas, self.open, self.gate, self.part, self.length, place_N = _rewritten(
            happened_RT3, token_N, self.pad, self.canvas, self.open, self.gate, self.part, self.length
        )
        return place_N

    def joined(self, other: "State") -> "State":
        """The state of these rows and further ones."""
        if not len(self.length):
            return other

        def both(name: str) -> np.ndarray:
            arrays = [getattr(self, name), getattr(other, name)]
            if arrays[0].ndim == 2:
                width = max(array.shape[1] for array in arrays)
                fill = {"canvas": self.pad, "most": _UNBOUNDED}.get(name, 0)
                arrays = [_widened(array, width, fill) for array in arrays]
            return np.concatenate(arrays)

        return State(self.pad, **{name: both(name) for name in _ARRAYS})

    def kept(self, stays_R: np.ndarray) -> "State":
        """The state of some of the rows."""
        width = int(self.length[stays_R].max(initial=1))
        arrays = {name: getattr(self, name)[stays_R] for name in _ARRAYS}
        return State(self.pad, **arrays | {name: np.ascontiguousarray(arrays[name][:, :width]) for name in _GRIDS})


_GRIDS = ("canvas", "open", "gate", "part")
_ARRAYS = tuple(item.name for item in dataclasses.fields(State) if item.name != "pad")


def _widened(grid: np.ndarray, width: int, fill: int) -> np.ndarray:
    """A grid [R, W] with further columns on the right."""
    if grid.shape[1] == width:
        return grid
    wide = np.full((len(grid), width), fill, grid.dtype)
    wide[:, : grid.shape[1]] = grid
    return wide


def _after(schedule: KappaSchedule, t: Tensor, share: Tensor) -> Tensor:
    """The time by which a share of what is left at time t is made."""
    kappa = schedule.kappa(t)
    return schedule.inverse((kappa + (1 - kappa) * share).clamp(max=1))


def _shares(configs: list[SamplerConfig]) -> np.ndarray:
    """[R, S] share of what is left that each of the row's equal steps makes; none after the last."""
    table = np.zeros((len(configs), max((config.steps for config in configs), default=1)))
    for number, config in enumerate(configs):
        table[number, : config.steps] = _even_shares(config.kappa, config.steps)
    return table


@lru_cache(maxsize=64)
def _even_shares(kappa: str, steps: int) -> np.ndarray:
    time = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    return edit_share(kappa_schedule(kappa), time[:-1], time[1:]).numpy()


@numba.njit(cache=True, nogil=True)
def _allowed(rates, is_open, gate, part, length, longest, most):
    """The rates [R, T, 3] of edits that may be made, 0 elsewhere; tokens [R, P] that may still come to each part."""
    allowed, room = np.zeros_like(rates), most.copy()
    for row in range(len(length)):
        for column in range(length[row]):
            room[row, part[row, column]] -= 1
        for column in range(length[row]):
            if is_open[row, column]:
                allowed[row, column, 0] = rates[row, column, 0]
                if gate[row, column] == 0:
                    allowed[row, column, 1] = rates[row, column, 1]
            of = gate[row, column] if gate[row, column] > 0 else part[row, column]
            if (is_open[row, column] or gate[row, column] > 0) and length[row] < longest[row] and room[row, of] > 0:
                allowed[row, column, 2] = rates[row, column, 2]
    return allowed, room


@numba.njit(cache=True, nogil=True)
def _leap(rows, began, first, stop, shares, rates, room, happened, seed, gate, part, length, longest):
    """For each of some rows, the number of steps done after the next one in which something happens, or after the last
    if nothing does. What happens is marked in `happened` [R, T, 3]. Of insertions, the first have what room there is.

    Args:
        rows: [P], of R.
        began: [P] number of the step of column 0 of `shares`.
        first, stop: [P] columns of `shares` [R, S].
        rates, room: out of `_allowed`.
    """
    after = began + stop
    for place in range(len(rows)):
        row = rows[place]
        for column_of_step in range(first[place], stop[place]):
            step, share = began[place] + column_of_step, shares[row, column_of_step]
            found, left, left_of = False, longest[row] - length[row], room[row].copy()
            for column in range(length[row]):
                gives_way, inserts = rates[row, column, 0] + rates[row, column, 1], rates[row, column, 2]
                if gives_way > 0 and uniform_of_one(seed[row], step, column, EDIT) < min(gives_way * share, _SUREST):
                    to_none = rates[row, column, 1] / (gives_way + 1e-8)
                    kind = 1 if uniform_of_one(seed[row], step, column, DELETE) < to_none else 0
                    happened[row, column, kind] = found = True
                if inserts > 0 and uniform_of_one(seed[row], step, column, INSERT) < min(inserts * share, _SUREST):
                    of = gate[row, column] if gate[row, column] > 0 else part[row, column]
                    if left > 0 and left_of[of] > 0:
                        happened[row, column, 2] = found = True
                        left -= 1
                        left_of[of] -= 1
            if found:
                after[place] = step + 1
                break
    return after


@numba.njit(cache=True, nogil=True)
def _rewritten(happened, token, pad, canvas, is_open, gate, part, length):
    """The grids and lengths after edits, and [N] where the new tokens stand."""
    new_length = length.copy()
    for row in range(len(length)):
        for column in range(length[row]):
            if happened[row, column, 1]:
                new_length[row] -= 1
            if happened[row, column, 2]:
                new_length[row] += 1
    shape = (len(length), max(1, new_length.max()))
    new_canvas, new_open = np.full(shape, pad, np.int64), np.zeros(shape, np.bool_)
    new_gate, new_part = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    place, number = np.empty(len(token), np.int64), 0
    for row in range(len(length)):
        end = 0
        for column in range(length[row]):
            if not happened[row, column, 1]:
                new_canvas[row, end], new_open[row, end] = canvas[row, column], is_open[row, column]
                new_gate[row, end], new_part[row, end] = gate[row, column], part[row, column]
                if happened[row, column, 0]:
                    new_canvas[row, end] = token[number]
                    place[number] = end
                    number += 1
                end += 1
            if happened[row, column, 2]:
                new_canvas[row, end], new_open[row, end] = token[number], True
                new_part[row, end] = gate[row, column] if gate[row, column] > 0 else part[row, column]
                place[number] = end
                number += 1
                end += 1
    return new_canvas, new_open, new_gate, new_part, new_length, place
