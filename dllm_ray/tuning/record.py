"""A sweep in MLflow: one run, and a child for each setting."""

import json
from pathlib import Path
from typing import Any

from dllm_ray.output import complete_file
from dllm_ray.tuning.answered import Answered
from dllm_ray.tuning.results import Findings
from dllm_ray.tuning.search import Told
from dllm_ray.tuning.sweep import Took

_FILE = "children.json"


class Children:
    """Records a child of the sweep's run for each trial that is over, once.

    Args:
        run: the sweep's, open.
        folder: of the sweep; which trials have a child is kept there, for a sweep that goes on.
    """

    def __init__(self, run: Any, folder: Path):
        self._run, self._file = run, folder / _FILE
        known = json.loads(self._file.read_text(encoding="utf-8")) if self._file.is_file() else {}
        self._ids: dict[str, str] = known.get("children", {}) if known.get("run") == run.run_id else {}

    def tell(self, told: Told, answered: Answered | None) -> None:
        """Takes in a trial's result."""
        if not told.over or answered is None or told.error is not None or told.name in self._ids:
            return
        figures = {name: getattr(answered, name) for name in ("score", "tpf", "tokens_per_s", "nfe", "seconds")}
        self._ids[told.name] = self._run.child(
            told.name,
            {**figures, "documents": len(answered.scores), "asked": answered.asked},
            {"dllm_ray.job": "sweep-setting", "dllm_ray.sweep.ended": str(told.result.get("ended") or "dropped")},
            {"sampler": dict(told.sampler)},
        )
        with complete_file(self._file) as file:
            json.dump({"run": self._run.run_id, "children": self._ids}, file)


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
