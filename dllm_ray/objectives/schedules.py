"""Schedules of noise, as pure functions of times in [0, 1].

alpha(t) is the share of tokens still clean, from 1 at t = 0 to 0 at t = 1, after the continuous-time masked diffusion
of Sahoo et al., arXiv 2406.07524, and Shi et al., arXiv 2406.04329. kappa(t) is the share of edits already made, from 0
at t = 0 to 1 at t = 1, after Edit Flows, Havasi et al., arXiv 2506.09018. Objectives weigh losses with them; samplers
derive from them how much a step writes.
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


class KappaSchedule(Protocol):
    """kappa(t), its derivative and its inverse, element by element."""

    def kappa(self, t: Tensor) -> Tensor: ...

    def derivative(self, t: Tensor) -> Tensor: ...

    def inverse(self, kappa: Tensor) -> Tensor: ...


class LinearKappa:
    """kappa(t) = t."""

    def kappa(self, t: Tensor) -> Tensor:
        return t

    def derivative(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def inverse(self, kappa: Tensor) -> Tensor:
        return kappa


class CubicKappa:
    """kappa(t) = 2 t^3 - 3 t^2 + 2 t: as fast at both ends, slower in the middle."""

    def kappa(self, t: Tensor) -> Tensor:
        return ((2 * t - 3) * t + 2) * t

    def derivative(self, t: Tensor) -> Tensor:
        return (6 * t - 6) * t + 2

    def inverse(self, kappa: Tensor) -> Tensor:
        # around the middle it is s^3 + s/4 = (kappa - 1/2) / 2, whose one real root Cardano gives
        return 0.5 + torch.sinh(torch.asinh((kappa - 0.5) * 3 * math.sqrt(12)) / 3) / math.sqrt(3)


class CosineKappa:
    """kappa(t) = 1 - cos(pi/2 t): slow at first."""

    def kappa(self, t: Tensor) -> Tensor:
        return 1 - torch.cos(math.pi / 2 * t)

    def derivative(self, t: Tensor) -> Tensor:
        return math.pi / 2 * torch.sin(math.pi / 2 * t)

    def inverse(self, kappa: Tensor) -> Tensor:
        return torch.acos(1 - kappa) * 2 / math.pi


_KAPPAS: dict[str, KappaSchedule] = {"linear": LinearKappa(), "cubic": CubicKappa(), "cosine": CosineKappa()}


def kappa_schedule(name: str) -> KappaSchedule:
    """The schedule of that name: `linear`, `cubic` or `cosine`.

    Raises:
        ConfigError: there is no such schedule.
    """
    if name not in _KAPPAS:
        raise ConfigError(f"unknown schedule {name!r}; expected one of {', '.join(_KAPPAS)}", "kappa")
    return _KAPPAS[name]


def edit_rate(schedule: KappaSchedule, t: Tensor) -> Tensor:
    """w(t) = kappa'(t) / (1 - kappa(t)): how fast an edit that is still to come is made at time t."""
    return schedule.derivative(t) / (1 - schedule.kappa(t) + EPSILON)


def edit_share(schedule: KappaSchedule, t: Tensor, s: Tensor) -> Tensor:
    """The share of edits still to come at time t that are made by the later time s: (kappa(s) - kappa(t)) /
    (1 - kappa(t)). For short steps and the linear schedule it is w(t) (s - t)."""
    return (schedule.kappa(s) - schedule.kappa(t)) / (1 - schedule.kappa(t) + EPSILON)
