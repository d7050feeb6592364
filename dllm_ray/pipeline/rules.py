"""Rules that scores must meet. Pure functions: no files, no MLflow."""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dllm_ray.errors import ConfigError, EvaluationError

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Setting -> task -> metric -> value. The job's own setting is called by the empty text."""

_OPERATORS = {">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt}
_NUMBER = r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+"
_RULE = re.compile(
    r"\s*(?:(?P<setting>.+?):\s+)?(?P<task>\S+)/(?P<metric>[^\s/<>=]+)\s*(?P<sign>>=|<=|>|<)\s*"
    rf"(?:(?P<champion>champion)(?:\s*(?P<way>[+-])\s*(?P<margin>{_NUMBER}))?|(?P<value>-?(?:{_NUMBER})))\s*"
)


@dataclass(frozen=True)
class Verdict:
    """What came of a rule."""

    rule: str
    """As it was written."""
    value: float
    """Of the model."""
    needed: float | None
    """What it was measured against; None: there is no champion."""
    holds: bool

    def __str__(self) -> str:
        word = "holds" if self.holds else "fails"
        needed = "no champion yet" if self.needed is None else f"against {self.needed:.4g}"
        return f"{word}: {self.rule} ({self.value:.4g}, {needed})"


@dataclass(frozen=True)
class Rule:
    """A bound for one score."""

    text: str
    """As it was written."""
    setting: str
    """Name of the variant or of the suite's line; empty: the job's own setting."""
    task: str
    metric: str
    sign: str
    """`>=`, `>`, `<=` or `<`."""
    bound: float
    """What the score is compared with, or what is added to the champion's."""
    is_relative: bool
    """Whether the champion's score counts."""

    @classmethod
    def parse(cls, text: str) -> "Rule":
        """Reads a rule.

        Raises:
            ConfigError: it is none.
        """
        found = _RULE.fullmatch(text)
        if found is None:
            raise ConfigError(
                "expected TASK/METRIC >= NUMBER, or TASK/METRIC >= champion + NUMBER (also >, <=, < and -), got "
                f"{text!r}",
                "rules",
            )
        is_relative = found["champion"] is not None
        bound = float(found["margin"] or 0) * (-1 if found["way"] == "-" else 1) if is_relative else found["value"]
        names = (found[name] or "" for name in ("setting", "task", "metric", "sign"))
        return cls(text.strip(), *names, float(bound), is_relative)

    def judge(self, scores: Scores, champion: Scores | None) -> Verdict:
        """Whether it holds.

        Args:
            scores: of the model.
            champion: of the version that has the alias, under the same settings; None: there is none, and rules about
                it hold.

        Raises:
            EvaluationError: there is no such score.
        """
        value = self._score(scores)
        if self.is_relative and champion is None:
            return Verdict(self.text, value, None, not math.isnan(value))
        needed = self.bound + (self._score(champion) if self.is_relative else 0.0)
        return Verdict(self.text, value, needed, _OPERATORS[self.sign](value, needed))

    def _score(self, scores: Scores) -> float:
        try:
            return scores[self.setting][self.task][self.metric]
        except KeyError:
            there = [f"{task}/{metric}" for task, values in scores.get(self.setting, {}).items() for metric in values]
            raise EvaluationError(
                f"promote.rules: no score {self.task}/{self.metric}"
                + (f" of {self.setting}" if self.setting else "")
                + f"; there are {', '.join(there) or 'none'}"
            ) from None


def check(rules: Sequence[Rule], measured: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
    """Makes sure that what rules speak of will be measured.

    Args:
        rules: the rules.
        measured: setting -> task -> metrics.

    Raises:
        ConfigError: a setting, task or metric is unknown.
    """
    for rule in rules:
        places = (("setting", rule.setting, measured), ("task", rule.task, measured.get(rule.setting, {})))
        for kind, name, known in places:
            if name not in known:
                told = ", ".join(repr(key) for key in known) or "none"
                raise ConfigError(f"{rule.text!r}: no {kind} {name!r} is evaluated; there are {told}", "promote.rules")
        metrics = measured[rule.setting][rule.task]
        if rule.metric not in metrics:
            raise ConfigError(
                f"{rule.text!r}: {rule.task} has no metric {rule.metric!r}; it has {', '.join(metrics)}",
                "promote.rules",
            )
