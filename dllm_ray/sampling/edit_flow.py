"""The engine of models that edit: sequences change by insertions, deletions and substitutions (Edit Flows, Havasi et
al., arXiv 2506.09018, sampled by tau-leaping).

Rows of different and changing length share a batch; the interface is that of `engine.Engine`. Time runs from 0 to 1 in
steps, in each of which a row's edits happen with probability rate * share: the share that the schedule makes in the
step of what is left to do, w(t) * tau if it is short. Where rates depend on the sequence alone, a row's coming steps
follow from one forward up to the one in which something happens: it goes there at once, and is done where nothing
happens any more. Draws come from the row's seed, step and position, so its text is the same whatever else is in the
batch.

Shapes: R rows, T positions, S steps, N edits with a token.
"""

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral

import numba
import numpy as np
import torch
from torch import Tensor

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.objectives.schedules import KappaSchedule, edit_share, kappa_schedule
from dllm_ray.sampling.batch import Row
from dllm_ray.sampling.config import KAPPAS, SamplerConfig
from dllm_ray.sampling.engine import Commit, Edit, Finished
from dllm_ray.sampling.noise import DELETE, EDIT, INSERT, INSERTED, TOKEN, uniform_of_each, uniform_of_one
from dllm_ray.sampling.proposals import Rules, propose, suppress

_HONOURED = frozenset(
    ("max_new_tokens", "max_length", "steps", "temperature", "top_p", "top_k", "suppress_tokens", "eos_penalty")
    + ("seed", "kappa", "start_tokens", "edit_prompt", "edit_probability")
)
_SUREST = 1 - 1e-6  # probability of an edit in one step
_END = 1 - 1e-9  # of time
_AHEAD, _MOST_AHEAD = 4, 64  # steps whose lengths are found together, at first and at most


def check_settings(config: SamplerConfig) -> None:
    """Refuses settings that would be without effect on a model that edits.

    Raises:
        ConfigError: there is one.
    """
    defaults = SamplerConfig()
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if item.name not in _HONOURED and value != getattr(defaults, item.name):
            raise ConfigError(f"{value!r} has no meaning for a model that edits: leave it out", item.name)


@dataclass
class _Item:
    """A row in the batch: what isn't an array of all rows."""

    row: Row
    history: list[np.ndarray] = field(default_factory=list)


class EditEngine:
    """Edits rows step by step.

    Args:
        lm: a model with edit heads, in eval mode.
        max_rows: most rows in a batch; others wait. None: no limit.
        trace: keep every row's sequence after each step that changed it.
        events: return what each step changed (`step`).
    """

    def __init__(self, lm: DiffusionLM, max_rows: int | None = None, trace: bool = False, events: bool = False):
        if lm.spec.edit_heads is None:
            raise ModelError(
                "the model has no edit heads: give it some with jobs/convert.py --to editflow, and train it"
            )
        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"must be at least 1, got {max_rows}", "max_rows")
        self.lm = lm
        self.max_rows = max_rows
        self.trace = trace
        self.events = events
        self.forwards = 0
        self._vocabulary = lm.model.get_input_embeddings().num_embeddings
        self._waiting: deque[Row] = deque()
        self._items: list[_Item] = []
        self._state = _State.of([], lm.spec.pad_token_id)
        self._finished: list[Finished] = []

    def admit(self, row: Row) -> None:
        """Queues a row; it joins the batch at the next step that has room.

        Raises:
            ConfigError: the row may grow longer than the model's context, names a token that the model doesn't have, or
                has settings that mean nothing here.
        """
        self.check(row)
        self._waiting.append(row)

    def check(self, row: Row) -> None:
        """Makes sure that a row can be admitted. Reads nothing that steps change: any thread may ask.

        Raises:
            ConfigError: as `admit`.
        """
        longest, limit = max(len(row.tokens), row.longest or 0), self.lm.max_length
        if limit is not None and longest > limit:
            raise ConfigError(
                f"a sequence of {longest} tokens (prompt and the longest answer) doesn't fit the model's context of "
                f"{limit}: shorten the prompt or lower max_new_tokens"
            )
        for tokens in (row.tokens, row.config.suppress_tokens):
            if not all(isinstance(token, Integral) for token in tokens):
                raise ConfigError("expected token ids, a list of whole numbers for each row")
            for token in (min(tokens), max(tokens)) if tokens else ():
                if not 0 <= token < self._vocabulary:
                    raise ConfigError(f"token {token} is outside the model's vocabulary of {self._vocabulary}")
        if len({*row.config.suppress_tokens, self.lm.spec.mask_token_id}) >= self._vocabulary:
            raise ConfigError("leaves no token to write with", "suppress_tokens")
        if not -(2**63) <= row.seed < 2**63:
            raise ConfigError(f"a row's seed must fit 64 bits, got {row.seed}", "seed")
        if not row.tokens or row.open[0]:
            raise ConfigError("a sequence begins with a token that stays: there is nothing to insert behind")
        check_settings(row.config)

    def cancel(self, key: int) -> Finished | None:
        """Takes a row out, waiting or active, between two steps. Others go on as if it had never been there.

        Returns:
            What it had come to. None: no such row is waiting or active.
        """
        for row in self._waiting:
            if row.key == key:
                self._waiting.remove(row)
                alone = _State.of([row], self.lm.spec.pad_token_id)
                return self._result(alone, 0, _Item(row, [alone.text(0)] if self.trace else []))
        for place, item in enumerate(self._items):
            if item.row.key == key:
                come_to = self._result(self._state, place, item)
                stays_R = np.ones(len(self._items), np.bool_)
                stays_R[place] = False
                self._keep(stays_R)
                return come_to
        return None

    @property
    def busy(self) -> bool:
        """Whether any row is active or waiting."""
        return bool(self._items or self._waiting)

    def take_finished(self) -> list[Finished]:
        """Rows that became done since the last call."""
        done, self._finished = self._finished, []
        return done

    @torch.inference_mode()
    def step(self) -> list[Commit]:
        """One forward for all active rows; each goes on to its next change, and finished rows go.

        Returns:
            What was changed on each row, when the engine was made with `events`; else an empty list. A row on which
            nothing happens any more says so with an empty commit.

        Raises:
            ModelError: the model gives NaN.
        """
        self._join()
        if not self._items:
            return []
        state = self._state
        hidden_RTH, rates_RT3 = self._forward()
        happened_RT3 = self._next_change(np.where(state.may(), rates_RT3, 0))
        edits = self._tokens(hidden_RTH, happened_RT3)
        place_N = state.apply(happened_RT3, edits)
        done_R = state.time >= _END
        commits = self._commits(happened_RT3, edits, place_N, done_R) if self.events else []
        if self.trace:
            for number in np.flatnonzero(happened_RT3.any(axis=(1, 2))):
                self._items[number].history.append(state.text(number))
        if done_R.any():
            self._finished += [self._result(state, number, self._items[number]) for number in np.flatnonzero(done_R)]
            self._keep(~done_R)
        return commits

    def _join(self) -> None:
        room = len(self._waiting) if self.max_rows is None else self.max_rows - len(self._items)
        new = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not new:
            return
        joined = _State.of(new, self.lm.spec.pad_token_id)
        if self.trace:
            self._items += [_Item(row, [joined.text(number)]) for number, row in enumerate(new)]
        else:
            self._items += [_Item(row) for row in new]
        self._state = self._state.joined(joined)

    def _forward(self) -> tuple[Tensor, np.ndarray]:
        """What the token heads read, [R, T, H] on the device, and the rates [R, T, 3] on the host."""
        state, module, device = self._state, self.lm.module, self.lm.device
        ids_RT = torch.from_numpy(state.canvas).to(device)
        valid_RT = torch.from_numpy(state.valid()).to(device)
        hidden_RTH = module.hidden(ids_RT, None if bool(state.valid().all()) else valid_RT.long())
        t_R = torch.from_numpy(state.time).to(device, torch.float32)
        hidden_RTH = module.heads.at_time(hidden_RTH, t_R)
        rates_RT3 = module.heads.rates_of(hidden_RTH, self.lm.spec.shift_logits).cpu().numpy()
        if np.isnan(rates_RT3).any():
            raise ModelError("the model's rates are not numbers (NaN): its weights or their dtype are broken")
        self.forwards += 1
        state.nfe += 1
        return hidden_RTH, rates_RT3

    def _next_change(self, rates_RT3: np.ndarray) -> np.ndarray:
        """Moves each row's clock behind its next step in which something happens, or to the end.

        Returns:
            [R, T, 3] bool, what happens in that step: substitutions, deletions, insertions.
        """
        state = self._state
        gives_way_RT, inserts_RT = rates_RT3[:, :, 0] + rates_RT3[:, :, 1], rates_RT3[:, :, 2]
        happened_RT3 = np.zeros(rates_RT3.shape, np.bool_)
        fastest_R = np.maximum(gives_way_RT, inserts_RT).max(axis=1)
        stepwise = self.lm.module.heads.time is not None  # rates change with every step
        is_even = state.probability == 0
        if is_even.any():
            rows = np.flatnonzero(is_even)
            stop = np.minimum(state.steps[rows], state.step[rows] + 1) if stepwise else state.steps[rows]
            state.step[rows] = _first_change(
                rows, state.seed, state.step[rows], stop, state.shares, gives_way_RT, inserts_RT, happened_RT3
            )
            state.time[rows] = np.where(
                state.step[rows] >= state.steps[rows], 1.0, state.step[rows] / state.steps[rows]
            )
        rows, ahead = np.flatnonzero(~is_even), 1 if stepwise else _AHEAD
        while len(rows):
            began = state.step[rows]
            shares_PS, time_PS = state.schedule(rows, fastest_R[rows], ahead)
            table = np.zeros((len(is_even), ahead))
            table[rows] = shares_PS
            state.step[rows] = began + _first_change(
                rows, state.seed, began * 0, began * 0 + ahead, table, gives_way_RT, inserts_RT, happened_RT3, began
            )
            state.time[rows] = time_PS[np.arange(len(rows)), state.step[rows] - began - 1]
            rows = rows[~happened_RT3[rows].any(axis=(1, 2)) & (state.time[rows] < _END)]
            if stepwise:
                break
            ahead = min(2 * ahead, _MOST_AHEAD)
        row_N, column_N = happened_RT3[:, :, 0].nonzero()
        if len(row_N):
            share_N = rates_RT3[row_N, column_N, 1] / (gives_way_RT[row_N, column_N] + 1e-8)
            happened_RT3[row_N, column_N, 1] = state.draws(row_N, column_N, np.full_like(row_N, DELETE)) < share_N
            happened_RT3[:, :, 0] &= ~happened_RT3[:, :, 1]
        happened_RT3[:, :, 2] &= state.fits(happened_RT3[:, :, 2])
        return happened_RT3

    def _tokens(self, hidden_RTH: Tensor, happened_RT3: np.ndarray) -> "_Tokens":
        """The tokens of substitutions and insertions, in order of rows and positions."""
        row_N, column_N, kind_N = happened_RT3[:, :, [0, 2]].nonzero()
        inserted_N = kind_N == 1
        if not len(row_N):
            return _Tokens(row_N, column_N, inserted_N, row_N, np.zeros(0, np.float32))
        state, module, device = self._state, self.lm.module, self.lm.device
        inserted = torch.from_numpy(inserted_N).to(device)
        source_N = module.source(torch.from_numpy(column_N).to(device), inserted)
        row = torch.from_numpy(row_N).to(device)
        logits_NV = module.tokens(hidden_RTH[row, source_N], inserted).float()
        draws_N = state.draws(row_N, column_N, np.where(inserted_N, INSERTED, TOKEN))
        token_N = np.zeros(len(row_N), np.int64)
        confidence_N = np.zeros(len(row_N), np.float32)
        kinds = self._alike(row_N)
        for config, members in kinds:
            logits = logits_NV if len(kinds) == 1 else logits_NV[torch.from_numpy(members).to(device)]
            suppress(logits, config.suppress_tokens)
            if config.eos_penalty:
                logits[:, list(self.lm.spec.stop_token_ids)] -= config.eos_penalty
            rules = Rules() if config.temperature == 0 else self._drawing(config, torch.from_numpy(draws_N[members]))
            token, confidence = propose(logits, rules, self.lm.spec.mask_token_id)
            token_N[members], confidence_N[members] = token.cpu().numpy(), confidence.float().cpu().numpy()
        return _Tokens(row_N, column_N, inserted_N, token_N, confidence_N)

    def _alike(self, row_N: np.ndarray) -> list[tuple[SamplerConfig, np.ndarray]]:
        """Settings, and which of the N have them."""
        kinds: dict[tuple, tuple[SamplerConfig, list[int]]] = {}
        for number, item in enumerate(self._items):
            config = item.row.config
            of_tokens = (config.temperature, config.top_p, config.top_k, config.suppress_tokens, config.eos_penalty)
            kinds.setdefault(of_tokens, (config, []))[1].append(number)
        found = [(config, np.flatnonzero(np.isin(row_N, rows))) for config, rows in kinds.values()]
        return [(config, members) for config, members in found if len(members)]

    def _drawing(self, config: SamplerConfig, draws_N: Tensor) -> Rules:
        def all_of(value: float | int | None) -> Tensor | None:
            return None if value is None else torch.full((len(draws_N),), value, device=self.lm.device)

        return Rules(
            uniform_N=draws_N.to(self.lm.device),
            temperature_N=all_of(float(config.temperature)),
            top_p_N=all_of(config.top_p),
            top_k_N=all_of(config.top_k),
        )

    def _commits(
        self, happened_RT3: np.ndarray, tokens: "_Tokens", place_N: np.ndarray, done_R: np.ndarray
    ) -> list[Commit]:
        commits = [
            Commit(item.row.key, int(self._state.step[number]) - 1, [], [], [], bool(done_R[number]), [])
            for number, item in enumerate(self._items)
        ]
        for number, position in zip(*happened_RT3[:, :, 1].nonzero(), strict=True):
            commits[number].edits.append(Edit("delete", int(position), None))
        listed = (array.tolist() for array in (tokens.row, tokens.column, tokens.inserted, tokens.token))
        for number, position, inserted, token in zip(*listed, strict=True):
            commits[number].edits.append(Edit("insert" if inserted else "substitute", position, token))
        listed = (array.tolist() for array in (tokens.row, place_N, tokens.token, tokens.confidence))
        for number, place, token, confidence in zip(*listed, strict=True):
            commit = commits[number]
            commit.positions.append(place)
            commit.tokens.append(token)
            commit.confidences.append(confidence)
        for commit in commits:
            commit.edits.sort(key=lambda edit: (edit.position, edit.kind == "insert"))
        return commits

    def _result(self, state: "_State", number: int, item: _Item) -> Finished:
        history = None
        if self.trace:
            width = max(map(len, item.history))
            rows = [np.pad(text, (0, width - len(text)), constant_values=-1) for text in item.history]
            history = torch.from_numpy(np.stack(rows))
        length = state.length[number]
        return Finished(
            item.row.key,
            state.text(number).tolist(),
            int(state.nfe[number]),
            answer=(state.part[number, :length] > 0).tolist(),
            history=history,
        )

    def _keep(self, stays_R: np.ndarray) -> None:
        self._items = [item for item, stays in zip(self._items, stays_R, strict=True) if stays]
        self._state = self._state.kept(stays_R)


@dataclass
class _Tokens:
    """[N] each: new tokens, in order of rows and positions."""

    row: np.ndarray
    column: np.ndarray
    """Of the token that is replaced, or behind which another comes."""
    inserted: np.ndarray
    token: np.ndarray
    confidence: np.ndarray


@dataclass
class _State:
    """The rows' sequences and clocks, on the host."""

    pad: int
    canvas: np.ndarray
    """[R, T] tokens, as the other grids."""
    open: np.ndarray
    """Tokens that may give way."""
    gate: np.ndarray
    """Number of the part of the answer that may begin behind a token, from 1; 0: none. Such tokens are not deleted."""
    part: np.ndarray
    """Number of the part of the answer that a token belongs to; 0: none."""
    length: np.ndarray
    """[R], as all that follows."""
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
    def of(cls, rows: list[Row], pad: int) -> "_State":
        """The state of rows that come."""
        width = max((len(row.tokens) for row in rows), default=1)
        parts = max((len(row.gates) for row in rows), default=0) + 1
        canvas = np.full((len(rows), width), pad, np.int64)
        is_open, gate = np.zeros((len(rows), width), np.bool_), np.zeros((len(rows), width), np.int64)
        most = np.full((len(rows), parts), np.iinfo(np.int64).max)
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

    def valid(self) -> np.ndarray:
        """[R, T] bool, which positions are tokens."""
        return np.arange(self.canvas.shape[1]) < self.length[:, None]

    def text(self, number: int) -> np.ndarray:
        """A row's tokens."""
        return self.canvas[number, : self.length[number]].copy()

    def may(self) -> np.ndarray:
        """[R, T, 3] bool: where there may be substitutions, deletions, insertions."""
        valid, is_gate = self.valid(), self.gate > 0
        room = (self.length < self.longest)[:, None]
        room = room & np.take_along_axis(self._room() > 0, np.where(is_gate, self.gate, self.part), axis=1)
        return np.stack([self.open & valid, self.open & ~is_gate & valid, (self.open | is_gate) & valid & room], axis=2)

    def fits(self, inserted_RT: np.ndarray) -> np.ndarray:
        """[R, T] bool: which insertions have room, the first in each part of the answer and in the row."""
        room_RP, wanted_R = self._room(), inserted_RT.sum(axis=1)
        if (wanted_R <= np.minimum(room_RP.min(axis=1), self.longest - self.length)).all():
            return inserted_RT
        row_N, column_N = inserted_RT.nonzero()
        part_N = np.where(self.gate > 0, self.gate, self.part)[row_N, column_N]
        key_N = row_N * self.most.shape[1] + part_N
        order = np.argsort(key_N, kind="stable")
        _, first, inverse = np.unique(key_N[order], return_index=True, return_inverse=True)
        rank_N = np.empty(len(key_N), np.int64)
        rank_N[order] = np.arange(len(key_N)) - first[inverse]
        kept_RT = np.zeros(inserted_RT.shape, np.bool_)
        kept_RT[row_N, column_N] = rank_N < room_RP[row_N, part_N]
        return kept_RT & (kept_RT.cumsum(axis=1) <= (self.longest - self.length)[:, None])

    def _room(self) -> np.ndarray:
        """[R, P] tokens that may still come to each part."""
        rows, parts = self.most.shape
        key_RT = np.arange(rows)[:, None] * parts + self.part
        count = np.bincount(key_RT[self.valid()], minlength=rows * parts).reshape(rows, parts)
        return self.most - count

    def draws(self, row_N: np.ndarray, column_N: np.ndarray, stream_N: np.ndarray) -> np.ndarray:
        """[N] uniform random numbers of the step that the rows' clocks have just passed."""
        return uniform_of_each(self.seed[row_N], self.step[row_N] - 1, column_N, stream_N)

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
        """[P] what a function of a schedule and numbers gives for some rows' own."""
        found = np.zeros(len(rows))
        for number, name in enumerate(KAPPAS):
            members = self.kappa[rows] == number
            if members.any():
                numbers = (torch.from_numpy(argument[members]) for argument in arguments)
                found[members] = function(kappa_schedule(name), *numbers).numpy()
        return found

    def apply(self, happened_RT3: np.ndarray, tokens: _Tokens) -> np.ndarray:
        """Makes the edits; returns [N] where the new tokens stand then."""
        substituted = ~tokens.inserted
        self.canvas[tokens.row[substituted], tokens.column[substituted]] = tokens.token[substituted]
        keep, insert = self.valid() & ~happened_RT3[:, :, 1], happened_RT3[:, :, 2]
        count = keep.astype(np.int64) + insert
        start = count.cumsum(axis=1) - count
        place_N = start[tokens.row, tokens.column] + (tokens.inserted & keep[tokens.row, tokens.column])
        self.length = count.sum(axis=1)
        shape = (len(keep), int(self.length.max(initial=1)))
        row, column = keep.nonzero()
        new_row, new_place = tokens.row[tokens.inserted], place_N[tokens.inserted]
        behind = (new_row, tokens.column[tokens.inserted])
        of_new = {
            "canvas": tokens.token[tokens.inserted],
            "open": True,
            "gate": 0,
            "part": np.where(self.gate[behind] > 0, self.gate[behind], self.part[behind]),
        }
        for name, values in of_new.items():
            old = getattr(self, name)
            grid = np.full(shape, self.pad if name == "canvas" else 0, old.dtype)
            grid[row, start[row, column]] = old[row, column]
            grid[new_row, new_place] = values
            setattr(self, name, grid)
        return place_N

    def joined(self, other: "_State") -> "_State":
        """The state of these rows and further ones."""

        def both(name: str) -> np.ndarray:
            parts = [getattr(self, name), getattr(other, name)]
            if parts[0].ndim == 2:
                width = max(part.shape[1] for part in parts)
                fill = {"canvas": self.pad, "most": np.iinfo(np.int64).max}.get(name, 0)
                parts = [_widened(part, width, fill) for part in parts]
            return np.concatenate(parts)

        return _State(self.pad, **{name: both(name) for name in _ARRAYS})

    def kept(self, stays_R: np.ndarray) -> "_State":
        """The state of some of the rows."""
        width = int(self.length[stays_R].max(initial=1))
        grids = {name: getattr(self, name)[stays_R, :width] for name in _GRIDS}
        return _State(self.pad, **{name: grids.get(name, getattr(self, name)[stays_R]) for name in _ARRAYS})


_GRIDS = ("canvas", "open", "gate", "part")
_ARRAYS = tuple(item.name for item in dataclasses.fields(_State) if item.name != "pad")


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
def _first_change(rows, seed, start, stop, shares, gives_way, inserts, happened, began=None):
    """For each of some rows, the number of steps done after the next one in which something happens; `stop` if nothing
    does. What happens is marked in `happened` [R, T, 3].

    Args:
        rows: [P], of R.
        seed: [R].
        start, stop: [P] columns of `shares` [R, S].
        gives_way, inserts: [R, T] rates.
        began: [P] number of the step of column 0; None: 0.
    """
    after = stop.copy()
    for place in range(len(rows)):
        row = rows[place]
        first = 0 if began is None else began[place]
        for step in range(start[place], stop[place]):
            found = False
            for column in range(gives_way.shape[1]):
                chance = min(gives_way[row, column] * shares[row, step], _SUREST)
                if chance > 0 and uniform_of_one(seed[row], first + step, column, EDIT) < chance:
                    happened[row, column, 0] = found = True
                chance = min(inserts[row, column] * shares[row, step], _SUREST)
                if chance > 0 and uniform_of_one(seed[row], first + step, column, INSERT) < chance:
                    happened[row, column, 2] = found = True
            if found:
                after[place] = step + 1
                break
    return after
