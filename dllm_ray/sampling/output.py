"""What a call of the sampler returns."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from dllm_ray.sampling.engine import Commit

OnCommit = Callable[[Commit], None]


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
    """Steps in which the model ran; rows in one batch share them."""
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


def until_stop(tokens: list[int], stops: Collection[int]) -> list[int]:
    """The tokens before the first one that ends a text."""
    return list(takewhile(lambda token: token not in stops, tokens))
