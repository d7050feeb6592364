"""What objectives take and give. Shapes: B rows, T positions.

A batch is a dict of tensors:
    input_ids       [B, T].
    labels          [B, T], -100 where there is no loss.
    attention_mask  [B, T], 1 for positions that may be seen; absent where padding is attended.
    segment_ids     [B, T], only with packing: 1, 2, ... for the samples of a row, 0 for padding.
    position_ids    [B, T], only with packing: counted from 0 in each sample.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dllm_ray.models.lm import DiffusionLM


class Part(NamedTuple):
    """Says that a batch is rows `start`, `start + 1`, ... of a global batch of `total` rows; rows beyond are filler."""

    start: int
    total: int
    bos: bool | None = None
    """Whether samples get a BOS in front where logits are shifted, as `samples.needs_bos` says of the global batch;
    None: as it says of this part."""


@dataclass(frozen=True)
class NoisyBatch:
    """A corrupted batch with everything random in it."""

    input_ids: Tensor  # [B, T], masked positions hold the mask token
    targets: Tensor  # [B, T], the clean tokens
    maskable: Tensor  # [B, T] bool, positions that carry a label
    masked: Tensor  # [B, T] bool, positions the model is asked for
    t: Tensor  # [B], or [B, T] where samples or blocks of a row have their own; times in [0, 1]
    attention_mask: Tensor | None  # [B, T], or None: every position is attended
    segment_ids: Tensor | None  # [B, T] with packing, else None
    position_ids: Tensor | None  # [B, T] with packing, else None
    width: int  # positions of a row before any BOS: the same on every worker

    def __len__(self) -> int:
        return len(self.input_ids)

    def to(self, device: torch.device | str) -> "NoisyBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> "NoisyBatch":
        """The rows from `start` up to `stop`."""
        return self._map(lambda tensor: tensor[start:stop])

    def _map(self, change) -> "NoisyBatch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return NoisyBatch(
            **{name: change(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        )


@dataclass(frozen=True)
class LossResult:
    """What a batch cost."""

    loss: Tensor  # scalar, to call backward on
    nll_sum: Tensor  # scalar, weighted cross-entropy summed over masked positions; detached
    tokens: Tensor  # scalar, positions that carry a label: nll_sum / tokens estimates the negative ELBO per token


class Noisy(Protocol):
    """A corrupted batch, with everything random in it."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device | str) -> "Noisy": ...

    def rows(self, start: int, stop: int) -> "Noisy":
        """The rows from `start` up to `stop`."""


class Objective(Protocol):
    """What training minimises."""

    name: str
    shift_logits: bool
    """Whether labelled first tokens need a BOS in front, on all workers or none (`Part.bos`)."""
    pairs: Callable[[Mapping[str, np.ndarray], int, int], dict[str, np.ndarray]] | None
    """What is added to a batch where it is formed, from its arrays, its number and its first row's; None: nothing."""

    def corrupt(
        self, batch: dict[str, Tensor], generator: torch.Generator | None = None, *, part: Part | None = None
    ) -> Noisy:
        """Draws the noise."""

    def loss(self, lm: DiffusionLM, noisy: Noisy, denominator: Tensor | float | None = None) -> LossResult:
        """The loss of a corrupted batch; deterministic."""

    def denominator(self, noisy: Noisy) -> Tensor:
        """What a batch adds to the divisor of the loss."""

    def for_validation(self) -> "Objective":
        """The objective whose `nll_sum / tokens` is reported of validation rows."""
