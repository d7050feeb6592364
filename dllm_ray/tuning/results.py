"""What a sweep has found: who wins, who can't be told apart from the winner, what speed costs, and what matters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from dllm_ray.tuning import pareto, statistics
from dllm_ray.tuning.config import SweepConfig
from dllm_ray.tuning.importance import importance
from dllm_ray.tuning.statistics import Interval
from dllm_ray.tuning.tried import Tried

AXES = ("tpf", "tokens_per_s")
"""How fast a setting is."""
_ROUNDING = 1e-9
_FEWEST = 8  # settings; the shares of parameters are anything with fewer
IS_BETTER_HIGH = {"score": True, "tpf": True, "tokens_per_s": True, "nfe": False}


@dataclass(frozen=True)
class HeldOut:
    """A setting on documents that had no part in its choice."""

    name: str
    interval: Interval
    """Of its score."""
    to_official: Interval | None
    """Of the paired difference to the official setting; None: it is that one."""
    documents: int

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `unclear`, compared with the official setting."""
        if self.to_official is None:
            return "official"
        if self.to_official.low > 0:
            return "better"
        return "worse" if self.to_official.high < 0 else "unclear"


@dataclass(frozen=True)
class Findings:
    """What settings gave, and what follows."""

    tried: tuple[Tried, ...]
    """Every setting that has answered documents, in the order tried."""
    official: str
    """Name of the setting that the sweep began with."""
    intervals: Mapping[str, Interval]
    """Setting -> its score's interval."""
    fronts: Mapping[str, frozenset[str]]
    """Axis -> the settings that no other one beats in score and in speed."""
    best: str
    """The setting with the highest score; of equal ones the fastest."""
    tied: frozenset[str]
    """Settings whose difference to it may be noise."""
    recommended: str
    """The fastest of the best and those tied with it whose score is at most `SweepConfig.tolerance` lower."""
    aup: Mapping[str, float]
    """Family -> accuracy under parallelism."""
    importance: Mapping[str, Mapping[str, float]]
    """Objective -> parameter -> share of its variation."""
    held_out: tuple[HeldOut, ...] = field(default=())
    unconfirmed: str = ""
    """Why the held-out documents were not asked, though there are some."""
    unfinished: int = 0
    """Settings that the budget left without all their answers."""
    withdrawn: str = ""
    """The setting that was recommended until the held-out documents showed it to be worse than the official one."""

    @property
    def is_won(self) -> bool:
        """Whether the best setting has rivals, and its lead is more than noise."""
        return not self.tied and len(_rivals(self.tried)) > 1

    def named(self, name: str) -> Tried:
        """The setting of a name."""
        return next(one for one in self.tried if one.name == name)

    def chosen(self, most: int) -> list[str]:
        """The settings worth confirming: the recommended, the best and the front's from its best score on, as many as
        `most`; and the official one."""
        rest = sorted(self.fronts["tpf"], key=lambda name: -self.named(name).score)
        kept = [*dict.fromkeys([self.recommended, self.best, *rest])][:most]
        return [*dict.fromkeys([*kept, self.official])]


def with_held_out(found: Findings, held_out: Mapping[str, Tried], confidence: float) -> Findings:
    """The findings with what the chosen settings gave on held-out documents. A recommended one that is worse there than
    the official setting gives way: to the best one, or to the official one if that is worse too.

    Args:
        found: without.
        held_out, confidence: as in `confirmed`.
    """
    told = confirmed(held_out, found.official, confidence)
    worse = {one.name for one in told if one.verdict == "worse"}
    if found.recommended not in worse:
        return replace(found, held_out=told)
    instead = found.official if found.best in worse else found.best
    return replace(found, held_out=told, recommended=instead, withdrawn=found.recommended)


def find(tried: Sequence[Tried], official: str, config: SweepConfig, published_best: float | None) -> Findings:
    """Works out what the settings have shown.

    Only settings that have answered all documents can win or be on a front; if there is none, those that have answered
    most.

    Args:
        tried: settings that have answered documents, at least one; names tell them apart.
        official: name of the one that the sweep began with.
        config: objectives and confidence.
        published_best: highest published accuracy on the task, in percent.
    """
    rivals = _rivals(tried)
    speed = next((name for name in config.objectives if name != "score"), "tpf")
    rivals.sort(key=lambda one: -_gain(one, speed))  # stable; of equal scores the fastest is taken for the best
    scores_SD = statistics.common(rivals)
    winner, tied = statistics.winner(scores_SD, config.confidence)
    least = rivals[winner].score - config.tolerance - _ROUNDING
    equal = [rivals[index] for index in (winner, *tied) if rivals[index].score >= least]
    fronts = {
        axis: frozenset(
            one.name
            for one, kept in zip(
                rivals, pareto.front([(one.score, getattr(one, axis)) for one in rivals], (True, True)), strict=True
            )
            if kept
        )
        for axis in AXES
    }
    return Findings(
        tried=tuple(tried),
        official=official,
        intervals={one.name: statistics.interval(list(one.scores.values()), config.confidence) for one in tried},
        fronts=fronts,
        best=rivals[winner].name,
        tied=frozenset(rivals[index].name for index in tied),
        # where nothing was solved, being fast at it is no merit
        recommended=max(equal, key=lambda one: (_gain(one, speed), one.score)).name
        if rivals[winner].score != 0
        else official,
        aup=pareto.aup_by_family(tried, published_best),
        importance={name: importance(rivals, name) for name in dict.fromkeys([*config.objectives, "score", speed])}
        if len(rivals) >= _FEWEST
        else {},
    )


def confirmed(held_out: Mapping[str, Tried], official: str, confidence: float) -> tuple[HeldOut, ...]:
    """The chosen settings on held-out documents, beside the official one. The intervals of the differences hold for all
    of them together.

    Args:
        held_out: setting -> what it gave there, in the order of their importance; the official one is among them.
        official: its name.
        confidence: of the intervals.
    """
    names = list(held_out)
    scores_SD = statistics.common([held_out[name] for name in names])
    against = statistics.compare(scores_SD, names.index(official), confidence, chosen=False)
    return tuple(
        HeldOut(
            name,
            statistics.interval(scores, confidence),
            None if name == official else difference,
            scores_SD.shape[1],
        )
        for name, scores, difference in zip(names, scores_SD, against.differences, strict=True)
    )


def _rivals(tried: Sequence[Tried]) -> list[Tried]:
    """Settings that can win."""
    complete = [one for one in tried if one.complete]
    most = max(len(one.scores) for one in tried)
    return complete or [one for one in tried if len(one.scores) == most]


def _gain(one: Tried, objective: str) -> float:
    value = getattr(one, objective)
    if math.isnan(value):
        return -math.inf
    return value if IS_BETTER_HIGH[objective] else -value
