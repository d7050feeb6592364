"""What a row's settings come to on one model: the combination of proposal, order, commit rule and cache.

The published algorithms are combinations; the few rules that hold for one of them only are named here, so that the
engine knows no model and no paper.
"""

from typing import TYPE_CHECKING

import numpy as np

from dllm_ray.errors import ConfigError
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling.config import DREAM_POLICIES, LLADA2_POLICIES, SamplerConfig
from dllm_ray.sampling.proposals import CHOSEN, ENTROPY, MARGIN, PLAIN
from dllm_ray.sampling.unmasking import (
    commit_schedule,
    dream_block_schedule,
    even_schedule,
    stochastic_schedule,
)

if TYPE_CHECKING:
    from dllm_ray.sampling.batch import Row

_CONFIDENCE = {"maskgit_plus": CHOSEN, "llada2": CHOSEN, "llada21": CHOSEN, "topk_margin": MARGIN, "entropy": ENTROPY}
_LLADA2_THRESHOLD, _EDITING_THRESHOLD = 0.95, 0.9


def check(config: SamplerConfig, spec: DiffusionSpec, infill: bool = False) -> None:
    """Makes sure that settings can work on a model, as far as its spec tells: nothing needs to be loaded.

    Args:
        config: the settings.
        spec: the model's facts.
        infill: gaps are filled in, so that blocks are counted over texts which only the sampler knows.

    Raises:
        ConfigError: they can't.
    """
    if spec.edit_heads is not None:
        config.require_only_edits()
        return
    if spec.mask_token_id is not None:
        Plan(config, spec)
    if not infill:
        config.blocks()


class Plan:
    """A `SamplerConfig` on a model whose masks are committed.

    Args:
        config: the settings.
        spec: the model's facts.
        takes_cache: whether the model can keep keys and values.

    Raises:
        ConfigError: the cache can't be used with the model, or a setting is for models that edit.
    """

    def __init__(self, config: SamplerConfig, spec: DiffusionSpec, takes_cache: bool = True):
        self.config = config
        self.shift = spec.shift_logits if config.shift_logits is None else config.shift_logits
        self.is_random = config.policy in ("random", "origin")
        self.edits = config.policy == "llada21"
        self.by_certainty = config.policy in LLADA2_POLICIES
        self.confidence = _CONFIDENCE.get(config.policy, PLAIN)
        self.cached = config.cache != "none"
        self.refreshes = config.cache in ("prefix", "dual")
        self._grid = spec.grid
        # Dream's own decoding: where logits are shifted, its policies go by its rules
        self._dream = config.policy in DREAM_POLICIES and self.shift and spec.grid is None
        config.require_no_edits()
        if self.cached and not takes_cache:
            raise ConfigError(
                f"{spec.family} attends in a way of its own, which keeps no keys and values: set cache none", "cache"
            )
        if config.cache == "block" and spec.grid is None and config.block_size is None:
            raise ConfigError("a block cache needs the size of its blocks: set block_size", "block_size")
        if self.refreshes and spec.grid is not None:
            raise ConfigError(
                f"{config.cache} is made for full attention, and this model's is block-causal: block is exact for it",
                "cache",
            )

    @property
    def threshold(self) -> float | None:
        """The probability above which tokens are committed; None: quotas rule."""
        if self.by_certainty and self.config.threshold is None:
            return _LLADA2_THRESHOLD
        return self.config.threshold

    @property
    def editing_threshold(self) -> float:
        """The probability above which a written token gives way to another."""
        return self.config.editing_threshold or _EDITING_THRESHOLD

    @property
    def has_blocks(self) -> bool:
        """Whether an answer is written block by block. Dream's uncached decoding sees it as a whole."""
        return not self._dream or self.cached

    @property
    def first_alone(self) -> bool:
        """Whether a block begins by committing its first position alone: Fast-dLLM does so for Dream, since shifted
        logits of a block computed by itself say nothing about it."""
        return self._dream and self.refreshes

    @property
    def reads_before(self) -> bool:
        """Whether a cached step computes the position before the block too, which shifted logits are read from."""
        return self.shift and not self.first_alone

    @property
    def threshold_within_quota(self) -> bool:
        """Whether a threshold only delays what the schedule has due (Fast-dLLM for Dream without a cache)."""
        return self._dream and not self.cached and self.config.threshold is not None

    @property
    def rules_by_quota(self) -> bool:
        """Whether the schedule alone says how many tokens a step commits."""
        return self.config.threshold is None and self.config.factor is None and not self.by_certainty

    def attention_grid(self, start: int) -> tuple[int, int]:
        """Where blocks of attention begin and how long they are, for a row whose answer begins its first block at
        `start`; a size of 0 stands for full attention."""
        own_mask = self.by_certainty and self._grid is not None  # LLaDA2's decoding masks by the block size asked for
        if self._grid is not None and not own_mask:
            return 0, self._grid
        if own_mask or self.config.cache == "block":
            return start, self.config.block_size or self._grid
        return 0, 0

    @property
    def filters(self) -> tuple[float | None, int | None]:
        """top_p and top_k where they matter: LLaDA's and LLaDA2's greedy choice knows none, Dream's confidence does."""
        config = self.config
        unused = config.temperature == 0 and (self.confidence == PLAIN or self.by_certainty)
        return (None, None) if unused else (None if config.top_p == 1 else config.top_p, config.top_k)

    @property
    def proposal(self) -> tuple:
        """Equal for plans that read logits in the same way, if with other numbers. Others are kept apart, so that a row
        is computed as it would be alone."""
        config = self.config
        suppressed = (config.suppress_tokens, config.begin_suppress_tokens, config.eos_penalty)
        shaped = (config.temperature > 0, *(value is not None for value in self.filters))
        return (self.confidence, self.by_certainty, *shaped, *suppressed)

    def order(self, confidence_N: np.ndarray, draws_N: np.ndarray) -> np.ndarray:
        """[N] what candidates are ranked by: their confidence, or random numbers, or confidence with the noise that
        makes the best a draw without replacement from softmax(confidence / alg_temperature)."""
        if self.is_random:
            return draws_N
        tiny = np.finfo(np.float32).tiny
        return confidence_N / self.config.alg_temperature - np.log(-np.log(np.maximum(draws_N, tiny)))

    def counts(self, masks: int, row: "Row", step: int) -> tuple[int, ...]:
        """How many tokens the steps of a block commit.

        Args:
            masks: masks in the block.
            row: the row: its block size, most steps, and seed.
            step: the row's step at which the block begins.
        """
        config, steps = self.config, row.steps_per_block
        if self.edits:
            return (config.num_to_transfer,)
        if self.by_certainty:
            answer = min(sum(row.open), config.max_new_tokens or len(row.open))
            return even_schedule(row.block_size, max(min(steps, answer // config.minimal_topk), 1))
        if config.stochastic or config.policy == "origin":
            first = min(masks, int(self.first_alone))
            drawn = stochastic_schedule(masks - first, max(steps - first, 1), config.schedule, row.seed, step)
            return (1, *drawn) if first else drawn
        if self.first_alone:
            return dream_block_schedule(masks, steps)
        return commit_schedule(masks, steps, config.schedule)
