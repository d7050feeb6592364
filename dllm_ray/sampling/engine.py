"""The step-wise denoising engine. It knows token ids and a model, never text, disk, Ray or HTTP.

Rows of different lengths, settings, caches and progress share one batch: `admit` adds a row, `step` runs one forward
for all rows and commits tokens, finished rows leave and waiting ones take their place. Sampling, streaming, evaluation
and serving are loops around `step`.

Bookkeeping is a few numbers for each position and stays on the host (`batch.py`); the device sees token ids and gives
back a token and a confidence for each candidate. So a step costs one transfer each way.

Shapes: R active rows, N candidates (positions that may be written now), B rows of a forward, W the positions of each
that it computes, K those that it sees, V vocabulary.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.batch import Batch, Item, Row, Windows
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.kv_cache import CanvasCache, keeps
from dllm_ray.sampling.noise import TOKEN
from dllm_ray.sampling.plan import Plan
from dllm_ray.sampling.proposals import Rules, guide, propose, suppress

__all__ = ["Commit", "Edit", "Engine", "Finished", "Row"]


class Edit(NamedTuple):
    """One change of a sequence."""

    kind: Literal["insert", "delete", "substitute"]
    position: int
    """On the sequence before the step: of the token that goes, or behind which another comes."""
    token: int | None
    """The new one; None where one is deleted."""


@dataclass
class Commit:
    """What one step wrote on one row."""

    row: int
    """The row's key."""
    step: int
    """The row's own step, counted from 0."""
    positions: list[int]
    """Canvas positions, in ascending order. A position may be written again where the policy revises tokens."""
    tokens: list[int]
    """The token written at each of them."""
    confidences: list[float]
    """What the policy measures of each of them: a probability, a margin, or a negative entropy."""
    done: bool
    """Whether the row is finished."""
    edits: Sequence[Edit] = ()
    """What a model that edits changed, from left to right; `positions` and `tokens` are then those of the new tokens on
    the sequence that came of it."""


@dataclass
class Finished:
    """A row that is done."""

    row: int
    """The row's key."""
    tokens: list[int]
    """The whole canvas; positions that early stop left open hold the end-of-text token."""
    nfe: int
    """Forwards the row took part in."""
    history: Tensor | None = None
    """[steps + 1, length], the canvas before the first and after every step, where the engine keeps a trace. Steps
    that commit nothing by their schedule need no forward. Where a model edits, length is the greatest that the row had,
    and -1 stands behind the end."""
    answer: list[bool] | None = None
    """Of a model that edits: which tokens are the answer's. None: those that were open."""


def plan_for(lm: DiffusionLM, config: SamplerConfig) -> Plan:
    """What the settings come to on a model.

    Raises:
        ConfigError: they don't fit it.
    """
    return Plan(config, lm.spec, takes_cache=config.cache == "none" or keeps(lm))


def check_row(row: Row, vocabulary: int, mask_token_id: int) -> None:
    """Makes sure that a row's numbers are such as a model has, whatever denoises it.

    Args:
        row: the row.
        vocabulary: tokens that the model knows.
        mask_token_id: the one that is no text.

    Raises:
        ConfigError: it names a token that the model doesn't have, or suppresses all, or its seed is too large.
    """
    config = row.config
    for tokens in (row.tokens, config.suppress_tokens, config.begin_suppress_tokens, config.cfg_keep_tokens):
        if not all(isinstance(token, Integral) for token in tokens):
            raise ConfigError("expected token ids, a list of whole numbers for each row")
        for token in (min(tokens), max(tokens)) if tokens else ():
            if not 0 <= token < vocabulary:
                raise ConfigError(f"token {token} is outside the model's vocabulary of {vocabulary}")
    if len({*config.suppress_tokens, mask_token_id}) >= vocabulary:
        raise ConfigError("leaves no token to write with", "suppress_tokens")
    if not -(2**63) <= row.seed < 2**63:
        raise ConfigError(f"a row's seed must fit 64 bits, got {row.seed}", "seed")


class Engine:
    """Denoises rows step by step.

    Args:
        lm: the model, in eval mode.
        max_rows: most rows in a batch; others wait. None: no limit.
        trace: keep every row's canvas after each step.
        events: return what each step wrote (`step`); off saves the copies.
    """

    def __init__(self, lm: DiffusionLM, max_rows: int | None = None, trace: bool = False, events: bool = False):
        if lm.spec.mask_token_id is None:
            raise ModelError(
                f"{lm.spec.family} has no mask token (its noise is drawn from the whole vocabulary), so it can't be "
                "denoised by committing masked positions; Sampler hands it to the generation of transformers"
            )
        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"must be at least 1, got {max_rows}", "max_rows")
        self.lm = lm
        self.max_rows = max_rows
        self.trace = trace
        self.events = events
        self.forwards = 0
        self._vocabulary = lm.model.get_input_embeddings().num_embeddings
        self._cache: CanvasCache | None = None
        self._slots = 0  # of the cache, for rows; the twins of guided rows have as many after them
        self._has_twins = False
        self._is_encoder = not lm.is_decoder
        self._waiting: deque[tuple[Row, Plan]] = deque()
        self._batch = Batch(lm.spec, self._vocabulary)
        self._plans: deque[Plan] = deque(maxlen=64)  # those asked for lately: rows of equal settings share one
        self._finished: list[Finished] = []

    def admit(self, row: Row) -> None:
        """Queues a row; it joins the batch at the next step that has room. A row with nothing to write is finished.

        Raises:
            ConfigError: the row is longer than the model's context, names a token that the model doesn't have, or asks
                for a cache that the model can't use.
        """
        self.check(row)
        plan = self._plan(row.config)
        if any(row.open):
            self._waiting.append((row, plan))
        else:
            history = torch.tensor([row.tokens]) if self.trace else None
            self._finished.append(Finished(row.key, row.tokens, nfe=0, history=history))

    def check(self, row: Row) -> None:
        """Makes sure that a row can be admitted. Reads nothing that steps change: any thread may ask.

        Raises:
            ConfigError: as `admit`.
        """
        limit = self.lm.max_length
        if limit is not None and len(row.tokens) > limit:
            raise ConfigError(
                f"a canvas of {len(row.tokens)} tokens (prompt and answer) doesn't fit the model's context of {limit}: "
                "shorten the prompt or lower max_new_tokens"
            )
        check_row(row, self._vocabulary, self.lm.spec.mask_token_id)
        plan_for(self.lm, row.config)

    @torch.inference_mode()  # the cache is made of tensors of this kind
    def cancel(self, key: int) -> Finished | None:
        """Takes a row out, waiting or active, between two steps. Others go on as if it had never been there.

        Returns:
            What it had come to; positions that are still open hold the end-of-text token. None: no such row is waiting
            or active.
        """
        for index, (row, _) in enumerate(self._waiting):
            if row.key == key:
                del self._waiting[index]
                history = torch.from_numpy(self._batch.opened(row)[None]) if self.trace else None
                tokens = [
                    self.lm.spec.eos_token_id if is_open else token
                    for token, is_open in zip(row.tokens, row.open, strict=True)
                ]
                return Finished(key, tokens, nfe=0, history=history)
        for place, item in enumerate(self._batch.items):
            if item.row.key == key:
                come_to = self._result(place)
                gone_R = np.zeros(len(self._batch), np.bool_)
                gone_R[place] = True
                self._release(gone_R)
                return come_to
        return None

    @property
    def busy(self) -> bool:
        """Whether any row is active or waiting."""
        return bool(self._batch or self._waiting)

    def take_finished(self) -> list[Finished]:
        """Rows that became done since the last call."""
        done, self._finished = self._finished, []
        return done

    @torch.inference_mode()
    def step(self) -> list[Commit]:
        """One forward for all active rows; commits tokens and lets finished rows go.

        Returns:
            What was written on each row, when the engine was made with `events`; else an empty list.

        Raises:
            ModelError: the model gives NaN.
        """
        self._join()
        batch = self._batch
        if not batch:
            return []
        batch.begin_blocks()
        row_N, column_N = batch.candidates()
        tokens_N, confidence_N = self._forward(row_N, column_N)
        open_N = batch.state["open"][row_N, column_N]
        commit_N = np.zeros_like(open_N)
        commit_N[open_N] = batch.choose(row_N[open_N], column_N[open_N], confidence_N[open_N])
        if not open_N.all():
            commit_N |= batch.revised(open_N, row_N, column_N, tokens_N, confidence_N)
        batch.write(row_N[commit_N], column_N[commit_N], tokens_N[commit_N], open_N[commit_N])

        done_R = batch.done()
        commits = []
        if self.events:
            commits = self._commits(row_N[commit_N], column_N[commit_N], confidence_N[commit_N], done_R)
        if self.trace:
            for place, item in enumerate(batch.items):
                item.history.append(batch.state["canvas"][place, : len(item.row.tokens)].copy())
        if done_R.any():
            self._retire(done_R)
        return commits

    def _plan(self, config: SamplerConfig) -> Plan:
        for plan in self._plans:
            if plan.config == config:
                return plan
        self._plans.append(plan_for(self.lm, config))
        return self._plans[-1]

    def _join(self) -> None:
        room = len(self._waiting) if self.max_rows is None else self.max_rows - len(self._batch)
        new = [Item(*self._waiting.popleft()) for _ in range(min(room, len(self._waiting)))]
        if not new:
            return
        if self.trace:
            for item in new:
                item.history.append(self._batch.opened(item.row))
        self._batch.join(new)
        if any(item.plan.cached for item in new):
            self._reserve()

    def _reserve(self) -> None:
        """Room in the cache: a slot for each row, and where rows are guided, as many again for their twins."""
        if self._cache is None:
            self._cache = CanvasCache(self.lm.layers)
        before, had_twins = self._slots, self._has_twins
        if len(self._batch) > before:  # doubled, or rows that come one by one would copy what is kept each time
            self._slots = self.max_rows or max(len(self._batch), 2 * before)
        self._has_twins = had_twins or bool((self._batch.state["cfg_scale"] > 0).any())
        self._cache.reserve(self._slots * (2 if self._has_twins else 1), self._batch.width)
        if had_twins and before < self._slots:
            twins = torch.arange(before, device=self.lm.device)
            self._cache.move(twins + before, twins + self._slots)

    def _forward(self, row_N: np.ndarray, column_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A token and a confidence for each candidate."""
        tokens_N, confidence_N = np.zeros(len(row_N), np.int64), np.zeros(len(row_N), np.float32)
        if not len(row_N):
            return tokens_N, confidence_N
        batch, windows = self._batch, self._batch.windows()
        takes_part = np.zeros(len(batch), np.bool_)
        takes_part[row_N] = True
        results = []
        for rows in batch.alike(np.flatnonzero(takes_part), windows.stop - windows.start):
            local_R = np.full(len(batch), -1)
            local_R[rows] = np.arange(len(rows))
            places = np.flatnonzero(local_R[row_N] >= 0)
            part = Windows(windows.start[rows], windows.stop[rows], windows.keys[rows], windows.block[rows])
            logits = self._logits(rows, part, local_R[row_N[places]], column_N[places])
            results.append((places, *self._propose(logits, row_N[places], column_N[places])))
        for places, tokens, confidence in results:
            tokens_N[places], confidence_N[places] = tokens.cpu().numpy(), confidence.cpu().numpy()
        if np.isnan(confidence_N).any():
            raise ModelError("the model's logits are not numbers (NaN): its weights or their dtype are broken")
        batch.computed(takes_part, windows.block)
        self.forwards += 1
        return tokens_N, confidence_N

    def _logits(
        self,
        rows: np.ndarray,  # [B]
        window: Windows,  # [B] each
        local_N: np.ndarray,  # [N] candidates' places in `rows`
        column_N: np.ndarray,
    ) -> Tensor:  # [N, V]
        """One forward, with the unguided twins of rows under classifier-free guidance below the rows."""
        state, device = self._batch.state, self.lm.device
        start, keys = window.start, window.keys
        width, seen = int((window.stop - start).max()), int(keys.max())
        column_BW = start[:, None] + np.arange(width)
        filler_BW = column_BW >= window.stop[:, None]
        column_BW = np.minimum(column_BW, self._batch.width - 1)
        ids_BW = state["canvas"][rows[:, None], column_BW]
        source_N = np.maximum(column_N - state["shift"][rows][local_N], start[local_N])
        flat_N = local_N * width + source_N - start[local_N]

        entries, slots = np.arange(len(rows)), rows
        scale_B = state["cfg_scale"][rows]
        guided = np.flatnonzero(scale_B > 0)
        has_twin = scale_B[local_N] > 0
        if len(guided):
            hidden = state["given"][rows[guided, None], column_BW[guided]]
            ids_BW = np.concatenate([ids_BW, np.where(hidden, self.lm.spec.mask_token_id, ids_BW[guided])])
            entries = np.concatenate([entries, guided])
            slots = np.concatenate([rows, rows[guided] + self._slots])
            twin = np.cumsum(scale_B > 0) - 1 + len(rows)
            flat_N = np.concatenate(
                [flat_N, flat_N[has_twin] + (twin - np.arange(len(rows)))[local_N[has_twin]] * width]
            )

        column_BW, filler_BW, keys = column_BW[entries], filler_BW[entries], keys[entries]
        causal = bool(state["grid_size"][rows[0]])
        cached = bool(state["cached"][rows[0]])
        ids = torch.from_numpy(ids_BW).to(device)
        positions = torch.from_numpy(flat_N).to(device)
        arguments: dict = {"positions": positions, "shift": False}
        column = None
        if cached:
            column = torch.from_numpy(column_BW).to(device)
            everything = width == seen and not start.any()
            self._cache.window(
                torch.from_numpy(slots).to(device),
                column,
                torch.from_numpy(filler_BW).to(device),
                keys=seen,
                everything=everything,
                first=bool((slots == np.arange(len(slots))).all()),
            )
            arguments |= {"past_key_values": self._cache, "position_ids": column}
        ragged = bool((keys < seen).any())
        # without a mask everything would be seen; but an encoder's local layers see as far as they do unless told
        if causal and (ragged or not cached or self._is_encoder or bool((start < window.block).any())):
            arguments["attention_mask"] = self._block_mask(rows[entries], column_BW, keys, seen)
        elif ragged:
            seen_BK = torch.from_numpy(np.arange(seen) < keys[:, None]).to(device)
            arguments["attention_mask"] = seen_BK[:, None, None] if cached else seen_BK.long()
        logits = self.lm.logits(ids, **arguments)
        if not len(guided):
            return logits
        own, unguided = logits[: len(local_N)], logits[len(local_N) :]
        scale = torch.from_numpy(scale_B[local_N[has_twin]]).to(device)
        where = torch.from_numpy(has_twin).to(device)
        own[where] = guide(own[where], unguided, scale)
        return own

    def _block_mask(self, rows: np.ndarray, column_BW: np.ndarray, keys: np.ndarray, seen: int) -> Tensor:
        """[B, 1, W, K] true where a position's block is that of a key or a later one."""
        state, device = self._batch.state, self.lm.device
        start, size, keys, column_BW = (
            torch.from_numpy(values).to(device)
            for values in (state["grid_start"][rows], state["grid_size"][rows], keys, column_BW)
        )
        column_K = torch.arange(seen, device=device)
        query_BW = (column_BW - start[:, None]).div(size[:, None], rounding_mode="floor")
        key_BK = (column_K - start[:, None]).div(size[:, None], rounding_mode="floor")
        visible = (key_BK[:, None] <= query_BW[:, :, None]) & (column_K < keys[:, None])[:, None]
        return visible[:, None]

    def _propose(self, logits_NV: Tensor, row_N: np.ndarray, column_N: np.ndarray) -> tuple[Tensor, Tensor]:
        """A token and a confidence for every candidate; plans that read logits differently go one by one."""
        number_N = self._batch.state["plan"][row_N]
        kinds: dict[tuple, list[int]] = {}
        for number in np.flatnonzero(np.bincount(number_N)):
            kinds.setdefault(self._batch.plans[number].proposal, []).append(int(number))
        if len(kinds) == 1:
            return self._propose_alike(logits_NV, self._batch.plans[number_N[0]], row_N, column_N)
        tokens = torch.empty(len(row_N), dtype=torch.long, device=logits_NV.device)
        confidence = torch.empty(len(row_N), device=logits_NV.device)
        for numbers in kinds.values():
            chosen = np.isin(number_N, numbers)
            where = torch.from_numpy(chosen.nonzero()[0]).to(logits_NV.device)
            part = self._propose_alike(logits_NV[where], self._batch.plans[numbers[0]], row_N[chosen], column_N[chosen])
            tokens[where], confidence[where] = part
        return tokens, confidence

    def _propose_alike(
        self, logits_NV: Tensor, plan: Plan, row_N: np.ndarray, column_N: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        config, state, spec = plan.config, self._batch.state, self.lm.spec
        device = logits_NV.device
        if config.eos_penalty:
            logits_NV[:, list(spec.stop_token_ids)] -= config.eos_penalty
        suppress(logits_NV, config.suppress_tokens)

        def each(values_R: np.ndarray) -> Tensor:
            return torch.from_numpy(values_R[row_N]).to(device)

        rules = Rules(plan.confidence, top_k_first=plan.by_certainty)
        if config.temperature > 0:
            rules.uniform_N = torch.from_numpy(self._batch.draws(row_N, column_N, TOKEN)).to(device)
            rules.temperature_N = each(state["temperature"])
        top_p, top_k = plan.filters
        if top_p is not None:
            rules.top_p_N = each(state["top_p"])
        if top_k is not None:
            rules.top_k_N = each(state["top_k"])
        return propose(logits_NV, rules, spec.mask_token_id, config.begin_suppress_tokens)

    def _commits(
        self, row_C: np.ndarray, column_C: np.ndarray, confidence_C: np.ndarray, done_R: np.ndarray
    ) -> list[Commit]:
        tokens_C = self._batch.state["canvas"][row_C, column_C]
        cuts = np.searchsorted(row_C, np.arange(1, len(self._batch)))
        parts = [np.split(values, cuts) for values in (column_C, tokens_C, confidence_C)]
        return [
            Commit(item.row.key, int(step) - 1, *(part.tolist() for part in written), bool(done))
            for item, step, written, done in zip(
                self._batch.items, self._batch.state["step"], zip(*parts, strict=True), done_R, strict=True
            )
        ]

    def _retire(self, done_R: np.ndarray) -> None:
        """Takes finished rows out."""
        self._finished += [self._result(place) for place in np.flatnonzero(done_R)]
        self._release(done_R)

    def _result(self, place: int) -> Finished:
        """What a row has come to."""
        batch, item = self._batch, self._batch.items[place]
        history = torch.from_numpy(np.stack(item.history)) if self.trace else None
        return Finished(item.row.key, batch.text(place), int(batch.state["nfe"][place]), history)

    def _release(self, gone_R: np.ndarray) -> None:
        """Frees the places of rows; rows from the end fill them, so that the cache's slots stay together."""
        batch = self._batch
        count = int((~gone_R).sum())
        holes, movers = np.flatnonzero(gone_R[:count]), np.flatnonzero(~gone_R[count:]) + count
        is_cached = batch.state["cached"][movers]
        if is_cached.any():
            source, target = movers[is_cached], holes[is_cached]
            if self._has_twins:
                source, target = (np.concatenate([slots, slots + self._slots]) for slots in (source, target))
            self._cache.move(*(torch.from_numpy(slots).to(self.lm.device) for slots in (source, target)))
        order = np.arange(count)
        order[holes] = movers
        batch.keep(order)
