"""Runs lm-eval tasks against an adapter: finds tasks, points them at local data, collects results."""

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dllm_ray.data import sources
from dllm_ray.errors import EvaluationError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.evaluation.lm import DiffusionHarness

TASKS = Path(__file__).parent / "tasks"
"""Tasks of our own."""

_LOCAL_FILES = "local_files"  # the group that stands in for tasks over local data; nobody asked for it by name


def check_tasks(config: EvaluateConfig, section: str = "evaluate") -> None:
    """Checks before anything is loaded: folders, and the data files of tasks over local data, which are read through.

    Args:
        config: what is to be asked.
        section: the settings' name in messages.

    Raises:
        EvaluationError: what is missing.
        DataError: a file is broken; the line is named.
    """
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise EvaluationError(f"{section}.include_path {config.include_path}: no such folder")
    ours = _our_tasks(config)
    for task in config.data_files:
        if task not in config.tasks:
            raise EvaluationError(f"{section}.data_files names {task!r}, which is not among {section}.tasks")
    for task in config.tasks:
        settings = ours.get(task, {})
        files = settings.get("dataset_kwargs", {}).get("data_files")
        if task in config.data_files:
            files = {"test": config.data_files[task]}
        for file in files.values() if isinstance(files, Mapping) else ():
            _check_file(task, file, _columns(settings), section)


def evaluate(model: DiffusionHarness, config: EvaluateConfig, seed: int) -> dict[str, Any]:
    """Runs the tasks.

    Args:
        model: answers the requests.
        config: what to ask.
        seed: seeds the choice of few-shot examples.

    Returns:
        lm-eval's own result: `results`, `configs`, `n-samples`, `samples`, ...

    Raises:
        EvaluationError: an unknown task, or one whose data can't be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from datasets.exceptions import DatasetsError
    from lm_eval import simple_evaluate

    manager = _task_manager(config)
    tasks: list[str | dict[str, Any]] = [task for task in config.tasks if task not in config.data_files]
    if config.data_files:
        # lm-eval lays changes over a task of its index only where the task is the member of a group
        members = [
            {"task": task, "dataset_kwargs": {"data_files": {"test": str(Path(file).resolve())}}}
            for task, file in config.data_files.items()
        ]
        tasks.append({"group": _LOCAL_FILES, "task": members})
    try:
        results = simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            apply_chat_template=config.chat_template,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
        for part in results.values():
            if isinstance(part, dict):
                part.pop(_LOCAL_FILES, None)
        return results
    except (OSError, ConnectionError, DatasetsError) as error:
        raise EvaluationError(
            f"the data of {', '.join(config.tasks)} can't be had: {str(error).strip().splitlines()[0]}. Give a local "
            "file with evaluate.data_files, e.g. --evaluate.data_files.TASK test.jsonl"
        ) from error


def metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, without standard errors and filter names where a metric has one filter only."""
    flat: dict[str, dict[str, float]] = {}
    for task, values in results["results"].items():
        named = [key.split(",") for key in values if "," in key and "_stderr" not in key]
        several = {name for name, *_ in named if sum(other[0] == name for other in named) > 1}
        flat[task] = {
            (f"{name}.{filters}" if name in several else name): values[f"{name},{filters}"]
            for name, filters in named
            if isinstance(values[f"{name},{filters}"], int | float)
        }
    return flat


def _task_manager(config: EvaluateConfig):
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS), *([config.include_path] if config.include_path else [])]
    # lm-eval's own 14,000 tasks take a quarter of a minute to index; most runs need none of them
    manager = TaskManager(include_path=folders, include_defaults=False)
    missing = [task for task in config.tasks if task not in manager.task_index]
    if not missing:
        return manager
    manager = TaskManager(include_path=folders)
    unknown = [task for task in config.tasks if task not in manager.task_index and not Path(task).is_file()]
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(manager.task_index), n=3, cutoff=0.5)
        hint = f"; the nearest names: {', '.join(near)}" if near else ""
        raise EvaluationError(f"no task {unknown[0]!r}{hint}")
    return manager


def _our_tasks(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    folders: Sequence[Path] = [TASKS, *([Path(config.include_path)] if config.include_path else [])]
    tasks = {}
    for folder in folders:
        for path in sorted(folder.rglob("*.yaml")):
            try:
                tree = yaml.load(path.read_text(encoding="utf-8"), Loader)
            except yaml.YAMLError as error:
                raise EvaluationError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
            if isinstance(tree, dict) and isinstance(tree.get("task"), str):
                tasks[tree["task"]] = tree
    return tasks


def _columns(task: Mapping[str, Any]) -> set[str]:
    """The columns that a task's question and answer name. lm-eval would take the name of a missing one for text."""
    columns: set[str] = set()
    for text in (task.get("doc_to_text"), task.get("doc_to_target")):
        if isinstance(text, str):
            columns |= {text} if text.isidentifier() else set(re.findall(r"{{\s*(\w+)", text))
    return columns


def _check_file(task: str, file: str, columns: set[str], section: str) -> None:
    if not any(mark in file for mark in "*?[") and "://" not in file and not Path(file).is_file():
        raise EvaluationError(
            f"task {task}: no such data file: {file}. Name one with --{section}.data_files.{task} FILE"
        )
    if Path(file).suffix not in (".jsonl", ".json", ".csv", ".parquet"):
        return  # compressed, or something else that the harness may know
    for shard in sources.resolve(file):
        for number, row in shard.read():
            missing = sorted(columns - row.keys())
            if missing:
                raise EvaluationError(
                    f"task {task}: {shard.where(number)}: no column {', '.join(map(repr, missing))}, found "
                    f"{', '.join(map(repr, row))}"
                )
