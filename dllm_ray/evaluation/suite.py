"""What an evaluation asks, line by line: the lines of a suite, or the job's tasks under each variant of the sampler
settings, each with all of its settings worked out. Plain data; knows no model and no lm-eval."""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from dllm_ray.config import read, to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig, Setting
from dllm_ray.sampling.config import SamplerConfig

_OF_A_LINE = ("num_fewshot", "chat_template", "limit", "batch_size", "escape_until", "add_bos_token")
"""Fields that a line may say otherwise than the job."""
_TAKEN = ("", "answers", "results.json")  # what lies beside the lines' folders
_LONGEST = 200  # characters of a folder's name
_SECTIONS = ("sampler", "likelihood", "evaluate")
_ASSIGNMENT = re.compile(r",(?=\s*(?:" + "|".join(_SECTIONS) + r")\.\w+\s*=)")


@dataclass(frozen=True)
class Ask:
    """Tasks that are asked under the same settings."""

    name: str
    """Of the line or variant; empty: the job's own settings."""
    evaluate: EvaluateConfig
    """What is asked; its `suite` and `variants` are empty."""
    sampler: SamplerConfig
    likelihood: LikelihoodConfig
    reference: str | None = None
    """Task name in the published scores."""
    metric: str | None = None
    """The metric that is compared."""
    origin: Mapping[str, Any] | None = None
    """Where the settings are from."""

    def settings(self) -> dict[str, Any]:
        """All that the answers depend on beside the model, as plain values."""
        kept = ("tasks", "limit", "num_fewshot", "chat_template", "fewshot_as_multiturn", "system_instruction")
        kept += ("until", "escape_until", "add_bos_token", "batch_size", "data_files")
        return {
            "name": self.name,
            **{name: value for name, value in to_dict(self.evaluate).items() if name in kept},
            "sampler": to_dict(self.sampler),
            "likelihood": to_dict(self.likelihood),
            "reference": self.reference,
            "metric": self.metric,
            "origin": dict(self.origin or {}),
        }


def asks(
    evaluate: EvaluateConfig,
    sampler: SamplerConfig,
    likelihood: LikelihoodConfig,
    chosen: str | None = None,
    changes: str | None = None,
) -> list[Ask]:
    """Everything that a job asks, in order.

    Args:
        evaluate: tasks with variants, or a suite.
        sampler, likelihood: settings that lines and variants begin with.
        chosen: lines of the suite, by name or task, separated by commas; None: all.
        changes: settings that win over those of every line, e.g. `sampler.steps=64, evaluate.limit=100`.

    Raises:
        ConfigError: an unknown line or field, two lines of one name, or settings that no model could work with.
    """
    over = _assignments(changes)
    if not evaluate.suite:
        if chosen is not None:
            raise ConfigError("chooses among the lines of evaluate.suite, and there are none", "suite")
        found = _variants(evaluate, sampler, likelihood)
    else:
        if evaluate.variants:
            raise ConfigError("a suite's lines have settings of their own: leave variants out", "evaluate.variants")
        _check_names([line_name(line) for line in evaluate.suite], "evaluate.suite")
        lines = evaluate.suite if chosen is None else _chosen(evaluate.suite, chosen)
        found = [_line(line, evaluate, sampler, likelihood) for line in lines]
    return [_changed(ask, over) for ask in found]


def line_name(line: Setting) -> str:
    """What a line is called."""
    return line.name or line.task


def _variants(evaluate: EvaluateConfig, sampler: SamplerConfig, likelihood: LikelihoodConfig) -> list[Ask]:
    alone = replace(evaluate, variants=[])
    found = [Ask("", alone, sampler, likelihood)]
    names = [",".join(f"{key}={value}" for key, value in variant.items()) for variant in evaluate.variants]
    _check_names(names, "evaluate.variants")
    for name, variant in zip(names, evaluate.variants, strict=True):
        try:
            changed = read(SamplerConfig, to_dict(sampler) | variant, "sampler")
        except ConfigError as error:
            raise ConfigError(f"{variant}: {error}", "evaluate.variants") from None
        found.append(Ask(name, alone, changed, likelihood))
    return found


def _line(line: Setting, evaluate: EvaluateConfig, sampler: SamplerConfig, likelihood: LikelihoodConfig) -> Ask:
    own = {name: getattr(line, name) for name in _OF_A_LINE if getattr(line, name) is not None}
    name = line_name(line)
    try:
        asked = replace(
            evaluate,
            tasks=(line.task,),
            suite=[],
            data_files={line.task: line.data_file}
            if line.data_file
            else {task: file for task, file in evaluate.data_files.items() if task == line.task},
            until=[*evaluate.until, *line.until],
            **own,
        )
        changed = read(SamplerConfig, to_dict(sampler) | line.sampler, "sampler")
        scored = read(LikelihoodConfig, to_dict(likelihood) | line.likelihood, "likelihood")
    except ConfigError as error:
        raise ConfigError(f"line {name}: {error}", "evaluate.suite") from None
    return Ask(name, asked, changed, scored, line.reference, line.metric, line.origin)


def _changed(ask: Ask, over: Mapping[str, Mapping[str, Any]]) -> Ask:
    if not over:
        return ask
    _check_fields(over.get("evaluate", {}))
    parts = {}
    try:
        for name in _SECTIONS:
            part = getattr(ask, name)
            parts[name] = read(type(part), to_dict(part) | over.get(name, {}), name)
    except ConfigError as error:
        raise ConfigError(f"{ask.name}: {error}" if ask.name else str(error), "set") from None
    return replace(ask, **parts)


def _check_fields(changes: Iterable[str]) -> None:
    for name in changes:
        if name not in _OF_A_LINE:
            raise ConfigError(f"evaluate.{name} can't be set for every line, only {', '.join(_OF_A_LINE)}", "set")


def _check_names(names: Sequence[str], field: str) -> None:
    for name in names:
        if not name.isprintable() or "/" in name or name.startswith(".") or name in _TAKEN or len(name) > _LONGEST:
            raise ConfigError(f"{name!r} can't be a name: its results are a folder that is called so", field)
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two settings are called {twice!r}: give them names of their own", field)


def _chosen(lines: Sequence[Setting], chosen: str) -> list[Setting]:
    known = {line_name(line) for line in lines} | {line.task for line in lines}
    wanted = [word.strip() for word in ([chosen] if chosen in known else chosen.split(",")) if word.strip()]
    for word in wanted:
        if word not in known:
            raise ConfigError(f"no line {word!r}{_near(word, known)}", "suite")
    if not wanted:
        raise ConfigError(f"name lines: {', '.join(map(line_name, lines))}", "suite")
    return [line for line in lines if line_name(line) in wanted or line.task in wanted]


def _near(word: str, known: Iterable[str]) -> str:
    known = sorted(known)
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"; {'the nearest' if near else 'there are'}: {', '.join(near or known)}"


def _assignments(text: str | None) -> dict[str, dict[str, Any]]:
    """Section -> field -> value of `section.field=value, ...`; values are YAML."""
    over: dict[str, dict[str, Any]] = {}
    for part in _ASSIGNMENT.split(text) if text else ():
        key, has_value, value = part.strip().partition("=")
        where, _, name = key.strip().partition(".")
        if not has_value or where not in _SECTIONS or not name:
            raise ConfigError(
                f"expected section.field=value with a section of {', '.join(_SECTIONS)}, got {part.strip()!r}", "set"
            )
        try:
            over.setdefault(where, {})[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"{part.strip()!r}: the value is no YAML", "set") from None
    return over
