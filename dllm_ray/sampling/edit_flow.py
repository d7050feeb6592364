"""The engine of models that edit: sequences change by insertions, deletions and substitutions (Edit Flows, Havasi et
al., arXiv 2506.09018, sampled by tau-leaping).

Rows of different and changing length share a batch; the interface is that of `engine.Engine`. Time runs from 0 to 1 in
steps, in each of which a row's edits happen with probability rate * share: the share that the schedule makes in the
step of what is left to do, w(t) * tau if it is short. Where rates depend on the sequence alone, a row's coming steps
follow from one forward up to the one in which something happens: it goes there at once, and is done where nothing
happens any more. Draws come from the row's seed, step and position, so its text is the same whatever else is in the
batch.

Shapes: R rows, T positions, N edits with a token.
"""

from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.batch import Row
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.edit_state import State
from dllm_ray.sampling.engine import Commit, Edit, Finished, check_row
from dllm_ray.sampling.noise import INSERTED, TOKEN
from dllm_ray.sampling.proposals import Rules, choose, probability, suppress


@dataclass
class _Item:
    """A row in the batch: what isn't an array of all rows."""

    row: Row
    history: list[np.ndarray] = field(default_factory=list)


class _Tokens(NamedTuple):
    """[N] each: new tokens, in order of rows and positions."""

    row: np.ndarray
    column: np.ndarray
    """Of the token that is replaced, or behind which another comes."""
    inserted: np.ndarray
    token: np.ndarray
    confidence: np.ndarray
    """Only where events are asked for."""


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
        self._state = State.of([], lm.spec.pad_token_id)
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
        check_row(row, self._vocabulary, self.lm.spec.mask_token_id)
        if not row.tokens or row.open[0]:
            raise ConfigError("a sequence begins with a token that stays: there is nothing to insert behind")
        row.config.require_only_edits()

    def cancel(self, key: int) -> Finished | None:
        """Takes a row out, waiting or active, between two steps. Others go on as if it had never been there.

        Returns:
            What it had come to. None: no such row is waiting or active.
        """
        for row in self._waiting:
            if row.key == key:
                self._waiting.remove(row)
                alone = State.of([row], self.lm.spec.pad_token_id)
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
        happened_RT3 = state.next_change(rates_RT3, one_step=self.lm.module.heads.time is not None)
        edits = self._tokens(hidden_RTH, happened_RT3)
        place_N = state.apply(happened_RT3, edits.token)
        done_R = state.done
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
        joined = State.of(new, self.lm.spec.pad_token_id)
        if self.trace:
            self._items += [_Item(row, [joined.text(number)]) for number, row in enumerate(new)]
        else:
            self._items += [_Item(row) for row in new]
        self._state = self._state.joined(joined)

    def _forward(self) -> tuple[Tensor, np.ndarray]:
        """What the token heads read, [R, T, H] on the device, and the rates [R, T, 3] on the host."""
        state, module, device = self._state, self.lm.module, self.lm.device
        ids_RT = torch.from_numpy(state.canvas).to(device)
        valid_RT = state.valid()
        hidden_RTH = module.hidden(ids_RT, None if valid_RT is None else torch.from_numpy(valid_RT).long().to(device))
        t_R = torch.from_numpy(state.time).to(device, torch.float32)
        hidden_RTH = module.heads.at_time(hidden_RTH, t_R)
        rates_RT3 = module.heads.rates_of(hidden_RTH, self.lm.spec.shift_logits).cpu().numpy()
        if np.isnan(rates_RT3).any():
            raise ModelError("the model's rates are not numbers (NaN): its weights or their dtype are broken")
        self.forwards += 1
        state.nfe += 1
        return hidden_RTH, rates_RT3

    def _tokens(self, hidden_RTH: Tensor, happened_RT3: np.ndarray) -> _Tokens:
        """The tokens of substitutions and insertions, in order of rows and positions."""
        row_N, column_N, kind_N = happened_RT3[:, :, [0, 2]].nonzero()
        inserted_N = kind_N == 1
        found = _Tokens(row_N, column_N, inserted_N, np.zeros_like(row_N), np.zeros(len(row_N), np.float32))
        if not len(row_N):
            return found
        module, device = self.lm.module, self.lm.device
        inserted = torch.from_numpy(inserted_N).to(device)
        source_N = module.source(torch.from_numpy(column_N).to(device), inserted)
        logits_NV = module.tokens(hidden_RTH[torch.from_numpy(row_N).to(device), source_N], inserted).float()
        kinds = self._alike(row_N)
        for config, members in kinds:
            logits = logits_NV if len(kinds) == 1 else logits_NV[torch.from_numpy(members).to(device)]
            suppress(logits, config.suppress_tokens)
            if config.eos_penalty:
                logits[:, list(self.lm.spec.stop_token_ids)] -= config.eos_penalty
            rules = self._rules(config, row_N[members], column_N[members], inserted_N[members])
            tokens = choose(logits, rules, self.lm.spec.mask_token_id)
            found.token[members] = tokens.cpu().numpy()
            if self.events:
                found.confidence[members] = probability(logits, tokens).cpu().numpy()
        return found

    def _alike(self, row_N: np.ndarray) -> list[tuple[SamplerConfig, np.ndarray]]:
        """Settings, and which of the N have them."""
        kinds: dict[tuple, tuple[SamplerConfig, list[int]]] = {}
        for number, item in enumerate(self._items):
            config = item.row.config
            of_tokens = (config.temperature, config.top_p, config.top_k, config.suppress_tokens, config.eos_penalty)
            kinds.setdefault(of_tokens, (config, []))[1].append(number)
        if len(kinds) == 1:
            return [(self._items[0].row.config, np.arange(len(row_N)))]
        found = [(config, np.flatnonzero(np.isin(row_N, rows))) for config, rows in kinds.values()]
        return [(config, members) for config, members in found if len(members)]

    def _rules(self, config: SamplerConfig, row_N: np.ndarray, column_N: np.ndarray, inserted_N: np.ndarray) -> Rules:
        """How tokens are chosen for some edits of equal settings."""
        if config.temperature == 0:
            return Rules()
        draws_N = self._state.draws(row_N, column_N, np.where(inserted_N, INSERTED, TOKEN))

        def all_of(value: float | int | None) -> Tensor | None:
            return None if value is None else torch.full((len(draws_N),), value, device=self.lm.device)

        return Rules(
            uniform_N=torch.from_numpy(draws_N).to(self.lm.device),
            temperature_N=all_of(float(config.temperature)),
            top_p_N=all_of(config.top_p),
            top_k_N=all_of(config.top_k),
        )

    def _commits(
        self, happened_RT3: np.ndarray, tokens: _Tokens, place_N: np.ndarray, done_R: np.ndarray
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

    def _result(self, state: State, number: int, item: _Item) -> Finished:
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
