"""What an evaluation leaves: results in lm-eval's own form with the sampler's figures, documents as JSON lines, and the
same in MLflow."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dllm_ray.evaluation.run import metrics, standard_errors
from dllm_ray.evaluation.suite import Ask
from dllm_ray.output import complete_file

SETTING = "setting.json"
"""Artifact of a run: all its settings."""


def write(folder: Path, ask: Ask, results: dict[str, Any], figures: Mapping[str, float], facts: Mapping) -> list[Path]:
    """Writes the files of one ask.

    Args:
        folder: exists.
        ask: what was asked.
        results: of lm-eval.
        figures: of the sampler and the pool.
        facts: machine, package versions and seeds that the results depend on.

    Returns:
        The files: `results.json`, and `samples_TASK.jsonl` for each task.

    Raises:
        OutputError: they can't be written.
    """
    from lm_eval.utils import handle_non_serializable

    samples = results.pop("samples", {})
    results["sampler"] = {**figures, "settings": ask.settings()["sampler"]}
    results["setting"] = ask.settings()
    results["environment"] = dict(facts)
    files = [folder / "results.json"]
    with complete_file(files[0]) as file:
        json.dump(results, file, indent=2, default=handle_non_serializable, ensure_ascii=False)
    for task, documents in samples.items():
        files.append(folder / f"samples_{task.replace('/', '_')}.jsonl")
        with complete_file(files[-1]) as file:
            for document in documents:
                file.write(json.dumps(document, default=handle_non_serializable, ensure_ascii=False) + "\n")
    return files


def tags(ask: Ask) -> dict[str, str]:
    """Tags that say what a run asked."""
    named = {"setting": ask.name, "reference": ask.reference, "metric": ask.metric}
    named["task"] = ",".join(ask.evaluate.tasks)
    return {f"dllm_ray.eval.{name}": value for name, value in named.items() if value}


def record(run, ask: Ask, results: Mapping[str, Any], figures: Mapping[str, float], files: list[Path]) -> None:
    """Records an ask's results on an open run of MLflow."""
    points = {f"eval/{task}/{name}": value for task, part in metrics(results).items() for name, value in part.items()}
    for task, part in standard_errors(results).items():
        points |= {f"eval/{task}/{name}_stderr": value for name, value in part.items()}
    points |= {f"sampler/{name}": value for name, value in figures.items()}
    run.log({metric_key(name): value for name, value in points.items()})
    run.tag(tags(ask))
    run.json(SETTING, ask.settings())
    for file in files:
        run.file(file)


def metric_key(name: str) -> str:
    """A metric's name with the characters that MLflow takes: `pass@1` is `pass_at_1` there."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))


def rows(told: Sequence[tuple[Ask, Mapping[str, Any], Mapping[str, float]]]) -> list[dict[str, Any]]:
    """Rows of a table for the terminal: one for each task, or for each metric where tasks have different ones.

    Args:
        told: what was asked, lm-eval's results and our figures.
    """
    found = []
    for ask, results, figures in told:
        errors = standard_errors(results)
        for task, values in metrics(results).items():
            documents = results["n-samples"].get(task, {}).get("effective", "")  # a group has none of its own
            head = {"setting": ask.name or "main", "task": task, "docs": documents}
            speed = {"tok/forward": figures["tpf"], "tok/s": round(figures["tokens_per_s"])}
            found.append((head, values, errors.get(task, {}), speed if figures["tokens"] else {}))
    if len({frozenset(values) for _, values, _, _ in found}) == 1:
        return [head | values | speed for head, values, _, speed in found]
    return [
        head | {"metric": name, "value": value, "stderr": errors.get(name, "")} | speed
        for head, values, errors, speed in found
        for name, value in values.items()
    ]
