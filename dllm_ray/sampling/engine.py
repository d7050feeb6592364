"""The step-wise denoising engine. It knows token ids and a model, never text, disk, Ray or HTTP.

Rows of different lengths, settings and progress share one batch: `admit` adds a row, `step` runs one forward for all
rows and commits tokens, finished rows leave and waiting ones take their place. Sampling, streaming, evaluation and
serving are loops around `step`.

Shapes: R active rows, T canvas width, N positions that may be committed now, V vocabulary.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.noise import ORDER, TOKEN, uniform
from dllm_ray.sampling.proposals import guide, probability, propose, suppress
from dllm_ray.sampling.unmasking import most_confident, quota_table


@dataclass
class Row:
    """One canvas to denoise."""

    tokens: list[int]
    """The canvas: given tokens, and any token where `open` is true."""
    open: list[bool]
    """Which positions are to be written."""
    config: SamplerConfig
    """The row's settings."""
    block_start: int
    """Where the first block begins."""
    block_size: int
    """Tokens in a block."""
    steps_per_block: int
    """Most denoising steps for a block."""
    seed: int
    """Seeds the row's own draws."""
    early_stop: bool
    """Whether the row is finished once its text can't change any more."""
    key: int = 0
    """The caller's name for the row."""


@dataclass
class Commit:
    """What one step wrote on one row."""

    row: int
    """The row's key."""
    step: int
    """The row's own step, counted from 0."""
    positions: list[int]
    """Canvas positions, in ascending order."""
    tokens: list[int]
    """The token written at each of them."""
    confidences: list[float]
    """The model's probability of each of them (a random number under the `random` policy)."""
    done: bool
    """Whether the row is finished."""


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
    """[nfe + 1, length], the canvas before the first and after every step, where the engine keeps a trace."""


@dataclass
class _Active:
    """A row's bookkeeping outside the batch tensors."""

    row: Row
    history: list[Tensor] = field(default_factory=list)


class Engine:
    """Denoises rows step by step.

    Args:
        lm: the model, in eval mode.
        max_rows: most rows in a batch; others wait. None: no limit.
        shift_logits: read logits one position to the left; None: as the model's spec says.
        trace: keep every row's canvas after each step.
        events: return what each step wrote (`step`); off saves the copies.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        max_rows: int | None = None,
        shift_logits: bool | None = None,
        trace: bool = False,
        events: bool = False,
    ):
        if lm.spec.mask_token_id is None:
            raise ModelError(
                f"{lm.spec.family} has no mask token (its noise is drawn from the whole vocabulary), so it can't be "
                "denoised by committing masked positions; lm.model.generate of transformers samples it"
            )
        self.lm = lm
        self.max_rows = max_rows
        self.shift_logits = shift_logits
        self.trace = trace
        self.events = events
        self.forwards = 0
        self._waiting: deque[Row] = deque()
        self._active: list[_Active] = []
        self._state: dict[str, Tensor] = {}  # [R] and [R, T] tensors, one row for each of `_active`
        self._configs: list[SamplerConfig] = []  # the distinct settings of the active rows
        self._finished: list[Finished] = []

    def admit(self, row: Row) -> None:
        """Queues a row; it joins the batch at the next step that has room. A row with nothing to write is finished.

        Raises:
            ConfigError: the row is longer than the model's context, or names a token that the model doesn't have.
        """
        limit = self.lm.max_length
        if limit is not None and len(row.tokens) > limit:
            raise ConfigError(
                f"a canvas of {len(row.tokens)} tokens (prompt and answer) doesn't fit the model's context of {limit}: "
                "shorten the prompt or lower max_new_tokens"
            )
        vocabulary = self.lm.model.get_input_embeddings().num_embeddings
        config = row.config
        for token in (*row.tokens, *config.suppress_tokens, *config.begin_suppress_tokens):
            if not 0 <= token < vocabulary:
                raise ConfigError(f"token {token} is outside the model's vocabulary of {vocabulary}")
        if any(row.open):
            self._waiting.append(row)
        else:
            history = torch.tensor([row.tokens]) if self.trace else None
            self._finished.append(Finished(row.key, row.tokens, nfe=0, history=history))

    @property
    def busy(self) -> bool:
        """Whether any row is active or waiting."""
        return bool(self._active or self._waiting)

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
        if not self._active:
            return []
        state = self._state
        self._begin_blocks()
        column_T = torch.arange(state["canvas"].shape[1], device=self.lm.device)
        candidate_RT = state["open"] & (column_T < state["block_end"].unsqueeze(1))
        positions_N = candidate_RT.flatten().nonzero().squeeze(1)
        row_N, column_N = positions_N // len(column_T), positions_N % len(column_T)

        logits_NV = self._logits(column_T, positions_N, row_N)
        tokens_N, confidence_N = self._propose(logits_NV, row_N, column_N)
        confidence_RT = torch.full_like(candidate_RT, -torch.inf, dtype=torch.float32)
        confidence_RT.view(-1)[positions_N] = confidence_N
        quota_R = state["quota"].gather(1, state["block_step"].unsqueeze(1)).squeeze(1)
        commit_RT = most_confident(confidence_RT, quota_R)
        proposed_RT = state["canvas"].clone()
        proposed_RT.view(-1)[positions_N] = tokens_N
        state["canvas"] = torch.where(commit_RT, proposed_RT, state["canvas"])
        state["open"] &= ~commit_RT
        state["block_step"] += 1
        state["step"] += 1
        self.forwards += 1

        done_R = self._done()
        commits = self._commits(commit_RT, confidence_RT, done_R) if self.events else []
        if self.trace:
            self._remember()
        self._retire(done_R)
        return commits

    def _join(self) -> None:
        room = len(self._waiting) if self.max_rows is None else self.max_rows - len(self._active)
        joining = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        if not joining:
            return
        new = [_Active(row) for row in joining]
        self._active += new
        width = max(len(item.row.tokens) for item in self._active)
        fresh = self._tensors(joining, width)
        if self._state:
            old = {name: self._widened(name, tensor, width) for name, tensor in self._state.items()}
            quotas = max(old["quota"].shape[1], fresh["quota"].shape[1])
            for part in (old, fresh):
                part["quota"] = torch.nn.functional.pad(part["quota"], (0, quotas - part["quota"].shape[1]))
            fresh = {name: torch.cat([old[name], fresh[name]]) for name in fresh}
        self._state = fresh
        self._index_configs()
        if self.trace:
            for index, item in enumerate(self._active[-len(new) :], start=len(self._active) - len(new)):
                item.history.append(self._state["canvas"][index, : len(item.row.tokens)].cpu())

    def _tensors(self, rows: list[Row], width: int) -> dict[str, Tensor]:
        device, spec = self.lm.device, self.lm.spec
        canvas = torch.full((len(rows), width), spec.eos_token_id)
        is_open = torch.zeros((len(rows), width), dtype=torch.bool)
        for index, row in enumerate(rows):
            canvas[index, : len(row.tokens)] = torch.tensor(row.tokens)
            is_open[index, : len(row.open)] = torch.tensor(row.open)
        length = torch.tensor([len(row.tokens) for row in rows])
        given = ~is_open & (torch.arange(width) < length.unsqueeze(1))
        for index, row in enumerate(rows):
            if row.config.cfg_keep_tokens:
                given[index] &= ~torch.isin(canvas[index], torch.tensor(row.config.cfg_keep_tokens))
        numbers = {
            "length": length,
            "block_start": torch.tensor([row.block_start for row in rows]),
            "block_size": torch.tensor([row.block_size for row in rows]),
            "block_end": torch.full((len(rows),), -1),
            "block_step": torch.zeros(len(rows), dtype=torch.long),
            "step": torch.zeros(len(rows), dtype=torch.long),
            "seed": torch.tensor([row.seed for row in rows]),
            "early_stop": torch.tensor([row.early_stop for row in rows]),
            "temperature": torch.tensor([float(row.config.temperature) for row in rows]),
            "cfg_scale": torch.tensor([float(row.config.cfg_scale) for row in rows]),
            "config": torch.zeros(len(rows), dtype=torch.long),
        }
        grids = {
            "canvas": torch.where(is_open, spec.mask_token_id, canvas),
            "open": is_open,
            "given": given,
            "written": is_open.clone(),  # the positions that early stop may look for an end of text
            "quota": torch.zeros((len(rows), 0), dtype=torch.long),
        }
        return {name: tensor.to(device) for name, tensor in (numbers | grids).items()}

    def _index_configs(self) -> None:
        """Numbers the distinct settings of the active rows; called when rows come or go."""
        self._configs = []
        numbers = []
        for item in self._active:
            if item.row.config not in self._configs:
                self._configs.append(item.row.config)
            numbers.append(self._configs.index(item.row.config))
        self._state["config"] = torch.tensor(numbers, device=self.lm.device)

    def _widened(self, name: str, tensor: Tensor, width: int) -> Tensor:
        fill = {"canvas": self.lm.spec.eos_token_id, "open": False, "given": False, "written": False}
        if name not in fill or tensor.shape[1] >= width:
            return tensor
        return torch.nn.functional.pad(tensor, (0, width - tensor.shape[1]), value=fill[name])

    def _begin_blocks(self) -> None:
        """Rows whose block is full move to the block of their first open position, with a new commit schedule."""
        state = self._state
        first_R = state["open"].int().argmax(dim=1)
        moved = (first_R >= state["block_end"]).nonzero().squeeze(1)
        if not len(moved):
            return
        start, size = state["block_start"][moved], state["block_size"][moved]
        end = start + ((first_R[moved] - start) // size + 1) * size
        end = torch.minimum(end, state["length"][moved])
        columns = torch.arange(state["open"].shape[1], device=end.device)
        masks = (state["open"][moved] & (columns < end.unsqueeze(1))).sum(dim=1).tolist()
        rows = [self._active[index].row for index in moved.tolist()]
        table = torch.from_numpy(
            quota_table(masks, [row.steps_per_block for row in rows], [row.config.schedule for row in rows])
        ).to(end.device)
        width = max(table.shape[1], state["quota"].shape[1])
        state["quota"] = torch.nn.functional.pad(state["quota"], (0, width - state["quota"].shape[1]))
        state["quota"][moved] = torch.nn.functional.pad(table, (0, width - table.shape[1]))
        state["block_end"][moved] = end
        state["block_step"][moved] = 0

    def _logits(self, column_T: Tensor, positions_N: Tensor, row_N: Tensor) -> Tensor:
        """[N, V] logits at the candidates, with classifier-free guidance for the rows that ask for it."""
        state = self._state
        canvas, length = state["canvas"], state["length"]
        guided = (state["cfg_scale"] > 0).nonzero().squeeze(1)
        if len(guided):
            unguided = torch.where(state["given"][guided], self.lm.spec.mask_token_id, canvas[guided])
            canvas = torch.cat([canvas, unguided])
            length = torch.cat([length, length[guided]])
            # the twin of candidate (row, column) sits in the row's copy below the batch
            twin_row = torch.full_like(state["length"], -1)
            twin_row[guided] = torch.arange(len(guided), device=canvas.device) + len(state["length"])
            has_twin = twin_row[row_N] >= 0
            twins = twin_row[row_N][has_twin] * len(column_T) + positions_N[has_twin] % len(column_T)
            wanted = torch.cat([positions_N, twins])
        else:
            wanted = positions_N
        attention_mask = column_T < length.unsqueeze(1)
        ragged = bool((length < len(column_T)).any())
        logits = self.lm.logits(
            canvas, attention_mask.long() if ragged else None, positions=wanted, shift=self.shift_logits
        )
        if len(guided):
            own = logits[: len(positions_N)]
            scale = state["cfg_scale"][row_N][has_twin]
            own[has_twin] = guide(own[has_twin], logits[len(positions_N) :], scale)
            return own
        return logits

    def _propose(self, logits_NV: Tensor, row_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
        """A token and a confidence for every candidate; the few settings that reshape logits go one by one."""
        state, mask_token = self._state, self.lm.spec.mask_token_id
        seed_N, step_N, temperature_N = (state[name][row_N] for name in ("seed", "step", "temperature"))
        warm = bool((temperature_N > 0).any())
        uniform_N = uniform(seed_N, step_N, column_N, TOKEN) if warm else None
        config_N = state["config"][row_N]
        groups = [(config, config_N == index) for index, config in enumerate(self._configs)]
        single = len(groups) == 1
        for config, members in groups:
            self._edit(logits_NV, config.suppress_tokens, None if single else members)
        # The mask token is no text: it can't be proposed, but keeps its share in the confidence of the others.
        mask_logit_N = logits_NV[:, mask_token].clone()
        logits_NV[:, mask_token] = -torch.inf
        tokens_N = propose(logits_NV, temperature_N, uniform_N)
        logits_NV[:, mask_token] = mask_logit_N
        for config, members in groups:
            self._edit(logits_NV, config.begin_suppress_tokens, None if single else members)
        confidence_N = probability(logits_NV, tokens_N)
        if bool(confidence_N.isnan().any()):
            raise ModelError("the model's logits are not numbers (NaN): its weights or their dtype are broken")
        if any(config.policy == "random" for config, _ in groups):
            order_N = uniform(seed_N, step_N, column_N, ORDER)
            for config, members in groups:
                if config.policy == "random":
                    confidence_N = torch.where(members, order_N, confidence_N)
        return tokens_N, confidence_N

    @staticmethod
    def _edit(logits_NV: Tensor, token_ids: tuple[int, ...], members: Tensor | None) -> None:
        if not token_ids:
            return
        if members is None:
            suppress(logits_NV, token_ids)
        else:
            part = logits_NV[members]
            suppress(part, token_ids)
            logits_NV[members] = part

    def _done(self) -> Tensor:
        """[R] bool: no open position left, or an end of text with nothing open before it."""
        state = self._state
        full_R = ~state["open"].any(dim=1)
        if not bool(state["early_stop"].any()):
            return full_R
        stops = torch.tensor(self.lm.spec.stop_token_ids, device=self.lm.device)
        stop_RT = torch.isin(state["canvas"], stops) & state["written"] & ~state["open"]
        never = state["canvas"].shape[1]
        columns = torch.arange(never, device=self.lm.device)
        first_stop = torch.where(stop_RT, columns, never).amin(dim=1)
        first_open = torch.where(state["open"], columns, never).amin(dim=1)
        return full_R | (state["early_stop"] & (first_stop < first_open))

    def _commits(self, commit_RT: Tensor, confidence_RT: Tensor, done_R: Tensor) -> list[Commit]:
        where, done = commit_RT.nonzero().cpu(), done_R.tolist()
        steps = (self._state["step"] - 1).tolist()
        tokens = self._state["canvas"][commit_RT].tolist()
        confidences = confidence_RT[commit_RT].tolist()
        commits = [
            Commit(item.row.key, steps[index], [], [], [], done[index]) for index, item in enumerate(self._active)
        ]
        for (row, column), token, confidence in zip(where.tolist(), tokens, confidences, strict=True):
            commits[row].positions.append(column)
            commits[row].tokens.append(token)
            commits[row].confidences.append(confidence)
        return commits

    def _remember(self) -> None:
        canvas = self._state["canvas"].cpu()
        for index, item in enumerate(self._active):
            item.history.append(canvas[index, : len(item.row.tokens)].clone())

    def _retire(self, done_R: Tensor) -> None:
        done = done_R.nonzero().squeeze(1).tolist()
        if not done:
            return
        state = self._state
        final = torch.where(state["open"], self.lm.spec.eos_token_id, state["canvas"])
        rows, nfe = final[done].tolist(), state["step"][done].tolist()
        for index, tokens, steps in zip(done, rows, nfe, strict=True):
            item = self._active[index]
            history = torch.stack(item.history) if self.trace else None
            self._finished.append(Finished(item.row.key, tokens[: len(item.row.tokens)], steps, history))
        keep = (~done_R).nonzero().squeeze(1)
        self._active = [self._active[index] for index in keep.tolist()]
        if not self._active:
            self._state = {}
            return
        self._state = {name: tensor[keep] for name, tensor in state.items()}
        width = max(len(item.row.tokens) for item in self._active)
        for name in ("canvas", "open", "given", "written"):
            self._state[name] = self._state[name][:, :width].contiguous()
        self._index_configs()
