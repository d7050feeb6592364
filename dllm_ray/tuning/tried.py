"""What a sweep knows of a setting that it has tried."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tried:
    """A setting of the sampler, and what a task's documents gave under it."""

    name: str
    """What it is called: its changes in short."""
    changes: Mapping[str, Any]
    """Fields of `SamplerConfig` that the search space has set; parameters whose condition doesn't hold are absent."""
    sampler: Mapping[str, Any]
    """All sampler settings."""
    scores: Mapping[str, float]
    """Document -> its score, in the order asked."""
    tpf: float
    """Tokens per forward."""
    tokens_per_s: float
    """Tokens before the ends of texts per second of sampling."""
    nfe: float
    """Forwards per document."""
    complete: bool
    """Whether all documents of the search were answered; else it was dropped, or the sweep's budget ended."""

    @property
    def score(self) -> float:
        """Mean over the documents; nan without any."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else math.nan

    @property
    def family(self) -> str:
        """The algorithm, as far as it can't be tuned by degrees: cache and policy."""
        return f"{self.sampler['cache']} cache, {self.sampler['policy']}"
