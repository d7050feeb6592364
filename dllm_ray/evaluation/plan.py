"""What an evaluation would take: documents, requests and their lengths, and the time by a short probe of the model."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from dllm_ray.evaluation.answering import Pool
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.evaluation.likelihood import estimate
from dllm_ray.evaluation.suite import Ask
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.viz.terminal import duration

_PROBE_S = 10.0
"""How long a setting is tried out."""
_GENERATE = "generate_until"


@dataclass
class Planned:
    """What one task of an ask would take."""

    setting: str
    task: str
    documents: int
    counts: dict[str, int]
    """Requests by type."""
    lengths: list[int]
    """Tokens of each request."""
    seconds: float | None = None
    """Estimate for the whole pool."""

    def row(self) -> dict[str, Any]:
        """A row of a table."""
        return {
            "setting": self.setting or "main",
            "task": self.task,
            "docs": self.documents,
            "requests": ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items()),
            "tokens, median": round(median(self.lengths)) if self.lengths else 0,
            "longest": max(self.lengths, default=0),
            "estimate": "" if self.seconds is None else duration(self.seconds),
        }


def timed(planned: Sequence[Planned], ask: Ask, pool: Pool, context: int | None) -> list[Planned]:
    """The same with the time that they take, after a probe of each: a slice of requests of median length. Answers that
    an end-of-text token or a threshold finishes early make it shorter, and so do those that are on disk."""
    work, places = [], []
    for place, plan in enumerate(planned):
        if not plan.lengths:
            continue
        length = max(round(median(plan.lengths)), 1)
        if _GENERATE in plan.counts:
            room = None if context is None else context - (ask.sampler.max_new_tokens or 1)
            rows = min(ask.evaluate.batch_size, sum(plan.counts.values()))
            work.append((min(length, room or length), rows, ask.sampler))
        else:
            work.append((min(length, context or length), 1, ask.likelihood))
        places.append(place)
    found = list(planned)
    for index, seconds, _ in pool.run(_probe, work):
        plan, (length, rows, _) = planned[places[index]], work[index]
        total = sum(plan.counts.values()) / rows if _GENERATE in plan.counts else sum(plan.lengths) / length
        found[places[index]] = replace(plan, seconds=seconds * total / min(pool.workers, max(total, 1)))
    return found


def _probe(lm: DiffusionLM, length: int, rows: int, config: SamplerConfig | LikelihoodConfig) -> float:
    """Seconds that a slice takes."""
    token = next(token for token in range(len(lm.tokenizer)) if token not in lm.tokenizer.all_special_ids)
    if isinstance(config, LikelihoodConfig):
        prefix = max(length // 2, 1)
        pair = ([token] * prefix, [token] * max(length - prefix, 1))
        few = replace(config, mc_num=min(config.mc_num, config.batch_size), adaptive=False)
        estimate(lm, [pair], few, [0])  # what a first call takes longer
        began = time.perf_counter()
        (found,) = estimate(lm, [pair], few, [0])
        return (time.perf_counter() - began) * config.mc_num / max(found.copies, 1)
    sampler = Sampler(lm, config)
    written, gone, began = 0, dict.fromkeys(range(rows), 0.0), None
    for commit in sampler.stream([[token] * length] * rows):
        if began is None:
            began = time.perf_counter()
            continue
        written += len(commit.positions)
        gone[commit.row] = 1.0 if commit.done else (commit.step + 1) / config.steps
        if time.perf_counter() - began > _PROBE_S:
            break
    taken = time.perf_counter() - (began or 0.0)
    if sampler.edits:  # how much it will write isn't known, but how far its clock has come
        return taken * rows / max(sum(gone.values()), 1 / config.steps)
    return taken * rows * (config.max_new_tokens or 1) / max(written, 1)
