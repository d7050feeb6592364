"""Noise schedules alpha(t): the share of tokens still clean at time t, from 1 at t = 0 to 0 at t = 1.

Pure functions of tensors, after the continuous-time masked diffusion of Sahoo et al., arXiv 2406.07524, and Shi et
al., arXiv 2406.04329. Objectives weigh losses with them; samplers derive from them how many tokens a step commits.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from dllm_ray.errors import ConfigError

EPSILON = 1e-6
"""Keeps weights and ratios finite where almost nothing is masked."""


class AlphaSchedule(Protocol):
    """alpha(t) and its derivative, element by element."""

    def alpha(self, t: Tensor) -> Tensor: ...

    def derivative(self, t: Tensor) -> Tensor: ...


class LinearAlpha:
    """alpha(t) = 1 - t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def derivative(self, t: Tensor) -> Tensor:
        return -torch.ones_like(t)


class CosineAlpha:
    """alpha(t) = 1 - cos(pi/2 (1 - t))."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - t))

    def derivative(self, t: Tensor) -> Tensor:
        return -math.pi / 2 * torch.sin(math.pi / 2 * (1 - t))


_SCHEDULES: dict[str, AlphaSchedule] = {"linear": LinearAlpha(), "cosine": CosineAlpha()}


def alpha_schedule(name: str) -> AlphaSchedule:
    """The schedule of that name: `linear` or `cosine`.

    Raises:
        ConfigError: there is no such schedule.
    """
    if name not in _SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}; expected one of {', '.join(_SCHEDULES)}", "schedule")
    return _SCHEDULES[name]


def elbo_weight(schedule: AlphaSchedule, t: Tensor) -> Tensor:
    """w(t) = -alpha'(t) / (1 - alpha(t)): with it the masked cross-entropy bounds the negative log-likelihood."""
    return -schedule.derivative(t) / (1 - schedule.alpha(t) + EPSILON)


def unmask_probability(schedule: AlphaSchedule, t: Tensor, s: Tensor) -> Tensor:
    """The probability that a token masked at time t is clean at the earlier time s: 1 - (1-alpha(s)) / (1-alpha(t))."""
    return 1 - (1 - schedule.alpha(s)) / (1 - schedule.alpha(t))
