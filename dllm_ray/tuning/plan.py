"""What a sweep will ask: documents of the search and held-out ones, settings, and how many of them at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.run import Loaded
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning.config import SweepConfig
from dllm_ray.tuning.halving import rungs
from dllm_ray.tuning.space import Candidate, Space


@dataclass(frozen=True)
class Plan:
    """A sweep, worked out."""

    space: Space
    candidates: tuple[Candidate, ...] | None
    """Settings that are tried, in order; None: the searcher draws them."""
    official: Candidate
    """The setting that the sweep begins with."""
    trials: int
    """Settings that are tried."""
    search: range
    """Places of the documents of each task that settings are searched with."""
    held_out: range
    """Places of those that confirm."""
    asked: int
    """Documents of the search, over all tasks."""

    def concurrent(self, config: SweepConfig, workers: int, slice_rows: int) -> int:
        """Settings asked at the same time: one, and as many more as keep workers busy that it leaves idle.

        Args:
            config: of the sweep.
            workers: that hold the model.
            slice_rows: documents that a worker takes at a time.
        """
        if config.concurrent is not None:
            return config.concurrent
        first = (
            rungs(config.first_documents, config.reduction, len(self.search))[0] if config.asha else len(self.search)
        )
        slices = math.ceil(self.asked * first / len(self.search) / slice_rows)
        return min(1 + math.ceil(workers / slices), max(self.trials, 1))


def plan(
    config: SweepConfig,
    tasks: Sequence[Loaded],
    base: SamplerConfig,
    limit: int | None,
    seed: int,
    check: Callable[[SamplerConfig], object] = SamplerConfig.blocks,
) -> Plan:
    """Works a sweep out, before anything is loaded.

    Args:
        config: of the sweep.
        tasks: what is asked.
        base: the settings that the sweep begins with.
        limit: documents of each task that may be asked; None: all.
        seed: of drawn settings and their order.
        check: as of `Space`.

    Raises:
        ConfigError: a space or documents that can't be.
    """
    space = Space(config.space, base, check)
    candidates = _candidates(config, space, seed)
    search, held_out = _documents(config, min(task.documents for task in tasks), limit)
    if config.asha and len(search) <= config.first_documents:
        raise ConfigError(
            f"the first settings are dropped after {config.first_documents} documents, and the search has only "
            f"{len(search)}: lower it, or leave asha out",
            "sweep.first_documents",
        )
    return Plan(
        space=space,
        candidates=candidates,
        official=next((one for one in candidates or () if one.sampler == base), Candidate("official", {}, base)),
        trials=config.samples if candidates is None else len(candidates),
        search=search,
        held_out=held_out,
        asked=sum(min(task.documents, len(search)) for task in tasks),
    )


def rows(plan: Plan, config: SweepConfig, tasks: Sequence[Loaded]) -> list[dict[str, Any]]:
    """A plan as rows of a table."""
    each, held_out = len(tasks) * len(plan.search), len(tasks) * len(plan.held_out)
    at_most = (plan.trials + (plan.official.name == "official")) * each
    return [
        {"what": "settings", "number": f"{plan.trials}, by {config.searcher}{' with asha' if config.asha else ''}"},
        {"what": "documents of the search", "number": _places(plan.search, tasks)},
        {"what": "held-out documents", "number": _places(plan.held_out, tasks)},
        {"what": "answers at most", "number": f"{at_most:,} and {config.confirm + 1} x {held_out:,} held out"},
        {"what": "combinations that can't be", "number": str(len(plan.space.impossible))},
    ]


def _places(places: range, tasks: Sequence[Loaded]) -> str:
    if not places:
        return "none"
    return f"{len(places)} ({places.start} to {places.stop - 1}) of {', '.join(task.name for task in tasks)}"


def _candidates(config: SweepConfig, space: Space, seed: int) -> tuple[Candidate, ...] | None:
    if config.searcher in ("tpe", "nsga2"):
        space.sample(1, seed)  # raises where nothing is possible
        return None
    found = space.grid() if config.searcher == "grid" else space.sample(config.samples, seed)
    if config.asha:  # in a grid's order settings may get better and better, and none would be dropped
        order = np.random.default_rng(seed).permutation(len(found))
        found = [found[index] for index in order]
    return tuple(found)


def _documents(config: SweepConfig, there: int, limit: int | None) -> tuple[range, range]:
    most = there if limit is None else min(there, limit)
    searched, held_out = config.documents, config.holdout
    if held_out is None:
        held_out = most // 3 if searched is None else min(most // 3, max(most - searched, 0))
    if searched is None:
        searched = most - held_out
    if searched < 1 or searched + held_out > most:
        raise ConfigError(
            f"{max(searched, 0)} documents for the search and {held_out} held-out ones are more than there are: {most}"
            + (f" (of {there}, evaluate.limit)" if most < there else ""),
            "sweep.documents" if config.documents is not None else "sweep.holdout",
        )
    return range(searched), range(searched, searched + held_out)
