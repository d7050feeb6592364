"""Settings of a sweep over sampler settings."""

from dataclasses import dataclass, field
from typing import Any, Literal

from dllm_ray.errors import ConfigError

SEARCHERS = ("grid", "random", "tpe", "nsga2")
OBJECTIVES = ("score", "tpf", "tokens_per_s", "nfe")

_LEAST = {"samples": 1, "first_documents": 1, "reduction": 2, "documents": 1, "holdout": 0, "confirm": 1} | {
    "concurrent": 1,
    "max_documents": 1,
}


@dataclass
class SweepConfig:
    """Which settings are tried, on what, and when it is enough."""

    space: dict[str, Any] = field(default_factory=dict)
    """Fields of `sampler` and what they may be. A list, or `{choice: [...]}`: one of these; `{uniform: [low, high]}`,
    `{loguniform: [low, high]}`: numbers between; `{integer: [low, high]}`, `{log_integer: [low, high]}`: whole ones,
    both ends included. Beside it `when: {cache: [prefix, dual]}` varies the field only where others are so."""
    searcher: Literal["grid", "random", "tpe", "nsga2"] = "grid"
    """grid: all combinations of a space of lists; random: drawn ones; tpe: those that what was tried before makes
    promising (arXiv 2304.11127); nsga2: generations that spread along the front of two objectives
    (doi 10.1109/4235.996017)."""
    samples: int = 24
    """Settings that random, tpe and nsga2 try."""
    metric: str | None = None
    """The task's metric that is the score, e.g. `exact_match` or `exact_match,flexible-extract`; null: its first."""
    objectives: list[str] = field(default_factory=lambda: ["score", "tpf"])
    """What tpe and nsga2 look for: `score`, alone or with one of `tpf` (tokens per forward), `tokens_per_s` (one rough
    timing of each setting, while others share the machine) or `nfe` (forwards per document; fewer are better)."""
    asha: bool = False
    """Drop bad settings after a few documents, by their score (successive halving, arXiv 1810.05934)."""
    first_documents: int = 32
    """asha: documents before the first settings are dropped."""
    reduction: int = 4
    """asha: one of so many settings goes on, with so many times the documents."""
    documents: int | None = None
    """Documents of the search, from the task's first; null: all but the held-out ones."""
    holdout: int | None = None
    """Documents after them that confirm the chosen settings; null: a third of the task's; 0: none."""
    tolerance: float = 0.02
    """Most that the recommended setting's score may be below the best one's; nor may it be told apart from that one."""
    confirm: int = 5
    """Most settings that are confirmed."""
    confidence: float = 0.95
    """How sure intervals and comparisons are, between 0 and 1."""
    concurrent: int | None = None
    """Settings asked at the same time; null: as many as keep all workers busy."""
    max_minutes: float | None = None
    """No setting is begun after so many minutes of a run, loading included; those under way are ended. null: no end."""
    max_documents: int | None = None
    """No setting is begun after so many documents that a run has answered, over all settings; null: no end."""
    background: str | None = None
    """Published curves of accuracy and parallelism that are drawn behind ours, e.g. `llada/GSM8K-CoT`."""

    def __post_init__(self):
        self.objectives = [self.objectives] if isinstance(self.objectives, str) else list(self.objectives)
        if self.searcher not in SEARCHERS:
            raise ConfigError(f"expected one of {', '.join(SEARCHERS)}, got {self.searcher!r}", "searcher")
        self._check_numbers()
        self._check_objectives()
        if self.asha and self.documents is not None and self.documents <= self.first_documents:
            raise ConfigError(
                f"the first settings are dropped after {self.first_documents} documents, and the search has only "
                f"{self.documents}: raise documents, lower first_documents or leave asha out",
                "first_documents",
            )

    def _check_numbers(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ConfigError(f"must be a whole number of at least {least}, got {value!r}", name)
        if not 0 <= self.tolerance < float("inf"):
            raise ConfigError(f"must be a number that is not negative, got {self.tolerance}", "tolerance")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"must lie between 0 and 1, got {self.confidence}", "confidence")
        if self.max_minutes is not None and not 0 < self.max_minutes < float("inf"):
            raise ConfigError(f"must be a number above 0, got {self.max_minutes}", "max_minutes")

    def _check_objectives(self) -> None:
        names = self.objectives
        unknown = next((name for name in names if name not in OBJECTIVES), None)
        if unknown is not None:
            raise ConfigError(f"expected one or two of {', '.join(OBJECTIVES)}, got {unknown!r}", "objectives")
        if "score" not in names or len(names) > 2 or len(set(names)) < len(names):
            raise ConfigError(f"expected score, alone or with one other, got {names}", "objectives")
        if self.searcher == "nsga2" and len(names) < 2:
            raise ConfigError("nsga2 weighs two objectives: add one, or set searcher to tpe", "objectives")
        if self.asha and len(names) > 1:
            raise ConfigError(f"settings are dropped by one number: set objectives to [score], not {names}", "asha")
