"""The search space of a sweep: which fields of `SamplerConfig` vary, over what, and under which conditions.

Knows settings and random numbers; not what they are tried on, nor what comes of it.
"""

import difflib
import math
import sys
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from dllm_ray.config import read, to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.sampling.config import SamplerConfig

if TYPE_CHECKING:
    import optuna

_LISTS = ("choice", "grid")
_RANGES = ("uniform", "loguniform", "integer", "log_integer")
_LARGEST_GRID = 10_000
_PATIENCE = 1000  # draws without a new setting before `sample` takes the space for exhausted

_BESIDE = {"editing_threshold": {"policy": "llada21"}, "max_new_tokens": {"max_length": 1}}
"""What makes any value of a field possible; by the defaults, those of other fields all are."""


class _Need(NamedTuple):
    field: str
    holds: Callable[[Any], bool]
    words: str


_NEEDS: dict[str, tuple[_Need, ...]] = {
    "steps": (_Need("steps_per_block", lambda value: value is None, "is null"),),
    "max_length": (_Need("max_new_tokens", lambda value: value is None, "is null"),),
    "max_post_steps": (_Need("policy", lambda value: value == "llada21", "is llada21"),),
    "num_to_transfer": (_Need("policy", lambda value: value == "llada21", "is llada21"),),
    "minimal_topk": (_Need("policy", lambda value: value == "llada2", "is llada2"),),
    "cfg_keep_tokens": (_Need("cfg_scale", lambda value: value > 0, "is above 0"),),
} | dict.fromkeys(
    ("top_p", "top_k"),
    (
        _Need("temperature", lambda value: value > 0, "is above 0"),
        _Need(
            "policy",
            lambda value: value in ("entropy", "topk_margin", "maskgit_plus"),
            "is entropy, topk_margin or maskgit_plus",
        ),
    ),
)
"""Fields that the sampler reads only where one of these holds."""


@dataclass(frozen=True)
class Candidate:
    """A setting that a sweep may try."""

    name: str
    """Its changes in short, e.g. `temperature=0.5,steps=4`; `base` without any. Of one space, equal names mean equal
    changes."""
    changes: dict[str, Any]
    """What the space sets, as plain values, in its order."""
    sampler: SamplerConfig
    """All sampler settings."""


@dataclass(frozen=True)
class _Choice:
    name: str
    values: tuple

    def draw(self, random: np.random.Generator) -> Any:
        return self.values[int(random.integers(len(self.values)))]

    def suggest(self, trial: "optuna.Trial") -> Any:
        if not any(isinstance(value, list) for value in self.values):
            return trial.suggest_categorical(self.name, list(self.values))
        by_text = {_text(value): value for value in self.values}  # optuna's choices are scalars
        return by_text[trial.suggest_categorical(self.name, list(by_text))]

    def may_be(self, holds: Callable[[Any], bool]) -> bool:
        return any(map(holds, self.values))

    def holds(self, value: Any) -> bool:
        return value in self.values


@dataclass(frozen=True)
class _Range:
    name: str
    low: float
    high: float
    log: bool
    whole: bool

    def draw(self, random: np.random.Generator) -> float:
        if self.whole and not self.log:
            return type(self.low)(random.integers(int(self.low), int(self.high), endpoint=True))
        if not self.log:
            return self._near(random.uniform(self.low, self.high))
        half = 0.5 if self.whole else 0.0  # so that the ends are as likely as their neighbours
        return self._near(math.exp(random.uniform(math.log(self.low - half), math.log(self.high + half))))

    def suggest(self, trial: "optuna.Trial") -> float:
        if self.whole:
            return type(self.low)(trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log))
        return self._near(trial.suggest_float(self.name, self.low, self.high, log=self.log))

    def may_be(self, holds: Callable[[Any], bool]) -> bool:
        return holds(self.low) or holds(self.high)

    def holds(self, value: Any) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    def _near(self, value: float) -> float:
        """A number nearby that can be written in a few digits, so that a name tells it exactly."""
        if self.whole:
            near = round(value)
        else:
            span = value * min(math.log(self.high) - math.log(self.low), 1) if self.log else self.high - self.low
            near = round(value, 3 - math.floor(math.log10(max(span, sys.float_info.min))))
        return type(self.low)(min(max(near, self.low), self.high))


class Space:
    """Fields of the sampler that a sweep varies.

    A field is left as in `base`, and is absent from a candidate's changes, where its condition doesn't hold, and where
    the sampler wouldn't read it: `top_p` at temperature 0, `steps` beside `steps_per_block`. So no two candidates of
    other names mean the same.

    Args:
        tree: field -> a list of values, or a mapping of one of `choice`, `grid` (the same), `uniform`, `loguniform`,
            `integer` and `log_integer` to its values or its lowest and highest, and optionally `when` to a mapping
            of other fields to the value or values that they must have. These may be fields of the space or not.
        base: the settings that candidates begin with.
        check: raises ConfigError for settings that are impossible on the model that they are for.

    Attributes:
        names: the fields, in the order given.
        base: the settings that candidates begin with.

    Raises:
        ConfigError: no fields, an unknown one, a kind or value that can't be, conditions in a circle, or a field that
            never has an effect.
    """

    def __init__(
        self,
        tree: Mapping[str, Any],
        base: SamplerConfig,
        check: Callable[[SamplerConfig], object] = SamplerConfig.blocks,
    ):
        self._check = check
        if not isinstance(tree, Mapping) or not tree:
            raise ConfigError("name at least one field of sampler and its values, e.g. {steps: [8, 16]}", "sweep.space")
        self.base = read(SamplerConfig, to_dict(base), "sampler")
        self._base = to_dict(self.base)
        for name in tree:
            _check_name(name, str(name))
        self.names: tuple[str, ...] = tuple(tree)
        self._parameters = {name: _parameter(name, value) for name, value in tree.items()}
        self._when = {name: _conditions(name, value) for name, value in tree.items()}
        self._order = self._sorted()
        self._refused: dict[str, str] = {}
        self._check_effects()

    @property
    def impossible(self) -> list[tuple[str, str]]:
        """(name, reason) of each combination met so far that `SamplerConfig` or the model's check refuses."""
        return list(self._refused.items())

    def grid(self) -> list[Candidate]:
        """All possible combinations, the last field varying fastest.

        Raises:
            ConfigError: a field isn't given by a list, there are more than 10,000 combinations, or none is possible.
        """
        for parameter in self._parameters.values():
            if isinstance(parameter, _Range):
                _fail(
                    parameter.name,
                    "a grid needs a list of values, not a range: give one, or set sweep.searcher to random, tpe or "
                    "nsga2",
                )
        found: list[dict[str, Any]] = [{}]
        for name in self._order:
            values = self._parameters[name].values
            found = [
                {**changes, **more}
                for changes in found
                for more in ([{name: value} for value in values] if self._is_active(name, changes) else [{}])
            ]
            if len(found) > _LARGEST_GRID:
                raise ConfigError(
                    f"a grid of more than {_LARGEST_GRID:,} settings: give fewer values, or set sweep.searcher to "
                    "random, tpe or nsga2",
                    "sweep.space",
                )
        found.sort(key=self._place)
        return self._possible(found)

    def draw(self, random: np.random.Generator) -> Candidate:
        """A random combination, each field drawn by itself.

        Raises:
            ConfigError: the combination is impossible.
        """
        return self._candidate(self._drawn(random))

    def sample(self, count: int, seed: int) -> list[Candidate]:
        """Distinct random combinations, all possible; fewer than `count` where so many can't be found.

        Raises:
            ConfigError: none is possible.
        """
        random = np.random.default_rng(seed)
        seen: set[str] = set()
        found: list[Candidate] = []
        misses = 0
        while len(found) < count and misses < _PATIENCE + 20 * len(seen):
            changes = self._drawn(random)
            misses += 1
            if _name(changes) in seen:
                continue
            seen.add(_name(changes))
            try:
                found.append(self._candidate(changes))
            except ConfigError:
                continue
            misses = 0
        return found if found or not count else self._none_possible()

    def suggest(self, trial: "optuna.Trial") -> Candidate:
        """The combination that an optuna trial suggests; only fields that vary in it are asked for, by their names.

        `trial.params` is not the candidate's `changes`: there lists are texts, and numbers have all their digits.

        Raises:
            ConfigError: the combination is impossible.
        """
        return self._candidate(self._chosen(lambda parameter: parameter.suggest(trial)))

    def candidate(self, changes: Mapping[str, Any]) -> Candidate:
        """The combination with these values, which needn't be among those of the space; of its fields, those that don't
        vary in this combination are left out.

        Raises:
            ConfigError: a field that isn't in the space, or an impossible value or combination.
        """
        for name in changes:
            if name not in self._parameters:
                _fail(name, f"no field of the space; there are: {', '.join(self.names)}")
        values = {name: _value(name, value) for name, value in changes.items()}
        kept: dict[str, Any] = {}
        for name in self._order:
            if name in values and self._is_active(name, kept):
                kept[name] = values[name]
        return self._candidate(self._in_order(kept))

    def _is_active(self, name: str, changes: Mapping[str, Any]) -> bool:
        """Whether a field varies beside these values of the fields that come before it."""

        def value(field: str) -> Any:
            return changes.get(field, self._base[field])

        if not all(value(field) in values for field, values in self._when[name].items()):
            return False
        needs = _NEEDS.get(name, ())
        return not needs or any(need.holds(value(need.field)) for need in needs)

    def _chosen(self, choose: Callable[[_Choice | _Range], Any]) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        for name in self._order:
            if self._is_active(name, changes):
                changes[name] = choose(self._parameters[name])
        return self._in_order(changes)

    def _drawn(self, random: np.random.Generator) -> dict[str, Any]:
        return self._chosen(lambda parameter: parameter.draw(random))

    def _in_order(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        return {name: changes[name] for name in self.names if name in changes}

    def _place(self, changes: Mapping[str, Any]) -> list[int]:
        return [self._parameters[name].values.index(changes[name]) if name in changes else 0 for name in self.names]

    def _candidate(self, changes: dict[str, Any]) -> Candidate:
        name = _name(changes)
        try:
            sampler = replace(self.base, **changes)
            self._check(sampler)
        except ConfigError as error:
            self._refused.setdefault(name, str(error))
            raise ConfigError(f"{name}: {error}", "sweep.space") from None
        return Candidate(name, changes, sampler)

    def _possible(self, combinations: Iterable[dict[str, Any]]) -> list[Candidate]:
        found = []
        for changes in combinations:
            try:
                found.append(self._candidate(self._in_order(changes)))
            except ConfigError:
                continue
        return found or self._none_possible()

    def _none_possible(self) -> NoReturn:
        name, reason = self.impossible[0]
        raise ConfigError(f"no combination is possible; the first, {name}: {reason}", "sweep.space")

    def _sorted(self) -> tuple[str, ...]:
        """The fields, each after those that decide whether it varies."""
        before = {
            name: [
                field
                for field in (*self._when[name], *(need.field for need in _NEEDS.get(name, ())))
                if field in self._parameters
            ]
            for name in self.names
        }
        try:
            return tuple(TopologicalSorter(before).static_order())
        except CycleError as error:
            circle = error.args[1][::-1]  # each is decided by the next
            _fail(circle[0], f"whether it varies depends on itself: {' -> '.join(circle)}")

    def _check_effects(self) -> None:
        for name in self.names:
            for field, values in self._when[name].items():
                if field in self._parameters and not any(self._may_equal(field, value) for value in values):
                    wanted = " or ".join(map(_text, values))
                    _fail(name, f"never varies: the space doesn't let {field} be {wanted}")
            needs = _NEEDS.get(name, ())
            if needs and not any(self._may_be(need.field, need.holds) for need in needs):
                words = " or ".join(f"{need.field} {need.words}" for need in needs)
                now = ", ".join(
                    f"{need.field} is {_text(self._base[need.field])}"
                    for need in needs
                    if need.field not in self._parameters
                )
                _fail(
                    name,
                    f"has no effect unless {words}{f', and here {now}' if now else ''}: change that, or leave {name} "
                    "out",
                )

    def _may_equal(self, field: str, value: Any) -> bool:
        return self._parameters[field].holds(value) or (self._is_conditional(field) and self._base[field] == value)

    def _may_be(self, field: str, holds: Callable[[Any], bool]) -> bool:
        if field not in self._parameters:
            return holds(self._base[field])
        return self._parameters[field].may_be(holds) or (self._is_conditional(field) and holds(self._base[field]))

    def _is_conditional(self, field: str) -> bool:
        return bool(self._when[field]) or field in _NEEDS


def _fail(name: str, message: str) -> NoReturn:
    raise ConfigError(message, f"sweep.space.{name}")


@cache
def _types() -> dict[str, Any]:
    return typing.get_type_hints(SamplerConfig)


def _check_name(name: Any, where: str) -> None:
    if name in _types():
        return
    near = difflib.get_close_matches(str(name), _types(), n=3, cutoff=0.5)
    hint = f"; the nearest: {', '.join(near)}" if near else "; --help lists them under sampler"
    _fail(where, f"no field of the sampler is called {str(name)!r}{hint}")


def _value(name: str, value: Any, of: str | None = None) -> Any:
    """A field's value as `SamplerConfig` reads it, if it can have it at all; `of` is the parameter to complain of."""
    try:
        return to_dict(read(SamplerConfig, {name: value} | _BESIDE.get(name, {}), "sampler"))[name]
    except ConfigError as error:
        reason = str(error).removeprefix("sampler: ").removeprefix(f"{name}: ")
        _fail(of or name, reason if of is None else f"when.{name}: {reason}")


def _parameter(name: str, tree: Any) -> _Choice | _Range:
    if isinstance(tree, list | tuple):
        return _choice(name, tree)
    example = "a list of values, or a mapping such as {uniform: [0, 1]}"
    if not isinstance(tree, Mapping):
        _fail(name, f"expected {example}, got {tree!r}")
    kinds = [kind for kind in tree if kind != "when"]
    for kind in kinds:
        if kind not in (*_LISTS, *_RANGES):
            near = difflib.get_close_matches(str(kind), (*_LISTS, *_RANGES, "when"), n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join((*_LISTS, *_RANGES))}"
            _fail(name, f"unknown kind {str(kind)!r}; {hint}")
    if len(kinds) != 1:
        _fail(name, f"expected {example}, got {'two kinds: ' + ' and '.join(kinds) if kinds else 'no values'}")
    return _choice(name, tree[kinds[0]]) if kinds[0] in _LISTS else _range(name, kinds[0], tree[kinds[0]])


def _choice(name: str, values: Any) -> _Choice:
    if not isinstance(values, list | tuple) or not values:
        _fail(name, f"expected a list of values, got {values!r}" if values != [] else "an empty list: name its values")
    known: list[Any] = []
    for value in (_value(name, value) for value in values):
        if value in known:
            _fail(name, f"{_text(value)} stands twice in its list: leave one out")
        known.append(value)
    return _Choice(name, tuple(known))


def _range(name: str, kind: str, bounds: Any) -> _Range:
    hint = _types()[name]
    numbers = {int, float} & {hint, *typing.get_args(hint)}
    if not numbers:
        _fail(name, f"isn't a number, so it has no range: give a list of its values, not {kind}")
    if float not in numbers and kind in ("uniform", "loguniform"):
        _fail(name, f"takes whole numbers: write {'integer' if kind == 'uniform' else 'log_integer'}, not {kind}")
    if not isinstance(bounds, list | tuple) or len(bounds) != 2:
        _fail(name, f"{kind}: expected the lowest and the highest value, as [low, high], got {bounds!r}")
    low, high = (_value(name, bound) for bound in bounds)
    whole, log = kind.endswith("integer"), kind.startswith("log")
    for bound in (low, high):
        if bound is None:
            _fail(name, f"{kind}: expected numbers, got null")
        if whole and (bound != math.floor(bound) or abs(bound) >= 2**63):
            _fail(name, f"{kind}: expected whole numbers of at most 63 bits, got {bound}")
    if low >= high:
        _fail(name, f"{kind}: expected the lowest value before the highest, got {_text(low)} and {_text(high)}")
    if log and low <= 0:
        _fail(name, f"{kind}: expected a lowest value above 0, got {_text(low)}")
    return _Range(name, low, high, log, whole)


def _conditions(name: str, tree: Any) -> dict[str, tuple]:
    """Field -> the values that it must have for this one to vary."""
    if not isinstance(tree, Mapping) or "when" not in tree:
        return {}
    when = tree["when"]
    if not isinstance(when, Mapping) or not when:
        _fail(name, f"when: expected a mapping of fields to values, such as {{cache: [prefix, dual]}}, got {when!r}")
    found = {}
    for field, values in when.items():
        _check_name(field, name)
        values = values if isinstance(values, list | tuple) else [values]
        if not values:
            _fail(name, f"when.{field}: an empty list: name its values")
        found[field] = tuple(_value(field, value, of=name) for value in values)
    return found


def _name(changes: Mapping[str, Any]) -> str:
    return ",".join(f"{name}={_text(value)}" for name, value in changes.items()) or "base"


def _text(value: Any) -> str:
    """A value in short; different for different values of a field."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{' '.join(map(_text, value))}]"
    if isinstance(value, float):
        short = f"{value + 0.0:.4g}"  # writes -0.0 as 0
        return short if float(short) == value else repr(value)
    return str(value)
