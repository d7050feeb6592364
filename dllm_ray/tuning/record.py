"""A sweep in MLflow: one run, and a child for each setting."""

from pathlib import Path
from typing import Any

from dllm_ray.tuning.answered import Answered
from dllm_ray.tuning.results import Findings
from dllm_ray.tuning.search import Told
from dllm_ray.tuning.sweep import Took


class Children:
    """Records a child of the sweep's run for each trial that is over, once, also where the sweep goes on after a kill.

    Args:
        run: the sweep's, open.
    """

    def __init__(self, run: Any):
        self._run = run
        self._known = run.children()

    def tell(self, told: Told, answered: Answered | None) -> None:
        """Takes in a trial's result. A child that a broken-off run has left is brought up to date."""
        if not told.over or answered is None or told.error is not None:
            return
        figures = {name: getattr(answered, name) for name in ("score", "tpf", "tokens_per_s", "nfe", "seconds")}
        figures["documents"] = len(answered.scores)
        known, before = self._known.get(told.name, (None, {}))
        if all(before.get(name) == value for name, value in figures.items()):
            return
        run_id = self._run.child(
            told.name,
            figures,
            {"dllm_ray.job": "sweep-setting", "dllm_ray.sweep.ended": str(told.result.get("ended") or "dropped")},
            {"sampler": dict(told.sampler)},
            known,
        )
        self._known[told.name] = (run_id, figures)


def findings(run: Any, found: Findings, took: Took, files: list[Path]) -> None:
    """Records what a sweep has found on its run."""
    points: dict[str, float] = {"trials": took.trials, "asked": took.asked, "overhead_s": took.overhead_s}
    for role, name in (("best", found.best), ("recommended", found.recommended), ("official", found.official)):
        one = found.named(name)
        points |= {f"{role}/score": one.score, f"{role}/tpf": one.tpf, f"{role}/tokens_per_s": one.tokens_per_s}
    for held_out in found.held_out:
        if held_out.name == found.recommended:
            points["recommended/held_out_score"] = held_out.interval.mean
    run.log(points)
    run.tag(
        {f"dllm_ray.sweep.{role}": name for role, name in (("best", found.best), ("recommended", found.recommended))}
    )
    for file in files:
        run.file(file, "configs" if file.parent.name == "configs" else None)
