"""What a strategy does: it wraps model and optimizer, and hides how they are spread over workers."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from dllm_ray.models.lm import DiffusionLM


class Strategy(Protocol):
    """A model and its optimizer, spread over the workers of a process group."""

    lm: DiffusionLM
    """Computes logits through the strategy's wrapper."""
    rank: int
    """This worker's number."""
    world_size: int
    """Number of workers."""

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Surrounds one forward and backward; gradients are exchanged at the last of a step only."""

    def backward(self, loss: Tensor) -> None:
        """Backpropagates this worker's part of the global loss: the parts of all workers add up to it."""

    def step(self, learning_rate: float, clip_norm: float) -> Tensor:
        """Clips the global gradient, updates the weights, clears the gradients; returns the norm before clipping."""

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Scalars, summed over workers."""

    def save(self, directory: Path) -> None:
        """Writes model and optimizer state; every worker calls it, with a folder of its own."""

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote."""
