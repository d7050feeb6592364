"""A sweep from the first question to what it found: workers, the official setting, the search, held-out documents."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dllm_ray import cluster
from dllm_ray.answers import changes
from dllm_ray.config import to_dict
from dllm_ray.errors import DllmRayError, EvaluationError, OutputError, first_line
from dllm_ray.evaluation.suite import Ask
from dllm_ray.metrics import Labels
from dllm_ray.models.config import ModelConfig
from dllm_ray.output import complete_file, exclusive
from dllm_ray.tuning import published, results
from dllm_ray.tuning.answered import Answered
from dllm_ray.tuning.config import SweepConfig
from dllm_ray.tuning.judge import Budget, Judge
from dllm_ray.tuning.plan import Plan
from dllm_ray.tuning.results import Findings
from dllm_ray.tuning.search import Search, Told
from dllm_ray.tuning.space import Candidate
from dllm_ray.tuning.trial import JUDGE
from dllm_ray.tuning.tried import Tried
from dllm_ray.workers import result_of

_LATER = ("max_minutes", "max_documents", "concurrent", "background", "confirm", "confidence", "tolerance")
"""Settings of a sweep that may change when it goes on."""


_OWN = ("settings", "tune", "held_out")
"""Folders that a sweep makes, and clears where it begins anew."""


@dataclass(frozen=True)
class Took:
    """What a search took."""

    trials: int
    different: int
    """Settings; searchers may draw one again."""
    asked: int
    """Documents answered, those from disk not counted."""
    seconds: float
    busy_s: float
    """Workers' time for answers, divided by the workers."""

    @property
    def overhead_s(self) -> float:
        """Seconds of each trial in which workers could have answered."""
        return (self.seconds - self.busy_s) / max(self.trials, 1)


class State:
    """How far the sweep in a folder has come; a context manager that keeps other sweeps out of the folder meanwhile.

    Args:
        folder: of the sweep.
        key: all that trials depend on, as plain values.
        fresh: begin anew.

    Raises:
        OutputError: the folder holds a sweep with another key, something else, or is in use.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any], fresh: bool):
        self._file = folder / "state.json"
        self._lock = exclusive(folder)
        try:
            self._tree = self._read(folder, json.loads(json.dumps(key)), fresh)
        except BaseException:
            self._lock.close()
            raise
        self.goes_on = not fresh and "run_id" in self._tree and not self._tree.get("spent")
        """Whether a search was broken off, or is done. What ran out of budget is begun anew: answers are on disk."""
        if not self.goes_on:
            for name in _OWN:
                shutil.rmtree(folder / name, ignore_errors=True)
            self._tree.pop("spent", None)
        self.note()

    @property
    def run_id(self) -> str | None:
        """Of the sweep's MLflow run."""
        return self._tree.get("run_id")

    def note(self, **facts: Any) -> None:
        """Keeps facts."""
        self._tree |= facts
        with complete_file(self._file) as file:
            json.dump(self._tree, file, indent=2)

    def __enter__(self) -> "State":
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.close()

    def _read(self, folder: Path, key: dict[str, Any], fresh: bool) -> dict[str, Any]:
        """What an earlier run has noted, or the beginning of it."""
        if not self._file.exists():
            others = [name for name in _OWN if (folder / name).exists()]
            if others:
                raise OutputError(
                    f"{folder} holds {', '.join(others)}, which no sweep has left: name another output_dir"
                )
            return {"key": key}
        if fresh:
            return {"key": key}
        try:
            tree = json.loads(self._file.read_text(encoding="utf-8"))
            changed = changes(tree["key"], key)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise OutputError(
                f"{self._file} can't be read ({first_line(error)}): say --fresh to begin anew; answers on disk are kept"
            ) from None
        if changed:
            raise OutputError(
                f"{folder} holds a sweep with other settings: {'; '.join(changed)}. Name another output_dir, or say "
                "--fresh to begin anew; answers on disk are kept"
            )
        return tree


def state_key(model: Mapping[str, Any], config: SweepConfig, ask: Ask, seed: int) -> dict[str, Any]:
    """All that the trials of a sweep depend on.

    Args:
        model: of `answers.model_key`.
        config: of the sweep.
        ask: what is asked.
        seed: of requests and settings.
    """
    kept = {f"sweep.{name}": value for name, value in to_dict(config).items() if name not in _LATER}
    asked = {f"evaluate.{name}": value for name, value in ask.settings().items() if name not in ("sampler", "name")}
    sampler = {f"sampler.{name}": value for name, value in to_dict(ask.sampler).items()}
    return {**model, **kept, **asked, **sampler, "seed": seed}


@dataclass(frozen=True)
class Sweep:
    """A planned sweep.

    Args:
        model: the model.
        ask: the task, and the settings that the sweep begins with.
        config: of the sweep.
        plan: worked out.
        score: metric and filter that settings are compared by.
        seed: of requests, few-shot examples and searchers.
        folder: exists.
        cache: folder or URI of finished answers.
        run_name: of its MLflow run, for its metrics.
    """

    model: ModelConfig
    ask: Ask
    config: SweepConfig
    plan: Plan
    score: tuple[str, str]
    seed: int
    folder: Path
    cache: str
    run_name: str

    def run(
        self,
        facts: Mapping[str, Any],
        state: State,
        begin: Callable[[Tried], None],
        listen: Callable[[Told, Answered | None], None],
    ) -> tuple[Findings, Took, list[Told]]:
        """Runs it.

        Args:
            facts: of the machine, for results.
            state: of the sweep's folder.
            begin: is told what the official setting gave, before the search.
            listen: is told of trials' results.

        Returns:
            What was found; what the search took; the last word of each trial.

        Raises:
            EvaluationError: the budget was spent before any setting had answered.
            DllmRayError: what the official setting met.
        """
        until = None if self.config.max_minutes is None else time.time() + 60 * self.config.max_minutes
        with self._judge(Budget(until, self.config.max_documents), facts) as (judge, concurrent):
            official = self._ask(judge, self.plan.official, self.plan.search, "settings")
            if official is None:
                raise EvaluationError(
                    "the budget was spent before the official setting had answered: raise sweep.max_minutes"
                )
            begin(official)
            search = Search(
                self.config, self.plan.space, self.plan.candidates, len(self.plan.search), self.seed, self.folder,
                concurrent,
            )  # fmt: skip
            before, began = ray.get(judge.work.remote()), time.monotonic()
            told = search.run(lambda one: listen(one, Answered.read(one.folder)), state.goes_on)
            seconds, after = time.monotonic() - began, ray.get(judge.work.remote())
            took = Took(len(told), len({one.name for one in told}), after[0] - before[0], seconds, after[1] - before[1])
            unfinished = sum(one.result.get("ended") == "budget" for one in told)
            state.note(spent=bool(unfinished))
            tried = _distinct([official, *filter(None, map(_tried, told))])
            found = results.find(tried, official.name, self.config, self._published_best())
            found = replace(found, unfinished=unfinished)
            held_out, unconfirmed = self._confirm(judge, found)
        if held_out:
            found = results.with_held_out(found, held_out, self.config.confidence)
        elif unconfirmed:
            found = replace(found, unconfirmed=unconfirmed)
        return found, took, told

    def _confirm(self, judge: Any, found: Findings) -> tuple[dict[str, Tried], str]:
        """The chosen settings on held-out documents; or none, and why."""
        if not self.plan.held_out:
            return {}, ""
        chosen = found.chosen(self.config.confirm)
        settings = [Candidate(name, dict(found.named(name).changes), found.named(name).sampler) for name in chosen]
        calls = [self._call(judge, one, self.plan.held_out, "held_out") for one in settings]
        try:
            answers = {
                one.name: _as_tried(one, answered, True)
                for one, call in zip(settings, calls, strict=True)
                if (answered := result_of(call)) is not None
            }
        except DllmRayError as error:  # what the search has found is not lost
            return {}, first_line(error)
        if found.official not in answers:
            return {}, "the budget was spent before; the same command with a larger one asks them"
        return answers, ""

    def _ask(self, judge: Any, candidate: Candidate, documents: range, where: str) -> Tried | None:
        answered = result_of(self._call(judge, candidate, documents, where))
        return None if answered is None else _as_tried(candidate, answered, True)

    def _call(self, judge: Any, candidate: Candidate, documents: range, where: str) -> Any:
        from dllm_ray.tuning.search import setting_folder

        sampler = candidate.sampler if isinstance(candidate.sampler, Mapping) else to_dict(candidate.sampler)
        folder = setting_folder(self.folder / where, candidate.name)
        return judge.answer.remote(sampler, documents, str(folder), candidate.name)

    def _published_best(self) -> float | None:
        if self.config.background is None:
            return None
        return max(score for points in published.curves(self.config.background).values() for _, score in points)

    @contextmanager
    def _judge(self, budget: Budget, facts: Mapping[str, Any]) -> Iterator[tuple[Any, int]]:
        """The judge with its workers, and how many settings it is asked at a time."""
        config = self.ask.evaluate
        with cluster.connect(config.workers or 2):
            shares = cluster.shares(config.workers, config.cpus_per_worker, config.gpus_per_worker, "evaluate.")
            concurrent = self.plan.concurrent(self.config, shares.workers, config.batch_size)
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            judge = (
                ray.remote(Judge)
                .options(name=JUDGE, num_cpus=0, max_concurrency=concurrent + 2, scheduling_strategy=here)
                .remote(
                    self.model,
                    shares,
                    config.threads_per_worker,
                    self.ask,
                    self.seed,
                    self.cache,
                    self.score,
                    budget,
                    facts,
                    Labels("sweep", self.run_name, self.model.path),
                )
            )
            try:
                yield judge, concurrent
            finally:
                ray.kill(judge)  # and with it its workers


def _tried(told: Told) -> Tried | None:
    answered = Answered.read(told.folder)
    if answered is None or told.error is not None:
        return None
    return _as_tried(told, answered, told.result.get("ended") == "complete")


def _as_tried(setting: Candidate | Told, answered: Answered, complete: bool) -> Tried:
    sampler = setting.sampler if isinstance(setting.sampler, Mapping) else to_dict(setting.sampler)
    return Tried(
        name=setting.name,
        changes=setting.changes,
        sampler=sampler,
        scores=answered.scores,
        tpf=answered.tpf,
        tokens_per_s=answered.tokens_per_s,
        nfe=answered.nfe,
        complete=complete,
    )


def _distinct(tried: Sequence[Tried]) -> list[Tried]:
    """One of each name; the official setting may be among the trials."""
    return list({one.name: one for one in tried}.values())
