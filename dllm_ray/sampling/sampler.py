"""`Sampler`: denoises prompts in one call, on top of the step-wise engine."""

import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.engine import Commit, Engine, Row
from dllm_ray.sampling.noise import mix


@dataclass
class SampleOutput:
    """What a call of the sampler made, in the order of its inputs."""

    sequences: list[list[int]]
    """Prompt and every generated token, untrimmed."""
    completions: list[list[int]]
    """Generated tokens up to, and without, the first end-of-text or end-of-turn token."""
    row_nfe: list[int]
    """Forwards each row took part in."""
    nfe: int
    """Forwards of the model; rows in one batch share them."""
    seconds: float
    """Wall time."""
    history: list[Tensor] | None
    """[steps of the row + 1, length of the row] each, when asked for."""
    commits: list[list[Commit]] | None = None
    """What each step wrote on each row, when asked for."""

    def figures(self) -> dict[str, float]:
        """For records: forwards summed over rows, tokens per forward, tokens per second."""
        return {"nfe": float(sum(self.row_nfe)), "tpf": self.tpf, "tokens_per_s": self.tokens_per_s}

    @property
    def tpf(self) -> float:
        """Tokens per forward: tokens before the end of text over the forwards that their rows took part in."""
        return sum(map(len, self.completions)) / max(sum(self.row_nfe), 1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens before the end of text, over all rows, per second."""
        return sum(map(len, self.completions)) / max(self.seconds, 1e-9)


class Sampler:
    """Denoises prompts with one setting.

    Args:
        lm: the model.
        config: the settings; None: the model's own (`spec.sampler`), and the defaults of `SamplerConfig` for the rest.
        max_rows: most rows denoised together; the others follow as rows finish. None: all at once.
    """

    def __init__(self, lm: DiffusionLM, config: SamplerConfig | None = None, max_rows: int | None = None):
        self.lm = lm
        self.config = config or SamplerConfig(**lm.spec.sampler)
        self.max_rows = max_rows

    def sample(
        self, prompts: Sequence[Sequence[int]], trace: bool = False, seeds: Sequence[int] | None = None
    ) -> SampleOutput:
        """Continues each prompt with `max_new_tokens` tokens.

        Args:
            prompts: token ids; lengths may differ. A mask token in a prompt is text like any other.
            trace: keep every row's canvas after each step (`history`).
            seeds: one for each prompt; None: derived from `config.seed` and the prompt's place in the call.

        Raises:
            ConfigError: a prompt and its answer don't fit the model's context, or steps are fewer than blocks.
        """
        return self._run(self._continuations(prompts, seeds), trace, self._until_stop)

    def infill(
        self, rows: Sequence[Sequence[int]], trace: bool = False, seeds: Sequence[int] | None = None
    ) -> SampleOutput:
        """Fills the mask tokens inside each row; everything else stays. Blocks are counted from each row's start.

        Args:
            rows: token ids with mask tokens where text is wanted. `max_new_tokens` has no effect.
            trace: as in `sample`.
            seeds: as in `sample`.

        Returns:
            A `SampleOutput` whose `completions` hold the written tokens of each row, in order.
        """
        return self._run(self._gaps(rows, seeds), trace, list)

    def stream(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None, infill: bool = False
    ) -> Iterator[Commit]:
        """Like `sample` (or `infill`), but yields what each step wrote on each row, as it happens."""
        engine = Engine(self.lm, self.max_rows, self.config.shift_logits, events=True)
        for row in self._rows(prompts, seeds, infill):
            engine.admit(row)
        while engine.busy:
            yield from engine.step()

    def canvases(self, prompts: Sequence[Sequence[int]], infill: bool = False) -> list[list[int]]:
        """The canvases that `sample` (or `infill`) begins with: what is given, and mask tokens."""
        return [row.tokens for row in self._rows(prompts, None, infill)]

    def _rows(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None, infill: bool) -> list[Row]:
        return self._gaps(prompts, seeds) if infill else self._continuations(prompts, seeds)

    def _continuations(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Row]:
        config = self.config
        prompts = [list(prompt) or self._empty_prompt() for prompt in prompts]
        longest = max(map(len, prompts), default=0)
        new = config.max_new_tokens
        if new is None:
            new = config.max_length - longest
            if new < 1:
                raise ConfigError(f"{config.max_length} leaves no room beside a prompt of {longest}", "max_length")
        rows = []
        for key, (prompt, seed) in enumerate(zip(prompts, self._seeds(len(prompts), seeds), strict=True)):
            start, block, steps = self._blocks(len(prompt), new)
            row = Row(
                tokens=prompt + [self.lm.spec.mask_token_id] * new,
                open=[False] * len(prompt) + [True] * new,
                config=config,
                block_start=start,
                block_size=block,
                steps_per_block=steps,
                seed=seed,
                early_stop=config.eos_early_stop,
                key=key,
            )
            rows.append(row)
        return rows

    def _blocks(self, prompt: int, new: int) -> tuple[int, int, int]:
        """Where the first block of an answer begins, the size of a block, and most steps for each."""
        spec, config = self.lm.spec, self.config
        if spec.grid is None:
            return prompt, *config.blocks(new)
        # The model's own grid starts at position 0: the end of the prompt shares its block with the first new tokens.
        size = self._grid()
        first = prompt // size
        return first * size, size, config.steps_in_block(-(-(prompt + new) // size) - first)

    def _grid(self) -> int:
        """Block size of a model with block-causal attention."""
        own, asked = self.lm.spec.grid, self.config.block_size
        if asked is not None and own % asked:
            raise ConfigError(
                f"{asked} doesn't divide the {own} positions of a block of this model's attention", "block_size"
            )
        return asked or own

    def _gaps(self, rows: Sequence[Sequence[int]], seeds: Sequence[int] | None) -> list[Row]:
        longest = max(map(len, rows), default=0)
        block = self.config.block_size or max(longest, 1) if self.lm.spec.grid is None else self._grid()
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

    def _run(self, rows: list[Row], trace: bool, trim: Callable[[list[int]], list[int]]) -> SampleOutput:
        began = time.perf_counter()
        engine = Engine(self.lm, self.max_rows, self.config.shift_logits, trace=trace, events=trace)
        commits: dict[int, list[Commit]] = {row.key: [] for row in rows}
        for row in rows:
            engine.admit(row)
        while engine.busy:
            for commit in engine.step():
                commits[commit.row].append(commit)
        finished = {item.row: item for item in engine.take_finished()}
        done = [finished[row.key] for row in rows]
        return SampleOutput(
            sequences=[item.tokens for item in done],
            completions=[
                trim([token for token, written in zip(item.tokens, row.open, strict=True) if written])
                for row, item in zip(rows, done, strict=True)
            ],
            row_nfe=[item.nfe for item in done],
            nfe=engine.forwards,
            seconds=time.perf_counter() - began,
            history=[item.history for item in done] if trace else None,
            commits=[commits[row.key] for row in rows] if trace else None,
        )

    def _until_stop(self, tokens: list[int]) -> list[int]:
        stops = set(self.lm.spec.stop_token_ids)
        return list(itertools.takewhile(lambda token: token not in stops, tokens))

    def _empty_prompt(self) -> list[int]:
        """Shifted logits need a left neighbour for the first token; otherwise an empty prompt stays empty."""
        spec = self.lm.spec
        shift = spec.shift_logits if self.config.shift_logits is None else self.config.shift_logits
        if not shift:
            return []
        return [spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id]

    def _seeds(self, count: int, seeds: Sequence[int] | None) -> list[int]:
        if seeds is not None:
            if len(seeds) != count:
                raise ConfigError(f"{len(seeds)} seeds for {count} rows; expected one for each", "seeds")
            return list(seeds)
        return row_seeds(self.config.seed, range(count))


def row_seeds(seed: int | None, indices: Sequence[int]) -> list[int]:
    """Seeds of the rows with these indices in a larger job; None draws a base seed."""
    base = secrets.randbits(62) if seed is None else seed
    return mix(base, torch.tensor(list(indices), dtype=torch.long)).tolist()
