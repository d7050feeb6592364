"""Evaluation runs beside published scores: what differs, in points, in standard errors, and in which settings.

Pure functions over what a tracking store recorded and over the files of official settings. This module reads no
tracking store and draws nothing.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from dllm_ray.config import flatten, load_yaml, read
from dllm_ray.evaluation import reference
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig
from dllm_ray.evaluation.reference import Published
from dllm_ray.evaluation.suite import asks
from dllm_ray.models.defaults import sampler_settings
from dllm_ray.sampling.config import SamplerConfig

WELL_KNOWN = ("LLaDA-8B-Instruct", "Dream-v0-Instruct-7B")
"""Published models that stand beside models on tasks of their own."""

_PERPLEXITIES = {"perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"}
_NOT_PERCENT = _PERPLEXITIES | {"brier_score", "bleu", "chrf", "ter"}
_LIKELIHOOD_METRICS = _PERPLEXITIES | {"acc", "acc_norm", "acc_bytes", "brier_score"}
_ASKED = ("num_fewshot", "chat_template", "fewshot_as_multiturn", "system_instruction", "limit")
_ASKED_GENERATION = ("until", "escape_until")
_ASKED_LIKELIHOOD = ("add_bos_token",)
_MODEL = ("model.adapter", "model.quantization", "model.dtype")
_WITHOUT_EFFECT = {"sampler.seed", "sampler.eos_early_stop", "likelihood.batch_size", "likelihood.check_greedy"}


@dataclass(frozen=True)
class Score:
    """One task of one evaluation run."""

    run_id: str
    """Its run in the tracking store."""
    model: str
    """Path or hub id."""
    task: str
    """lm-eval task."""
    setting: str = ""
    """Name of the line in its table of settings, or of the variant; empty: the job's main setting."""
    reference: str | None = None
    """Benchmark among the published scores; None: found by the task's name."""
    metric: str | None = None
    """What was measured; None: nothing yet."""
    value: float | None = None
    """In percent where `percent` says so, else as lm-eval gives it; None: no score."""
    stderr: float | None = None
    """Standard error, in the unit of `value`."""
    percent: bool = True
    """Whether the value is a share, in percent."""
    documents: int | None = None
    """Documents asked; None: not recorded."""
    limited: bool = False
    """Whether these are fewer than the task has."""
    nfe: float | None = None
    """Forwards of the run."""
    tpf: float | None = None
    """Tokens per forward."""
    tokens_per_s: float | None = None
    """Generated tokens per second."""
    status: str = "FINISHED"
    """MLflow's word for how the run ended."""
    started: int = 0
    """Milliseconds since 1970."""
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Dotted setting -> value, as far as recorded."""

    @property
    def benchmark(self) -> str:
        """What the published scores call its task, in one spelling."""
        return reference.benchmark(self.reference or self.task)

    @property
    def by_likelihood(self) -> bool:
        """Whether the task compares likelihoods, so that sampler settings don't matter, or else generates."""
        return (self.metric or "").partition(".")[0] in _LIKELIHOOD_METRICS


@dataclass(frozen=True)
class Line:
    """One line of the official settings."""

    file: str
    """Name of the file, without its ending."""
    name: str
    """Name of the line."""
    model: str
    """Hub id."""
    task: str
    """lm-eval task."""
    reference: str | None
    """Its benchmark, where the task's name doesn't tell."""
    settings: Mapping[str, Any] = field(hash=False)
    """Dotted setting -> value."""

    @property
    def benchmark(self) -> str:
        """What the published scores call its task, in one spelling."""
        return reference.benchmark(self.reference or self.task)

    @property
    def accelerated(self) -> bool:
        """Whether it uses a cache or parallel decoding, which the published scores do without."""
        fast = ("sampler.threshold", "sampler.factor")
        return self.settings.get("sampler.cache", "none") != "none" or any(self.settings.get(key) for key in fast)


@dataclass(frozen=True)
class Difference:
    """A setting of a run that is not the official one."""

    key: str
    """Dotted name."""
    ours: Any
    """Value of the run."""
    official: Any
    """Value of the official line, or of the published score."""

    def __str__(self) -> str:
        name = self.key.rpartition(".")[2]
        if self.key == "limit" and self.official is None:
            return f"limit {self.ours}"
        return f"{name} {_shown(self.ours)} instead of {_shown(self.official)}"


@dataclass(frozen=True)
class Row:
    """A score of ours beside the published ones, or published ones alone."""

    model: str
    """Path or hub id of ours, or the published name."""
    benchmark: str
    """The benchmark, in one spelling."""
    ours: Score | None
    """None: published scores alone."""
    official: Published | None
    """The score by the model's authors with the nearest settings."""
    reproduced: Published | None
    """The score by others with the nearest settings."""
    line: Line | None = None
    """The official settings nearest to ours."""
    differences: tuple[Difference, ...] = ()
    """Settings of ours that differ from the official line, or from what the published score says of its own."""

    @property
    def against(self) -> Published | None:
        """What ours is compared with: the official score, or else the reproduced one."""
        return self.official or self.reproduced

    @property
    def points(self) -> float | None:
        """Ours less the published score, in percentage points."""
        if self.ours is None or self.ours.value is None or not self.ours.percent or self.against is None:
            return None
        return self.ours.value - self.against.score

    @property
    def errors(self) -> float | None:
        """The same difference in standard errors of ours."""
        if self.points is None or not self.ours.stderr:
            return None
        return self.points / self.ours.stderr

    @property
    def remarks(self) -> list[str]:
        """What a reader must know before reading the score."""
        if self.ours is None:
            return []
        remarks = []
        if self.ours.status != "FINISHED":
            remarks.append({"RUNNING": "still running"}.get(self.ours.status, self.ours.status.lower()))
        if self.ours.value is None:
            remarks.append("no score")
        if self.ours.limited and "limit" not in {item.key for item in self.differences}:
            remarks.append("a part of the documents")
        return remarks


def scores(run, setting: Mapping[str, Any], results: Mapping[str, Any]) -> list[Score]:
    """What a run measured: one score for each of its tasks, or one without a value where it has none yet.

    Args:
        run: the run as the tracking store holds it (`tracking.Recorded`).
        setting: its resolved settings, nested or dotted; empty: not recorded.
        results: lm-eval's results of the run; empty: not recorded.
    """
    settings = run_settings(setting, run.params)
    measured: dict[str, dict[str, float]] = {}
    for key, value in run.metrics.items():
        kind, _, rest = key.partition("/")
        task, _, metric = rest.rpartition("/")
        if kind == "eval" and task:
            measured.setdefault(task, {})[metric] = value
    asked = _tasks(run.tags.get("dllm_ray.eval.task"), settings)
    shared = {
        "run_id": run.run_id,
        "model": run.tags.get("dllm_ray.model") or "(unnamed)",
        "setting": run.tags.get("dllm_ray.eval.setting", ""),
        "reference": run.tags.get("dllm_ray.eval.reference") or None,
        "status": run.status,
        "started": run.started,
        "nfe": run.metrics.get("sampler/nfe") or None,  # 0 where nothing was generated
        "tpf": run.metrics.get("sampler/tpf") or None,
        "tokens_per_s": run.metrics.get("sampler/tokens_per_s") or None,
    }
    found = []
    for task in [task for task in asked if task in measured] or list(measured) or asked:
        recorded = results.get("results", {}).get(task, {})
        metric = _metric(measured.get(task, {}), run.tags.get("dllm_ray.eval.metric"), list(recorded))
        value = stderr = None
        percent = True
        if metric is not None:
            value, stderr = measured[task][metric], _stderr(measured[task], metric)
            name = metric.partition(".")[0]
            percent = name not in _NOT_PERCENT and 0 <= value <= 1
            value, stderr = (value * 100, stderr and stderr * 100) if percent else (value, stderr)
        documents, whole = (_documents(results, task, kind) for kind in ("effective", "original"))
        limited = settings.get("limit") is not None if None in (documents, whole) else documents < whole
        found.append(
            Score(
                task=task,
                metric=metric,
                value=value,
                stderr=stderr,
                percent=percent,
                documents=documents,
                limited=limited,
                settings=settings if limited else settings | {"limit": None},  # more than there are is no limit
                **shared,
            )
        )
    return found


def run_settings(setting: Mapping[str, Any], params: Mapping[str, str]) -> dict[str, Any]:
    """Dotted setting -> value of a run.

    Args:
        setting: the resolved settings of its line, or of its job (with a section `evaluate`).
        params: the run's parameters as text, for what the settings don't say.
    """
    flat = {key.removeprefix("evaluate."): value for key, value in flatten(setting).items()}
    for key in _MODEL:
        if key in params:
            flat.setdefault(key, None if params[key] == "None" else params[key])
    return flat


def newest(found: Iterable[Score]) -> list[Score]:
    """Of several runs of the same thing, the newest that has a score, or else the newest; in the order given."""
    kept: dict[str, Score] = {}
    for score in found:
        key = json.dumps(
            [score.model, score.task, score.setting, {key: score.settings.get(key) for key in _compared(score)}],
            default=str,
            sort_keys=True,
        )
        before = kept.get(key)
        if before is None or (score.value is not None, score.started) > (before.value is not None, before.started):
            kept[key] = score
    return list(kept.values())


def official_lines(folder: Path, models: Iterable[str], model_sampler=sampler_settings) -> list[Line]:
    """The lines of the official settings of some models, with all of their settings worked out.

    Args:
        folder: its files that have an `evaluate.suite` are read.
        models: paths or hub ids.
        model_sampler: gives the sampler settings that come with a model.

    Raises:
        ConfigError: a file can't be read.
    """
    lines = []
    model_sampler = cache(model_sampler)
    for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem):
        tree = load_yaml(path)
        hub_id, evaluate = tree.get("model", {}).get("path"), tree.get("evaluate") or {}
        model = next((model for model in models if hub_id and same_model(model, hub_id)), None)
        if model is None or not evaluate.get("suite"):
            continue
        sampler = read(SamplerConfig, {**model_sampler(model), **(tree.get("sampler") or {})}, f"{path}: sampler")
        likelihood = read(LikelihoodConfig, tree.get("likelihood") or {}, f"{path}: likelihood")
        stated = {"model.adapter": None, "model.quantization": None, **flatten({"model": tree["model"]})}
        for ask in asks(read(EvaluateConfig, evaluate, str(path)), sampler, likelihood):
            settings = stated | flatten(ask.settings())
            lines.append(Line(path.stem, ask.name, hub_id, ask.evaluate.tasks[0], ask.reference, settings))
    return lines


def same_model(one: str, other: str) -> bool:
    """Whether two paths, hub ids or published names mean the same checkpoint."""
    names = set(reference.names_of(one))
    return reference.short_name(one).lower() == reference.short_name(other).lower() or bool(
        names & set(reference.names_of(other))
    )


def row(score: Score, records: Sequence[Published], lines: Sequence[Line]) -> Row:
    """A score of ours beside the published ones.

    Args:
        score: ours.
        records: published scores of the same model on the same benchmark.
        lines: official settings; those of other models and benchmarks are passed over.
    """
    known = [line for line in lines if line.benchmark == score.benchmark and same_model(line.model, score.model)]

    def distance(line: Line) -> tuple[bool, int, bool]:
        differing = [item for item in differences(score, line) if item.key != "limit"]
        return line.accelerated, len(differing), line.name != score.setting

    line = min(known, key=distance, default=None)
    official, reproduced = (
        reference.best(records, kind, score.settings) if score.percent else None for kind in reference.KINDS
    )
    if line is not None:
        differing = differences(score, line)
    else:
        limit = score.settings.get("limit")
        differing = [Difference("limit", limit, None)] if limit is not None else []
    chosen = official or reproduced
    named = {difference.key for difference in differing}
    for key, value in (chosen.when if chosen else {}).items():
        if key in score.settings and key not in named and not _same(score.settings[key], value):
            differing.append(Difference(key, score.settings[key], value))
    return Row(score.model, score.benchmark, score, official, reproduced, line, tuple(differing))


def differences(score: Score, line: Line) -> list[Difference]:
    """The settings of a run that differ from an official line and can change its score."""
    task = [] if score.task == line.task else [Difference("task", score.task, line.task)]
    return task + [
        Difference(key, score.settings[key], line.settings[key])
        for key in _compared(score)
        if key in score.settings and key in line.settings and not _same(score.settings[key], line.settings[key])
    ]


def table(shown: Sequence[Score], lines: Sequence[Line], published: Sequence[str]) -> list[Row]:
    """All rows: ours by benchmark, and below them the published models on the same benchmark.

    Args:
        shown: ours.
        lines: official settings.
        published: published names to show as well, on the same benchmarks, or on all of theirs where they have none of
            these. Empty: beside a model without published scores every other on the same benchmarks, or, where no
            benchmark of ours is published, the rows of `WELL_KNOWN`.
    """
    ours: dict[str, list[Row]] = {}
    for score in shown:
        records = reference.find(reference.names_of(score.model), score.benchmark)
        ours.setdefault(score.benchmark, []).append(row(score, records, lines))
    rows: list[Row] = []
    for benchmark, mine in ours.items():
        mine.sort(key=lambda row: (row.model, row.ours.setting, -row.ours.started))
        unknown = any(not reference.names_of(row.model) for row in mine)
        below = published or (list(reference.hub_ids()) if unknown else [])
        have = {name for row in mine if row.against for name in reference.names_of(row.model)}
        rows += mine + published_rows([name for name in below if name not in have], [benchmark])
    if not published and not any(row.against for row in rows):
        published = WELL_KNOWN
    have = {name for row in rows if row.against for name in reference.names_of(row.model)}
    benchmarks = dict.fromkeys(reference.benchmark(record.task) for record in reference.published())
    return rows + published_rows([name for name in published if name not in have], benchmarks)


def published_rows(models: Iterable[str], benchmarks: Iterable[str]) -> list[Row]:
    """Rows of published scores alone.

    Args:
        models: published names.
        benchmarks: in one spelling.
    """
    found = []
    for benchmark in benchmarks:
        for model in models:
            records = reference.find([model], benchmark)
            if records:
                official, reproduced = (reference.best(records, kind, {}) for kind in reference.KINDS)
                found.append(Row(model, benchmark, None, official, reproduced))
    return found


def _compared(score: Score) -> list[str]:
    """The settings that can change a score."""
    asked = [*_ASKED, *(_ASKED_LIKELIHOOD if score.by_likelihood else _ASKED_GENERATION)]
    if score.settings.get("chat_template") is False:
        asked.remove("fewshot_as_multiturn")
    section = "likelihood." if score.by_likelihood else "sampler."
    keys = {key for key in score.settings if key.startswith(section)} - _WITHOUT_EFFECT
    return [*sorted(keys, key=_field_order), *asked, *_MODEL]


_FIELDS = [
    *(f"sampler.{name}" for name in vars(SamplerConfig())),
    *(f"likelihood.{name}" for name in vars(LikelihoodConfig())),
]


def _field_order(key: str) -> tuple[int, str]:
    return (_FIELDS.index(key) if key in _FIELDS else len(_FIELDS)), key


def _same(ours: Any, official: Any) -> bool:
    if isinstance(ours, list | tuple) and isinstance(official, list | tuple):
        return list(ours) == list(official)
    if not ours and not official and ours is not False and official is not False:
        return True  # an empty list or text, or a 0 that turns a thing off, is as none
    return ours == official


def _documents(results: Mapping[str, Any], task: str, kind: str) -> int | None:
    """Documents of a task, or of all the tasks of a group."""
    if task in results.get("n-samples", {}):
        return results["n-samples"][task].get(kind)
    counts = [_documents(results, below, kind) for below in results.get("group_subtasks", {}).get(task, [])]
    return sum(counts) if counts and None not in counts else None


def _tasks(tag: str | None, settings: Mapping[str, Any]) -> list[str]:
    if tag:
        return [task.strip() for task in tag.split(",")]
    return [] if settings.get("suite") else list(settings.get("tasks") or ())  # a suite stands in place of the tasks


def _metric(values: Mapping[str, float], wanted: str | None, recorded: Sequence[str]) -> str | None:
    """The metric to compare: the wanted one, else the first that lm-eval recorded, else the first by name."""
    finite = {name: value for name, value in values.items() if math.isfinite(value) and "_stderr" not in name}
    for name in [wanted, *recorded] if wanted else recorded:
        dotted = name.replace(",", ".")
        for known in (dotted, dotted.partition(".")[0]):
            if known in finite:
                return known
    return min(finite, default=None)


def _stderr(values: Mapping[str, float], metric: str) -> float | None:
    name, dot, filters = metric.partition(".")
    for key in (f"{metric}_stderr", f"{name}_stderr{dot}{filters}"):
        if key in values and math.isfinite(values[key]):
            return values[key]
    return None


def _shown(value: Any) -> str:
    if value is None or value == [] or value == ():
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
