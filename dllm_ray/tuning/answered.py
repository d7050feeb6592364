"""What a setting gave: figures and the score of each document, kept beside lm-eval's results."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm_ray.output import complete_file

_FILE = "answered.json"


@dataclass(frozen=True)
class Answered:
    """The documents of a task, answered under one setting."""

    scores: Mapping[str, float]
    """Document -> its score, in the order asked."""
    tpf: float
    """Tokens per forward."""
    tokens_per_s: float
    """Tokens before the ends of texts per second of sampling."""
    nfe: float
    """Forwards per document."""
    asked: int
    """Requests that were computed; the others' answers were on disk."""
    seconds: float
    """Workers' time divided by the workers, with what answers from disk took when they were computed."""
    truncated: int
    """Requests that were longer than the context, and lost their beginning."""

    @property
    def score(self) -> float:
        """Mean over the documents; nan without any."""
        return math.fsum(self.scores.values()) / len(self.scores) if self.scores else math.nan

    def write(self, folder: Path) -> None:
        """Keeps it in a folder.

        Raises:
            OutputError: it can't be written.
        """
        with complete_file(folder / _FILE) as file:
            json.dump(vars(self), file)

    @classmethod
    def read(cls, folder: Path) -> "Answered | None":
        """What `write` left in a folder; None: nothing that can be used."""
        try:
            return cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None
