"""What a strategy does: it wraps model and optimizer, and hides how they are spread over workers."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dllm_ray.models.lm import DiffusionLM

MODEL = "model"
"""The Hugging Face directory in a checkpoint's folder."""


class Strategy(Protocol):
    """A model and its optimizer, spread over the workers of a process group."""

    lm: DiffusionLM
    """Computes logits and losses through the strategy's wrapper. Its parameters may be shards: they are whole only
    inside a forward of `lm.module`."""
    device: torch.device
    """Where batches go. Offloaded parameters lie elsewhere."""
    rank: int
    """This worker's number."""
    world_size: int
    """Number of workers."""

    def autocast(self) -> AbstractContextManager:
        """Surrounds every forward and its loss: bfloat16 matrix products where the precision is `bf16`."""

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Surrounds one forward and backward; gradients are exchanged at the last of a step only."""

    def backward(self, loss: Tensor) -> None:
        """Backpropagates this worker's part of the global loss: the parts of all workers add up to it."""

    def step(self, learning_rate: float, clip_norm: float) -> Tensor:
        """Clips the global gradient, updates the weights, clears the gradients; returns the norm before clipping.

        A norm that isn't finite means that nothing was updated.

        Args:
            learning_rate: of this step.
            clip_norm: largest norm of the global gradient; 0: no clipping.
        """

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Tensors of one shape, summed over workers, in float32."""

    def save(self, directory: Path) -> None:
        """Writes model and optimizer state; every worker calls it, with a folder of its own. The files of all workers
        in one folder make a checkpoint."""

    def load(self, directory: Path) -> None:
        """Restores what `save` wrote, on any number of workers; every worker calls it."""

    def export(self, directory: Path) -> None:
        """Worker 0 writes a Hugging Face directory, or that of an adapter; every worker calls it."""
