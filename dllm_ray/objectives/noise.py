"""Random draws for a global batch, of which every worker keeps those of its own rows.

Shapes: B own rows, R rows of the global batch, T positions.
"""

import math

import torch
from torch import Tensor

from dllm_ray.objectives.batch import Part

_GOLDEN = (math.sqrt(5) - 1) / 2


def uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Numbers from [0, 1), on the generator's device."""
    return torch.rand(shape, generator=generator, device=None if generator is None else generator.device)


def own(draws: Tensor, part: Part, rows: int) -> Tensor:
    """The draws of one part out of those of a global batch; filler rows get 1."""
    kept = draws[part.start : part.start + rows]
    return torch.cat([kept, kept.new_ones((rows - len(kept), *kept.shape[1:]))])


def spread(total: int, generator: torch.Generator | None, stratified: bool) -> Tensor:
    """[R] numbers from [0, 1): independent ones, or one from each of R equal slices, in random order."""
    u = uniform((total,), generator)
    if not stratified:
        return u
    slices = torch.randperm(total, generator=generator, device=u.device)
    return (slices + u) / total


def within(u: Tensor, number: Tensor) -> Tensor:
    """Numbers for several things in a row out of one for the row: uniform in [0, 1) each, and evenly spread.

    They follow each other by the golden ratio, modulo 1 (an additive recurrence; Weyl 1916), so they need no draws
    whose count would depend on how rows are spread over workers.

    Args:
        u: [B] the rows' own numbers.
        number: [B, T] which of the row's things a position belongs to, from 0.
    """
    return ((u.double().unsqueeze(1) + number.double() * _GOLDEN) % 1).float()
