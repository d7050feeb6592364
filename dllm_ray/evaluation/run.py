"""Runs lm-eval tasks against an adapter: finds tasks, points them at local data, collects results."""

import difflib
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from dllm_ray.errors import DataError, EvaluationError, first_line
from dllm_ray.evaluation.config import EvaluateConfig

TASKS = Path(__file__).parent / "tasks"
"""Tasks of our own."""

_MANY = "task_for_each_file"  # metadata of a task that becomes a group when it is asked over several files
_STANDS_IN = "stands_in_for"  # metadata of a task over local files: the hub data set whose rows it takes
_PROGRAM_RUNNER = '"code_eval"'  # what a task's own module asks for if its programs are run in the sandbox
_ROW_FILES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".txt")


def check_tasks(config: EvaluateConfig, section: str = "evaluate") -> None:
    """Checks before anything is loaded: names, leave to run code, and data files, which are read through.

    Tasks that are not ours cost a quarter of a minute, as lm-eval's thousands are indexed.

    Args:
        config: what is to be asked.
        section: the settings' name in messages.

    Raises:
        EvaluationError: an unknown task, what is missing, or code may not be run or can't be shut in.
        DataError: a file is broken; the line is named.
    """
    if config.include_path is not None and not Path(config.include_path).is_dir():
        raise EvaluationError(f"{section}.include_path {config.include_path}: no such folder")
    for task in config.data_files:
        if task not in config.tasks:
            raise EvaluationError(f"{section}.data_files names {task!r}, which is not among {section}.tasks")
    index = _index(config)
    asked = Counter(name for task in config.tasks for name in set(index.below(task)))
    for name in (name for name, times in asked.items() if times > 1):
        raise EvaluationError(f"{section}.tasks asks {name} twice, by itself or as a part of groups: leave one out")
    _check_programs(config, index, section)
    for task in config.tasks:
        tree = _tree(task, index)
        files = (tree.get("dataset_kwargs") or {}).get("data_files")
        if task in config.data_files:
            if "group" in tree:
                raise EvaluationError(
                    f"{section}.data_files names {task!r}, which is a group: name its tasks one by one"
                )
            files = {"test": config.data_files[task]}
        for file in files.values() if isinstance(files, Mapping) else ():
            _check_file(task, file, _columns(tree), section)


def check_written(config: EvaluateConfig) -> None:
    """Makes sure, by their YAML alone, that tasks ask for texts and not for likelihoods.

    Raises:
        EvaluationError: one asks for likelihoods, or is unknown.
    """
    index = _index(config)
    for name in (name for task in config.tasks for name in index.below(task)):
        kind = _tree(name, index).get("output_type", "generate_until")
        if kind != "generate_until":
            raise EvaluationError(
                f"task {name} ({kind}) asks for likelihoods, which a model that edits doesn't have: choose tasks that "
                "generate"
            )


def check_data(config: EvaluateConfig) -> None:
    """Loads the tasks with their data once, before the model is; what was fetched or read from the hub then lies on
    disk.

    Raises:
        EvaluationError: the data of a task can't be had, or a package it needs is missing.
        DataError: a file doesn't hold what its task needs.
    """
    _load(config, _index(config))


@dataclass(frozen=True)
class Loaded:
    """A task with its data, as lm-eval knows it."""

    name: str
    documents: int
    metrics: Mapping[str, Any]
    """Metric -> how its values over documents become one."""
    higher_is_better: Mapping[str, bool]
    filters: Sequence[str]
    """Names of the ways in which answers are read; each metric has a value for each."""
    output_type: str = "generate_until"
    """Or `multiple_choice`, `loglikelihood`, ..."""


def look_up(config: EvaluateConfig) -> list[Loaded]:
    """The tasks that are asked, groups by their members.

    Raises:
        EvaluationError, DataError: as `check_data`.
    """
    return [
        Loaded(
            task.task_name,
            len(task.eval_docs),
            task.aggregation(),
            task.higher_is_better(),
            [entry["name"] for entry in task.config.filter_list or [{"name": "none"}]],
            task.OUTPUT_TYPE,
        )
        for task in _members_of(_load(config, _index(config)))
    ]


def metric_names(task: Loaded) -> list[str]:
    """The names that a task's scores have in `metrics`."""
    if len(task.filters) == 1:
        return list(task.metrics)
    return [f"{metric}.{name}" for metric in task.metrics for name in task.filters]


def evaluate(model, config: EvaluateConfig, seed: int, documents: range | None = None) -> dict[str, Any]:
    """Runs the tasks.

    Args:
        model: lm-eval's `LM` that answers the requests.
        config: what to ask.
        seed: seeds the choice of few-shot examples.
        documents: places of the documents of each task that are asked, in place of the first `limit`.

    Returns:
        lm-eval's own result: `results`, `configs`, `n-samples`, `samples`, ...

    Raises:
        EvaluationError: an unknown task, one whose data can't be had, one that may not run code, or one without any of
            the documents.
    """
    from lm_eval import simple_evaluate

    index = _index(config)
    _check_programs(config, index, "evaluate")
    loaded = _load(config, index)
    chosen = None
    if documents is not None:
        chosen = {task.task_name: _places(task, documents) for task in _members_of(loaded)}
    return simple_evaluate(
        model=model,
        tasks=loaded,
        task_manager=_manager(config.include_path, index.complete),
        limit=config.limit if chosen is None else None,
        samples=chosen,
        num_fewshot=config.num_fewshot,
        apply_chat_template=config.chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        system_instruction=config.system_instruction,
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        log_samples=True,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
    )


def _places(task: Any, documents: range) -> list[int]:
    """Those of the documents that the task has."""
    found = [place for place in documents if place < len(task.eval_docs)]
    if not found:  # lm-eval would ask all
        raise EvaluationError(
            f"task {task.task_name} has {len(task.eval_docs)} documents, none of them from {documents.start} to "
            f"{documents.stop - 1}"
        )
    return found


@dataclass
class Requests:
    """What a task asks of the model."""

    task: str
    """Name of the task; groups are given by their tasks."""
    documents: int = 0
    """Documents that are asked."""
    counts: dict[str, int] = field(default_factory=dict)
    """Requests by type: `generate_until`, `loglikelihood`, `loglikelihood_rolling`."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each request: the prompt, and with likelihoods what is scored."""


def requests(model, config: EvaluateConfig, seed: int, count: Callable[[str], int]) -> list[Requests]:
    """What the tasks would ask, without asking.

    Args:
        model: lm-eval's `LM`, for its chat template.
        config: what to ask.
        seed: seeds the choice of few-shot examples.
        count: the number of tokens in a text.

    Raises:
        EvaluationError: as `evaluate`.
    """
    found = []
    for task in _members_of(_load(config, _index(config))):
        if config.num_fewshot is not None and task.get_config("num_fewshot") != 0:  # lm-eval's own rule
            task.set_config("num_fewshot", config.num_fewshot)
        task.set_fewshot_seed(seed)
        task.build_all_requests(
            limit=config.limit,
            system_instruction=config.system_instruction,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.fewshot_as_multiturn,
            chat_template=model.apply_chat_template if config.chat_template else None,
            tokenizer_name=model.tokenizer_name,
        )
        asked = [instance for instance in task.instances for _ in range(instance.repeats or 1)]
        texts = ("".join(part for part in instance.args if isinstance(part, str)) for instance in asked)
        found.append(
            Requests(
                task.task_name,
                len({instance.doc_id for instance in asked}),
                dict(Counter(instance.request_type for instance in asked)),
                [count(text) for text in texts],
            )
        )
    return found


def metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, without filter names where a metric has one filter only."""
    return {task: _named(values, "") for task, values in results["results"].items()}


def standard_errors(results: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Task -> metric -> standard error of the value, under the names of `metrics`, where lm-eval has one."""
    return {task: _named(values, "_stderr") for task, values in results["results"].items()}


def _named(values: Mapping[str, Any], suffix: str) -> dict[str, float]:
    named = [key.split(",") for key in values if "," in key and "_stderr" not in key]
    several = Counter(name for name, _ in named)
    found = {
        (f"{name}.{filters}" if several[name] > 1 else name): values.get(f"{name}{suffix},{filters}")
        for name, filters in named
    }
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


@dataclass(frozen=True)
class _Index:
    """The tasks that are known by name, as their YAML says, with functions by name."""

    trees: Mapping[str, dict[str, Any]]
    members: Mapping[str, Sequence[str]]
    """Tag -> its tasks."""
    complete: bool
    """Whether lm-eval's own tasks are among them."""

    def __contains__(self, name: str) -> bool:
        return name in self.trees or name in self.members

    def below(self, name: str) -> Iterator[str]:
        """The name, and those of a group's members, of theirs, and so on; unknown ones too."""
        yield name
        children = self.trees.get(name, {}).get("task", ())
        for child in [*self.members.get(name, ()), *(children if isinstance(children, list) else ())]:
            yield from self._inside(child)

    def _inside(self, child: str | Mapping[str, Any]) -> Iterator[str]:
        if isinstance(child, str):
            yield from self.below(child)
        elif isinstance(child.get("task"), list):  # a group inside the group, which has no name of its own
            for item in child["task"]:
                yield from self._inside(item)
        else:
            yield from self.below(child.get("task") or child.get("group"))


@lru_cache(maxsize=4)
def _manager(include_path: str | None, complete: bool):
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folders = [str(TASKS), *([include_path] if include_path else [])]
    return TaskManager(include_path=folders, include_defaults=complete)


def _index(config: EvaluateConfig) -> _Index:
    """An index with all that is asked: ours, or lm-eval's as well, where ours are not enough.

    Raises:
        EvaluationError: an unknown task, or broken YAML in `include_path`.
    """
    _check_yaml(config.include_path)
    for complete in (False, True):
        entries = _manager(config.include_path, complete).task_index
        index = _Index(
            {name: entry.cfg for name, entry in entries.items() if entry.cfg is not None},
            {name: sorted(entry.tags) for name, entry in entries.items() if entry.cfg is None},
            complete,
        )
        if all(name in index for task in config.tasks for name in index.below(task)):
            return index
    for task in config.tasks:
        if task not in index and not Path(task).is_file():
            near = difflib.get_close_matches(task, list(entries), n=3, cutoff=0.5)
            hint = f"; the nearest names: {', '.join(near)}" if near else ""
            raise EvaluationError(f"no task {task!r}{hint}")
    return index


def _check_yaml(include_path: str | None) -> None:
    """lm-eval passes over files that it can't read."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in sorted(Path(include_path).rglob("*.yaml")) if include_path else ():
        try:
            load_yaml(path, resolve_func=False)
        except Exception as error:  # of YAML, of includes, and of files, by many types
            raise EvaluationError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None


def _check_programs(config: EvaluateConfig, index: _Index, section: str) -> None:
    """Tasks that run code need leave to, and the sandbox."""
    unsafe = {
        name: task for task in config.tasks for name in index.below(task) if _tree(name, index).get("unsafe_code")
    }
    if not unsafe:
        return
    if not config.confirm_run_unsafe_code:
        raise EvaluationError(
            f"task {next(iter(unsafe.values()))} runs code that the model writes, in a sandbox: say "
            f"--{section}.confirm_run_unsafe_code true if that is what you want"
        )
    for name in unsafe:
        modules = {Path(function.rpartition(".")[0] + ".py") for function in _functions(_tree(name, index))}
        if modules and not any(_is_sandboxed(module) for module in modules):
            raise EvaluationError(f"task {name} runs code in a way of its own, outside the sandbox: leave it out")
    from dllm_ray.evaluation import sandbox

    sandbox.check()


def _functions(tree: Any) -> Iterator[str]:
    """What `!function` names in lm-eval's own tasks, as paths."""
    if isinstance(tree, Mapping | list):
        for item in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _functions(item)
    elif isinstance(tree, str) and "/lm_eval/tasks/" in tree:
        yield tree


def _is_sandboxed(module: Path) -> bool:
    return module.is_file() and _PROGRAM_RUNNER in module.read_text(encoding="utf-8")


def _tree(task: str, index: _Index) -> Mapping[str, Any]:
    """The task's YAML, of its own file where it is named by path."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return index.trees.get(task) or (load_yaml(task, resolve_func=False) if Path(task).is_file() else {})


def _load(config: EvaluateConfig, index: _Index) -> list[Any]:
    """The tasks and groups with their data.

    Raises:
        EvaluationError: the data of a task can't be had, or a package it needs is missing.
    """
    from datasets.exceptions import DatasetsError

    from dllm_ray.evaluation import passing

    manager = _manager(config.include_path, index.complete)
    loaded: list[Any] = []
    for task in config.tasks:
        tree = _tree(task, index)
        try:
            with passing.sandboxed():
                if task in config.data_files:
                    loaded.append(_over_files(manager, task, tree, config.data_files[task]))
                else:
                    loaded += _members(manager.load([task]), task)
        except ImportError as error:
            raise EvaluationError(f"task {task} needs a package that is not installed: {first_line(error)}") from error
        except (OSError, DatasetsError) as error:  # offline errors are both, or ConnectionError, an OSError
            raise EvaluationError(_without_data(task, index, error)) from error
    return loaded


def _members(loaded: Mapping[str, Any], name: str) -> list[Any]:
    """What lm-eval loaded under one name: the group, or the tasks."""
    group = loaded["groups"].get(name)
    return [group] if group is not None else list(loaded["tasks"].values())


def _members_of(loaded: Sequence[Any]) -> list[Any]:
    """The tasks, in place of the groups that hold them."""
    from lm_eval.api.task import Task

    return [task for item in loaded for task in ([item] if isinstance(item, Task) else item.get_all_tasks())]


def _over_files(manager, task: str, tree: Mapping[str, Any], file: str) -> Any:
    """A task over rows of local files, or a group of such tasks, one for each file."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    from dllm_ray.evaluation import files

    metadata = tree.get("metadata") or {}
    found = files.names(file) if metadata.get(_MANY) else [file]
    if len(found) == 1:
        return _over_file(manager, task, task, tree, found[0])
    parts = [(_over_file(manager, task, f"{task}_{Path(name).stem}", tree, name)) for name in found]
    means = [metric["metric"] for metric in tree["metric_list"] if metric["aggregation"] == "mean"]
    filters = [entry["name"] for entry in tree.get("filter_list") or [{"name": "none"}]]
    group = Group.from_config(
        GroupConfig(
            group=task,
            aggregate_metric_list=[{"metric": metric, "filter_list": filters} for metric in means],
            metadata={"version": metadata.get("version")},
        )
    )
    for part in parts:
        group.add(part)
    return group


def _over_file(manager, task: str, name: str, tree: Mapping[str, Any], file: str) -> Any:
    from dllm_ray.evaluation import files

    split = tree.get("test_split") or tree.get("validation_split") or "test"
    examples = (tree.get("fewshot_config") or {}).get("samples")
    change = {
        "task": task,
        "custom_dataset": files.dataset,
        "dataset_kwargs": {"data_files": {split: file}},
        "training_split": None,
        "validation_split": None,
        "test_split": split,
        "fewshot_split": None if examples else split,
    }
    # lm-eval lays changes over a task of its index only where the task is the member of a group
    (made,) = manager.load([{"group": "local files", "task": [change]}])["tasks"].values()
    made.config.task = name
    return made


def _without_data(task: str, index: _Index, error: Exception) -> str:
    sets = sorted({path for name in index.below(task) if (path := index.trees.get(name, {}).get("dataset_path"))})
    stand_ins = [
        name for name, tree in index.trees.items() if (tree.get("metadata") or {}).get(_STANDS_IN) in sets and sets
    ]
    own = [name for name in index.below(task) if name in index.trees and "group" not in index.trees[name]]
    ways = [f"give its rows as a local file with --evaluate.data_files.{own[0]} FILE"] if own == [task] else []
    ways += [f"ask {name} over local files, with --evaluate.data_files.{name} FILE" for name in stand_ins]
    ways += ["fetch it once with network, and set HF_HUB_CACHE to where it lies"]
    return f"the data of {task} ({', '.join(sets)}) can't be had: {first_line(error)}. To have it, {', or '.join(ways)}"


def _columns(tree: Mapping[str, Any]) -> set[str]:
    """The columns that a task's question and answer name. lm-eval would take the name of a missing one for text."""
    columns: set[str] = set()
    for text in (tree.get("doc_to_text"), tree.get("doc_to_target")):
        if isinstance(text, str) and "process_docs" not in tree:
            columns |= {text} if text.isidentifier() else set(re.findall(r"{{\s*(\w+)", text))
    return columns


def _check_file(task: str, file: str, columns: set[str], section: str) -> None:
    from dllm_ray.evaluation import files

    if not any(mark in file for mark in "*?[") and "://" not in file and not Path(file).exists():
        raise EvaluationError(
            f"task {task}: no such data file: {file}. Name one with --{section}.data_files.{task} FILE"
        )
    if not any(mark in file for mark in "*?[") and Path(file).is_file() and not file.endswith(_ROW_FILES):
        raise EvaluationError(f"task {task}: {file}: unknown file type; expected {', '.join(_ROW_FILES)}")
    rows = 0
    for where, row in files.rows(file):
        rows += 1
        missing = sorted(columns - row.keys())
        if missing:
            raise EvaluationError(
                f"task {task}: {where}: no column {', '.join(map(repr, missing))}, found {', '.join(map(repr, row))}"
            )
    if not rows:
        raise DataError(f"task {task}: {file}: no rows")
