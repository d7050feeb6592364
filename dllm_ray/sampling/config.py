"""`SamplerConfig`: every setting of the denoising loop. Plain data."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Literal

from dllm_ray.errors import ConfigError

DREAM_POLICIES = ("entropy", "topk_margin", "maskgit_plus", "origin")
"""The policies of Dream (arXiv 2508.15487)."""
LLADA2_POLICIES = ("llada2", "llada21")
"""The policies of LLaDA2.0 and LLaDA2.1 (arXiv 2512.15745)."""
POLICIES = ("low_confidence", "random", *DREAM_POLICIES, *LLADA2_POLICIES)
SCHEDULES = ("linear", "cosine", "dream")
CACHES = ("none", "prefix", "dual", "block")
KAPPAS = ("linear", "cubic", "cosine")
EDIT_FIELDS = ("kappa", "start_tokens", "edit_prompt", "edit_probability")
"""Settings that only models that edit read."""
READ_BY_EDITS = ("max_new_tokens", "max_length", "steps", "temperature", "top_p", "top_k", "suppress_tokens") + (
    "eos_penalty",
    "seed",
    *EDIT_FIELDS,
)
"""Settings that models that edit read."""

_COUNTS = ("max_new_tokens", "max_length", "steps", "steps_per_block", "block_size", "top_k", "max_post_steps") + (
    "num_to_transfer",
    "minimal_topk",
)
_REALS = ("temperature", "top_p", "alg_temperature", "threshold", "factor", "editing_threshold", "cfg_scale") + (
    "eos_penalty",
    "edit_probability",
)
_TOKENS = ("cfg_keep_tokens", "suppress_tokens", "begin_suppress_tokens")
_MOST_STEPS = 2**16
_LARGEST = 1_000_000  # what float32 logits can be divided by, multiplied with or lowered by and still be told apart


@dataclass
class SamplerConfig:
    """How a canvas of masks becomes text."""

    max_new_tokens: int | None = 128
    """Masks put after each prompt; null: as many as `max_length` leaves beside the longest prompt of the call."""
    max_length: int | None = None
    """Prompt and answer together, in tokens; read only when `max_new_tokens` is null."""
    steps: int = 128
    """Denoising steps for the whole answer, divided evenly over its blocks (rounded up)."""
    steps_per_block: int | None = None
    """Denoising steps for each block; overrides `steps`."""
    block_size: int | None = 32
    """Tokens in a block; blocks are finished from left to right. null: one block. Where logits are shifted, Dream's
    policies have blocks only with a cache, as in Dream's own code."""
    schedule: Literal["linear", "cosine", "dream"] = "linear"
    """How many tokens each step of a block commits: evenly; few at first and more towards the end; or by Dream's own
    time steps."""
    stochastic: bool = False
    """Draw how many tokens each step commits from the schedule, instead of rounding it."""
    temperature: float = 0.0
    """0 proposes the likeliest token; above 0 one is drawn from softmax(logits / temperature)."""
    top_p: float | None = None
    """Draw among the likeliest tokens whose probabilities reach this sum; null: among all."""
    top_k: int | None = None
    """Draw among this many likeliest tokens; null: among all."""
    alg_temperature: float | None = None
    """Above 0, the positions that a step commits are drawn from softmax(confidence / alg_temperature) instead of being
    the most confident."""
    policy: Literal[
        "low_confidence", "random", "entropy", "topk_margin", "maskgit_plus", "origin", "llada2", "llada21"
    ] = "low_confidence"
    """Which masked positions a step commits: low_confidence: those whose proposed token is likeliest in the model's own
    distribution; maskgit_plus: likeliest after temperature and filters; topk_margin: those where the likeliest token
    leads by most; entropy: those with the least entropy; random: any; origin: each by its own coin; llada2: all above
    `threshold`, or else a quota; llada21: the same, and written tokens of the block are revised."""
    threshold: float | None = None
    """Commit every token at least this probable, and at least one a step, instead of the schedule's quota (Fast-dLLM);
    for llada2 and llada21 the bound they use, 0.95 by default."""
    factor: float | None = None
    """Commit the k likeliest tokens, with k as large as the k-th allows: its probability is at least
    1 - factor / (k + 1) (Fast-dLLM), instead of the schedule's quota."""
    editing_threshold: float | None = None
    """llada21: a written token gives way to another one more probable than this; null: 0.9."""
    max_post_steps: int = 16
    """llada21: most steps in a block after its last mask, for revisions."""
    num_to_transfer: int = 1
    """llada21: tokens that a step commits where fewer are above the threshold."""
    minimal_topk: int = 1
    """llada2: fewest tokens a step commits on average; bounds the steps of a block by `max_new_tokens` over it."""
    cache: Literal["none", "prefix", "dual", "block"] = "none"
    """What is not computed again in every step. prefix: keys and values before the current block (refreshed when a
    block begins); dual: those after it as well (Fast-dLLM); both are approximations, and need full attention. block:
    everything before the current block under block-causal attention, which is exact; a model with full attention is
    read block-causally then, with blocks counted from the answer's beginning."""
    cfg_scale: float = 0.0
    """Classifier-free guidance (arXiv 2207.12598): logits move away from those without the prompt; 0 is off."""
    cfg_keep_tokens: tuple[int, ...] = ()
    """Prompt tokens that the unguided forward of classifier-free guidance keeps."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never proposed."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that may be proposed, but with confidence 0, so that they are committed last in their block."""
    eos_penalty: float = 0.0
    """Taken from the logits of end-of-text and end-of-turn tokens: above 0 answers get longer."""
    eos_early_stop: bool = True
    """Finish a row once it holds an end-of-text token with no mask before it; the text stays the same."""
    shift_logits: bool | None = None
    """Read the logits one position to the left; null: as the model's spec says."""
    kappa: Literal["linear", "cubic", "cosine"] = "linear"
    """Models that edit, here and below: share of edits made over time, as in training (`ObjectiveConfig.kappa`)."""
    start_tokens: int = 0
    """Mask tokens that an answer begins with; 0: it begins empty."""
    edit_prompt: bool = False
    """Whether the prompt's tokens may change too, but for the first."""
    edit_probability: float | None = None
    """Make a step longer than 1 / `steps` of the way, as long as no edit of it gets more probable than this; null:
    equal steps."""
    seed: int | None = None
    """Seeds each row's own draws, independent of its neighbours; null draws a seed. In half precision the model's
    rounding depends on the shape of the batch, and with it now and then a token."""

    def __post_init__(self):
        self._check_choices()
        self._check_types()
        self._check_numbers()
        self._check_combinations()

    def _check_choices(self) -> None:
        for name, known in (("policy", POLICIES), ("schedule", SCHEDULES), ("cache", CACHES), ("kappa", KAPPAS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"expected one of {', '.join(known)}, got {getattr(self, name)!r}", name)

    def _check_types(self) -> None:
        for name in (*_COUNTS, "seed"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"expected a whole number, got {value!r}", name)
        for name in _REALS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
                raise ConfigError(f"expected a number, got {value!r}", name)
        for name in _TOKENS:
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise ConfigError(f"expected a list of token ids, got {value!r}", name)
            setattr(self, name, tuple(value))
            if not all(isinstance(token, int) for token in value):
                raise ConfigError(f"expected a list of token ids, got {value!r}", name)

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        for name in ("steps", "steps_per_block"):
            value = getattr(self, name)
            if value is not None and value > _MOST_STEPS:
                raise ConfigError(f"must be at most {_MOST_STEPS:,}, got {value}", name)
        if self.max_new_tokens is None and self.max_length is None:
            raise ConfigError("set max_new_tokens or max_length", "max_new_tokens")
        for name in ("temperature", "cfg_scale", "alg_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= _LARGEST:
                raise ConfigError(f"must be a number that is not negative, and at most {_LARGEST:,}, got {value}", name)
            if value and value < 1 / _LARGEST:
                raise ConfigError(f"must be 0 or at least {1 / _LARGEST}, got {value}", name)
        if isinstance(self.start_tokens, bool) or not isinstance(self.start_tokens, int) or self.start_tokens < 0:
            raise ConfigError(f"expected a whole number of at least 0, got {self.start_tokens!r}", "start_tokens")
        for name in ("top_p", "threshold", "editing_threshold", "edit_probability"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                raise ConfigError(f"must lie above 0 and at most at 1, got {value}", name)
        if self.factor is not None and not 0 < self.factor < float("inf"):
            raise ConfigError(f"must be a number above 0, got {self.factor}", "factor")
        if not abs(self.eos_penalty) <= _LARGEST:
            raise ConfigError(f"must lie between -{_LARGEST:,} and {_LARGEST:,}, got {self.eos_penalty}", "eos_penalty")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"must lie between 0 and 2^63 - 1, got {self.seed}", "seed")

    def _check_combinations(self) -> None:
        unordered = self.policy in ("random", "origin")
        for name in ("threshold", "factor", "alg_temperature"):
            if getattr(self, name) and unordered:
                raise ConfigError(f"needs a policy by confidence, {self.policy} has none", name)
        for name in ("factor", "alg_temperature"):
            if getattr(self, name) and self.policy in LLADA2_POLICIES:
                raise ConfigError(f"has no effect on policy {self.policy}: set its threshold", name)
        if self.threshold is not None and self.factor is not None:
            raise ConfigError("give threshold or factor, not both", "factor")
        for name in ("threshold", "factor"):
            if getattr(self, name) is not None and self.policy in ("entropy", "topk_margin"):
                raise ConfigError(
                    f"compares probabilities, which policy {self.policy} doesn't rank by: choose low_confidence or "
                    "maskgit_plus",
                    name,
                )
        if self.editing_threshold is not None and self.policy != "llada21":
            raise ConfigError(f"only policy llada21 revises tokens, not {self.policy}", "editing_threshold")
        if self.begin_suppress_tokens and self.policy not in ("low_confidence", "random"):
            raise ConfigError(
                f"works on policy low_confidence, not on {self.policy}: suppress_tokens forbids tokens altogether",
                "begin_suppress_tokens",
            )

    def require_no_edits(self) -> None:
        """Makes sure that nothing is asked which only a model that edits can do.

        Raises:
            ConfigError: one of `EDIT_FIELDS` is not at its default.
        """
        for name in EDIT_FIELDS:
            value = getattr(self, name)
            if value != getattr(SamplerConfig, name):  # the defaults, which are the class's own attributes
                raise ConfigError(f"{value!r} is for models with edit heads, and this one has none: leave it out", name)

    def require_only_edits(self) -> None:
        """Makes sure that nothing is asked which would be without effect on a model that edits.

        Raises:
            ConfigError: a setting beside `READ_BY_EDITS` is not at its default.
        """
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name not in READ_BY_EDITS and value != item.default:
                raise ConfigError(f"{value!r} has no meaning for a model that edits: leave it out", item.name)

    def for_length(self, new_tokens: int) -> "SamplerConfig":
        """The same settings for answers of `new_tokens` tokens: as many tokens for each step as they had."""
        steps = self.steps
        if self.max_new_tokens is not None:
            steps = min(max(-(-steps * new_tokens // self.max_new_tokens), 1), _MOST_STEPS)
        return replace(self, max_new_tokens=new_tokens, steps=steps)

    def blocks(self, new_tokens: int | None = None) -> tuple[int, int]:
        """Block size and most steps in a block, for answers of `new_tokens` tokens (null: of `max_new_tokens`). A model
        that edits has no blocks.

        Raises:
            ConfigError: the steps are fewer than the blocks.
        """
        new_tokens = new_tokens or self.max_new_tokens or self.max_length
        size = min(self.block_size or new_tokens, new_tokens)
        return size, self.steps_in_block(-(-new_tokens // size))

    def steps_in_block(self, blocks: int) -> int:
        """Most steps in each of `blocks` blocks.

        Raises:
            ConfigError: the steps are fewer than the blocks.
        """
        if self.steps_per_block is not None:
            return self.steps_per_block
        if self.steps < blocks:
            raise ConfigError(
                f"{self.steps} steps are fewer than the {blocks} blocks of the answer: raise steps or block_size",
                "steps",
            )
        return -(-self.steps // blocks)
