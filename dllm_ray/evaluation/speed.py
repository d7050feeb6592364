"""How fast likelihoods are estimated, beside the time of the forwards that they need and beside one request at a time.

The forwards of a call are recorded and run again by themselves, up to the logits at masked positions. The ratio of the
two times is what everything else costs: 1 is the limit.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.evaluation.likelihood import Pair, estimate
from dllm_ray.models.lm import DiffusionLM


@dataclass
class Speed:
    """What a measurement found: the fastest of its rounds, which other work on the machine disturbs least."""

    requests_per_s: float
    """Targets estimated per second, all in one call."""
    copies: float
    """Masked copies of a target, on average."""
    ratio: float
    """Time of the call over that of its forwards alone."""
    one_by_one: float
    """Time of a call for each target over that of one call for all."""
    all_logits: float
    """Time of forwards with the logits of every position, `mc_num` copies of one target at a time, over that of one
    call for all: what code that knows neither short cut can't go below."""


def measure(lm: DiffusionLM, config: LikelihoodConfig, pairs: Sequence[Pair], rounds: int = 3) -> Speed:
    """Measures estimates of the same pairs.

    Args:
        lm: the model.
        config: the settings.
        pairs: token ids of prefix and target.
        rounds: how often the ways take turns, after one turn that isn't counted.
    """
    seeds = range(len(pairs))
    calls = _record(lm, lambda: estimate(lm, pairs, config, seeds))
    found = estimate(lm, pairs, config, seeds)
    rows = [torch.tensor([[*prefix, *target]], device=lm.device) for prefix, target in pairs]
    ways: dict[str, Callable[[], object]] = {
        "all": lambda: estimate(lm, pairs, config, seeds),
        "bare": lambda: [lm.module(*arguments) for arguments in calls],
        "one": lambda: [estimate(lm, [pair], config, [seed]) for pair, seed in zip(pairs, seeds, strict=True)],
        "logits": lambda: [_all_logits(lm, row, config) for row in rows],
    }
    turns = [{name: _seconds(lm, way) for name, way in ways.items()} for _ in range(rounds + 1)]
    best = {name: min(turn[name] for turn in turns[1:]) for name in ways}
    return Speed(
        requests_per_s=len(pairs) / best["all"],
        copies=sum(item.copies for item in found) / len(pairs),
        ratio=best["all"] / best["bare"],
        one_by_one=best["one"] / best["all"],
        all_logits=best["logits"] / best["all"],
    )


class _Recorder(nn.Module):
    """Keeps what the model was called with, but for what turns logits into cross-entropies."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module
        self.calls: list[tuple] = []

    def forward(self, *arguments, **for_cross_entropy):
        self.calls.append(arguments)
        return self.module(*arguments, **for_cross_entropy)


def _record(lm: DiffusionLM, run: Callable[[], object]) -> list[tuple]:
    recorder = _Recorder(lm.module)
    lm.module = recorder
    try:
        run()
    finally:
        lm.module = recorder.module
    return recorder.calls


def _all_logits(lm: DiffusionLM, row: torch.Tensor, config: LikelihoodConfig) -> None:
    for done in range(0, config.mc_num, config.batch_size):
        lm.module(row.expand(min(config.batch_size, config.mc_num - done), -1))


@torch.inference_mode()
def _seconds(lm: DiffusionLM, run: Callable[[], object]) -> float:
    _wait(lm)
    began = time.perf_counter()
    run()
    _wait(lm)
    return time.perf_counter() - began


def _wait(lm: DiffusionLM) -> None:
    if lm.device.type == "cuda":
        torch.cuda.synchronize(lm.device)
