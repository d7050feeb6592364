"""`Sampler`: denoises prompts in one call, on top of the step-wise engine."""

import dataclasses
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling import uniform_noise
from dllm_ray.sampling.batch import Row
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit, Engine, plan_for
from dllm_ray.sampling.noise import mix
from dllm_ray.sampling.output import OnCommit, SampleOutput, until_stop
from dllm_ray.sampling.plan import Plan

if TYPE_CHECKING:
    from dllm_ray.sampling.edit_flow import EditEngine


def engine_for(
    lm: DiffusionLM, max_rows: int | None = None, trace: bool = False, events: bool = False
) -> "Engine | EditEngine":
    """What denoises rows of a model step by step: arguments as of `Engine`."""
    if lm.spec.edit_heads is None:
        return Engine(lm, max_rows, trace, events)
    from dllm_ray.sampling.edit_flow import EditEngine  # with a compiler, which other models can do without

    return EditEngine(lm, max_rows, trace, events)


class Sampler:
    """Denoises prompts with one setting.

    Args:
        lm: the model.
        config: the settings; None: the model's own (`spec.sampler`), and the defaults of `SamplerConfig` for the rest.
        max_rows: most rows denoised together; the others follow as rows finish. None: all at once.
    """

    def __init__(self, lm: DiffusionLM, config: SamplerConfig | None = None, max_rows: int | None = None):
        self.lm = lm
        self.config = config or _own_settings(lm)
        self.max_rows = max_rows

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        trace: bool = False,
        seeds: Sequence[int] | None = None,
        on_commit: OnCommit | None = None,
    ) -> SampleOutput:
        """Continues each prompt with `max_new_tokens` tokens.

        Args:
            prompts: token ids; lengths may differ. A mask token in a prompt is text like any other.
            trace: keep every row's canvas after each step (`history`).
            seeds: one for each prompt; None: derived from `config.seed` and the prompt's place in the call.
            on_commit: called with what each step wrote on each row, as it happens.

        Raises:
            ConfigError: a prompt and its answer don't fit the model's context, or steps are fewer than blocks.
        """
        if self.is_uniform:
            seeds = self._seeds(len(prompts), seeds)
            return uniform_noise.generate(self.lm, self.config, prompts, seeds, trace, on_commit)
        rows = self._continuations(prompts, seeds)
        return self._run(rows, trace, on_commit, self._trim(self._new_tokens(prompts)))

    def infill(
        self,
        rows: Sequence[Sequence[int]],
        trace: bool = False,
        seeds: Sequence[int] | None = None,
        on_commit: OnCommit | None = None,
    ) -> SampleOutput:
        """Fills the mask tokens inside each row; everything else stays. Blocks are counted from each row's start.

        `steps` are divided over the blocks of the longest row of the call, so that they bound all of it; who cuts a job
        into calls gives `steps_per_block`, which doesn't depend on the other rows.

        Args:
            rows: token ids with mask tokens where text is wanted. `max_new_tokens` has no effect.
            trace: as in `sample`.
            seeds: as in `sample`.
            on_commit: as in `sample`.

        Returns:
            A `SampleOutput` whose `completions` hold the written tokens of each row, in order.
        """
        return self._run(self._gaps(rows, seeds), trace, on_commit, list)

    def edit(
        self,
        prompts: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]],
        trace: bool = False,
        seeds: Sequence[int] | None = None,
        on_commit: OnCommit | None = None,
    ) -> SampleOutput:
        """Revises drafts of answers in place, as only a model with edit heads can.

        Args:
            prompts: as in `sample`; with `edit_prompt` they are revised too.
            drafts: token ids, one list for each prompt; without end of text.
            trace, seeds, on_commit: as in `sample`.

        Raises:
            ConfigError: as `sample`; or the model has no edit heads.
        """
        return self._run(self._answers(prompts, drafts, seeds), trace, on_commit, self._trim(None))

    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None, infill: bool = False
    ) -> Iterator[Commit]:
        """Like `sample` (or `infill`), but yields what each step wrote on each row, as it happens."""
        if self.is_uniform and not infill:
            yield from uniform_noise.stream(self.lm, self.config, prompts, self._seeds(len(prompts), seeds))
            return
        engine = engine_for(self.lm, self.max_rows, events=True)
        for row in self.rows(prompts, seeds, infill):
            engine.admit(row)
        for row in engine.take_finished():  # nothing to write
            yield Commit(row.row, 0, [], [], [], done=True)
        while engine.busy:
            yield from engine.step()

    def canvases(self, prompts: Sequence[Sequence[int]], infill: bool = False) -> list[list[int]]:
        """The canvases that `sample` (or `infill`) begins with: what is given, and mask tokens."""
        if self.is_uniform and not infill:
            return uniform_noise.canvases(self.lm, self.config, prompts)
        return [row.tokens for row in self.rows(prompts, None, infill)]

    def rows(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None, infill: bool = False
    ) -> list[Row]:
        """What `sample` (or `infill`) gives the engine, one row for each prompt; their keys are 0, 1, 2, ..."""
        return self._gaps(prompts, seeds) if infill else self._continuations(prompts, seeds)

    @property
    def is_uniform(self) -> bool:
        """Whether the model's noise is drawn from the whole vocabulary: transformers' own generation samples it."""
        return self.lm.spec.mask_token_id is None and hasattr(self.lm.model.config, "canvas_length")

    @property
    def edits(self) -> bool:
        """Whether the model edits: sequences change their lengths."""
        return self.lm.spec.edit_heads is not None

    def _answers(
        self,
        prompts: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[int]] | None,
        seeds: Sequence[int] | None,
    ) -> list[Row]:
        """Rows of a model that edits. Without a draft an answer begins with `start_tokens` masks."""
        if not self.edits:
            raise ConfigError("the model has no edit heads: only one that was trained with edit_flow revises a draft")
        config, spec = self.config, self.lm.spec
        config.require_only_edits()
        _check_rows(prompts)
        first = spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id
        prompts = [list(prompt) or [first] for prompt in prompts]
        new = self._new_tokens(prompts)
        if drafts is None:
            drafts = [[spec.mask_token_id] * config.start_tokens] * len(prompts)
        _check_rows(drafts)
        if len(drafts) != len(prompts):
            raise ConfigError(f"{len(drafts)} drafts for {len(prompts)} prompts; expected one for each", "drafts")
        rows = []
        for key, (prompt, draft, seed) in enumerate(
            zip(prompts, drafts, self._seeds(len(prompts), seeds), strict=True)
        ):
            open_prompt = [config.edit_prompt and place > 0 for place in range(len(prompt))]
            rows.append(
                Row(
                    tokens=prompt + list(draft),
                    open=open_prompt + [True] * len(draft),
                    config=config,
                    block_start=len(prompt),
                    block_size=new,
                    steps_per_block=config.steps,
                    seed=seed,
                    early_stop=False,
                    key=key,
                    longest=self._longest(len(prompt), max(new, len(draft))),
                    gates=((len(prompt) - 1, max(new, len(draft))),),
                )
            )
        return rows

    def _longest(self, prompt: int, new: int) -> int:
        """Most tokens of a row: prompts that are edited may become twice as long, where the model has room."""
        if not self.config.edit_prompt:
            return prompt + new
        return max(prompt + new, min(2 * prompt + new, self.lm.max_length or 2 * prompt + new))

    def _trim(self, new: int | None) -> Callable[[list[int]], list[int]]:
        """What is left of an answer: up to an end of text, and `new` tokens at most; no masks that a model that edits
        has left behind."""
        mask = self.lm.spec.mask_token_id if self.edits else None
        return lambda tokens: [
            token for token in until_stop(tokens[:new], self.lm.spec.stop_token_ids) if token != mask or mask is None
        ]

    def _require_mask(self) -> None:
        if self.is_uniform:
            raise ModelError(f"{self.lm.spec.family} has no mask token, so nothing can be filled in: give it a prompt")
        if self.lm.spec.mask_token_id is None:
            raise ModelError(
                f"this {self.lm.spec.family} has no mask token, which denoising starts from: load it as a diffusion "
                "model (dllm_ray.load), or convert it with jobs/convert.py"
            )

    def _continuations(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Row]:
        if self.edits:
            return self._answers(prompts, None, seeds)
        self._require_mask()
        plan = plan_for(self.lm, self.config)
        _check_rows(prompts)
        prompts = [list(prompt) or self._empty_prompt(plan) for prompt in prompts]
        new = self._new_tokens(prompts)
        rows = []
        for key, (prompt, seed) in enumerate(zip(prompts, self._seeds(len(prompts), seeds), strict=True)):
            start, block, steps, length = self._layout(plan, len(prompt), new)
            row = Row(
                tokens=prompt + [self.lm.spec.mask_token_id] * (length - len(prompt)),
                open=[False] * len(prompt) + [True] * (length - len(prompt)),
                config=self.config,
                block_start=start,
                block_size=block,
                steps_per_block=steps,
                seed=seed,
                early_stop=self.config.eos_early_stop,
                key=key,
            )
            rows.append(row)
        return rows

    def _new_tokens(self, prompts: Sequence[Sequence[int]]) -> int:
        _check_rows(prompts)
        config, longest = self.config, max(map(len, prompts), default=0)
        if config.max_new_tokens is not None:
            return config.max_new_tokens
        new = config.max_length - longest
        if new < 1:
            raise ConfigError(f"{config.max_length} leaves no room beside a prompt of {longest}", "max_length")
        return new

    def _layout(self, plan: Plan, prompt: int, new: int) -> tuple[int, int, int, int]:
        """Where the first block begins, the size of a block, most steps for each, and the length of the canvas."""
        config = self.config
        if self.lm.spec.grid is None:
            size, steps = config.blocks(new) if plan.has_blocks else (new, config.steps_in_block(1))
            return prompt, size, steps, prompt + new
        # The model's own grid starts at position 0: the end of the prompt shares its block with the first new tokens.
        size = self._grid(plan)
        first, blocks = prompt // size, -(-(prompt + new) // size)
        length = prompt + new
        if plan.by_certainty:  # LLaDA2's last block is a whole one; the answer is cut afterwards
            length = max(min(blocks * size, self.lm.max_length or blocks * size), length)
        return first * size, size, config.steps_in_block(blocks - first), length

    def _grid(self, plan: Plan) -> int:
        """Block size of a model with block-causal attention."""
        own, asked = self.lm.spec.grid, self.config.block_size
        if asked is not None and own % asked and not plan.by_certainty:
            raise ConfigError(
                f"{asked} doesn't divide the {own} positions of a block of this model's attention", "block_size"
            )
        return asked or own

    def _gaps(self, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Row]:
        if self.edits:
            return self._edited_gaps(rows, seeds)
        self._require_mask()
        _check_rows(rows)
        plan, longest = plan_for(self.lm, self.config), max(map(len, rows), default=0)
        if self.lm.spec.grid is not None:
            block = self._grid(plan)
        else:
            block = (self.config.block_size if plan.has_blocks else None) or max(longest, 1)
        # Counted over the longest row, so that `steps` bounds the whole call; steps_per_block is each row's own.
        steps = self.config.steps_in_block(max(-(-longest // block), 1))
        mask = self.lm.spec.mask_token_id
        return [
            Row(
                tokens=list(tokens),
                open=[token == mask for token in tokens],
                config=self.config,
                block_start=0,
                block_size=block,
                steps_per_block=steps,
                seed=seed,
                early_stop=False,
                key=key,
            )
            for key, (tokens, seed) in enumerate(zip(rows, self._seeds(len(rows), seeds), strict=True))
        ]

    def _edited_gaps(self, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Row]:
        """Rows of a model that edits, whose gaps begin with up to `start_tokens` of their masks each."""
        self.config.require_only_edits()
        if self.config.edit_prompt:
            raise ConfigError("what is around a gap stays as it is: leave it out", "edit_prompt")
        _check_rows(rows)
        mask, made = self.lm.spec.mask_token_id, []
        for key, (tokens, seed) in enumerate(zip(rows, self._seeds(len(rows), seeds), strict=True)):
            if not tokens or tokens[0] == mask:
                raise ConfigError("a gap at the beginning has no token that anything could be inserted behind")
            is_mask = np.array(tokens) == mask
            begins = is_mask & ~np.roll(is_mask, 1)
            place = np.arange(len(tokens))
            run = place - np.maximum.accumulate(np.where(begins, place, 0))  # places since the gap began
            kept = ~is_mask | (run < self.config.start_tokens)
            gates = kept.cumsum()[place[begins] - 1] - 1
            sizes = np.bincount(begins.cumsum()[is_mask], minlength=1)[1:]
            made.append(
                Row(
                    tokens=np.array(tokens)[kept].tolist(),
                    open=is_mask[kept].tolist(),
                    config=self.config,
                    block_start=0,
                    block_size=max(len(tokens), 1),
                    steps_per_block=self.config.steps,
                    seed=seed,
                    early_stop=False,
                    key=key,
                    longest=len(tokens),
                    gates=tuple(zip(gates.tolist(), sizes.tolist(), strict=True)),
                )
            )
        return made

    def _run(
        self, rows: list[Row], trace: bool, on_commit: OnCommit | None, trim: Callable[[list[int]], list[int]]
    ) -> SampleOutput:
        began = time.perf_counter()
        engine = engine_for(self.lm, self.max_rows, trace=trace, events=trace or on_commit is not None)
        commits: dict[int, list[Commit]] = {row.key: [] for row in rows}
        for row in rows:
            engine.admit(row)
        while engine.busy:
            for commit in engine.step():
                commits[commit.row].append(commit)
                if on_commit is not None:
                    on_commit(commit)
        finished = {item.row: item for item in engine.take_finished()}
        done = [finished[row.key] for row in rows]
        return SampleOutput(
            sequences=[item.tokens for item in done],
            completions=[
                trim([token for token, written in zip(item.tokens, item.answer or row.open, strict=True) if written])
                for row, item in zip(rows, done, strict=True)
            ],
            row_nfe=[item.nfe for item in done],
            nfe=engine.forwards,
            seconds=time.perf_counter() - began,
            history=[item.history for item in done] if trace else None,
            commits=[commits[row.key] for row in rows] if trace else None,
        )

    def _empty_prompt(self, plan: Plan) -> list[int]:
        """Shifted logits need a left neighbour for the first token; otherwise an empty prompt stays empty."""
        spec = self.lm.spec
        if not plan.shift:
            return []
        return [spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id]

    def _seeds(self, count: int, seeds: Sequence[int] | None) -> list[int]:
        if seeds is not None:
            if len(seeds) != count:
                raise ConfigError(f"{len(seeds)} seeds for {count} rows; expected one for each", "seeds")
            return list(seeds)
        return row_seeds(self.config.seed, range(count))


def _check_rows(rows: Sequence[Sequence[int]]) -> None:
    for row in rows:
        if isinstance(row, str) or not hasattr(row, "__len__"):
            raise ConfigError(f"expected a list of token ids for each prompt, got {row!r:.40}")


def _own_settings(lm: DiffusionLM) -> SamplerConfig:
    known = {field.name for field in dataclasses.fields(SamplerConfig)}
    unknown = sorted(set(lm.spec.sampler) - known)
    if unknown:
        raise ModelError(f"the model's own sampler settings name {unknown[0]!r}, which is none: see SamplerConfig")
    return SamplerConfig(**lm.spec.sampler)


def row_seeds(seed: int | None, indices: Sequence[int]) -> list[int]:
    """Seeds of the rows with these indices in a larger job; None draws a base seed."""
    base = secrets.randbits(62) if seed is None else seed
    return mix(base, torch.tensor(list(indices), dtype=torch.long)).tolist()
