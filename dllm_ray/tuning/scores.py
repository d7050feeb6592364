"""The score of each document, out of lm-eval's results: what settings are compared by."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dllm_ray.errors import ConfigError, EvaluationError
from dllm_ray.evaluation.run import Loaded

_FIELD = "sweep.metric"


def choose(tasks: Sequence[Loaded], metric: str | None) -> tuple[str, str]:
    """The metric and the filter that settings are compared by.

    Args:
        tasks: what is asked.
        metric: as the user wrote it: `exact_match`, or with a filter as lm-eval (`exact_match,flexible-extract`) or our
            tables (`exact_match.flexible-extract`) write it; None: the first of the first task.

    Raises:
        ConfigError: a task has no such metric, it is no mean over documents, or less of it is better.
    """
    from lm_eval.api.metrics import mean

    for task in tasks:
        if task.output_type != "generate_until":
            raise ConfigError(
                f"task {task.name} is scored by likelihoods, which no setting of the sampler changes: name a task that "
                "generates",
                "evaluate.tasks",
            )
    name, _, way = (metric or next(iter(tasks[0].metrics))).replace(",", ".", 1).partition(".")
    way = way or tasks[0].filters[0]
    for task in tasks:
        if name not in task.metrics:
            raise ConfigError(f"task {task.name} has no metric {name!r}, but {', '.join(task.metrics)}", _FIELD)
        if way not in task.filters:
            raise ConfigError(f"task {task.name} has no filter {way!r}, but {', '.join(task.filters)}", _FIELD)
        if task.metrics[name] is not mean:
            known = [other for other, how in task.metrics.items() if how is mean]
            raise ConfigError(
                f"{name} of task {task.name} is no mean over documents, so settings can't be compared document by "
                f"document; those that are: {', '.join(known) or 'none'}",
                _FIELD,
            )
        if not task.higher_is_better.get(name, True):
            raise ConfigError(
                f"less of {name} of task {task.name} is better: name one that is better the higher", _FIELD
            )
    return name, way


def label(tasks: Sequence[Loaded], score: tuple[str, str]) -> str:
    """What a score is called: with its filter, where there are several."""
    return ",".join(score) if any(len(task.filters) > 1 for task in tasks) else score[0]


def per_document(results: Mapping[str, Any], metric: str, way: str) -> dict[str, float]:
    """Score by document, named `TASK/PLACE`, in the order of tasks and documents.

    Args:
        results: of lm-eval, with samples.
        metric, way: of `choose`.

    Raises:
        EvaluationError: they are no numbers, or there are none.
    """
    found = {}
    for task, samples in results["samples"].items():
        for sample in samples:
            if sample["filter"] == way and metric in sample:
                found[f"{task}/{sample['doc_id']}"] = _number(sample[metric], task, metric)
    if not found:
        raise EvaluationError(f"no document has {metric} (filter {way}): ask more documents, or name another metric")
    return dict(sorted(found.items(), key=lambda item: (item[0].rpartition("/")[0], int(item[0].rpartition("/")[2]))))


def _number(value: Any, task: str, metric: str) -> float:
    if not isinstance(value, numbers.Real | np.bool_) or not math.isfinite(value):
        raise EvaluationError(f"task {task} gives {value!r} as a document's {metric}: expected a number")
    return float(value)
