"""Settings as points of accuracy and speed: what the interactive page and the picture for print agree on, which is
looks, numbers, the line of a front and the words for a point.

It draws nothing and knows no runs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from dllm_ray.output import printable

AXES = {"tpf": "tokens per forward (TPF)", "tokens_per_s": "tokens per second"}
"""Fields of `Point` that say how fast a setting is -> their names."""
MARKS = {"recommended": "recommended", "official": "official", "best": "best score"}
"""What can be special about a point -> what its label says; in order of importance."""
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c")
"""Told apart by colour-blind readers too (M. Okabe and K. Ito 2008), against light and dark."""
SHAPES = ("circle", "square", "triangle", "diamond", "wedge", "plus", "pentagon", "cross")
"""wedge: a triangle upside down. As many as share no factor with the colours, so that 56 families look different."""
_MOST_TOGETHER = 3


@dataclass(frozen=True)
class Point:
    """A setting of the sampler, and how well and how fast it answers."""

    name: str
    """What it is called; may be long."""
    family: str
    """What decides colour and shape, e.g. "none cache, low_confidence"."""
    score: float
    """Percent; not finite: it has none and isn't drawn."""
    low: float
    """Lower end of the score's confidence interval, percent; not finite: there is no interval."""
    high: float
    """Its upper end."""
    tpf: float
    """Tokens per forward."""
    tokens_per_s: float
    """Tokens per second."""
    nfe: float
    """Forwards per document."""
    documents: int
    """How many were answered."""
    front: frozenset[str]
    """Axes on whose front it lies, of `AXES`."""
    marks: frozenset[str]
    """What is special about it, of `MARKS`."""
    complete: bool = True
    """False: dropped after a few documents; drawn faintly."""
    is_percent: bool = True
    """False: the score and its interval are no shares, but numbers of another kind."""


@dataclass(frozen=True)
class Curve:
    """Published results of one method, as background."""

    name: str
    """The method."""
    points: tuple[tuple[float, float], ...]
    """Tokens per forward and accuracy in percent, in the order to connect them."""


def tidy(text: str) -> str:
    """The text in one line, with pictures in place of what would command a screen."""
    return " ".join(printable(text).split())


def shortened(text: str, length: int) -> str:
    """At most `length` characters of the text; an ellipsis stands for what is left out at its end."""
    return text if len(text) <= length else text[: length - 1].rstrip(" ,;=") + "\u2026"


def has_interval(point: Point) -> bool:
    """Whether both ends of its interval are known."""
    return math.isfinite(point.low) and math.isfinite(point.high)


def finite(curve: Curve) -> list[tuple[float, float]]:
    """The curve's points that can be drawn."""
    return [(x, y) for x, y in curve.points if math.isfinite(x) and math.isfinite(y)]


def is_drawn(point: Point, axis: str) -> bool:
    """Whether the point has a place in the plot over an axis of `AXES`."""
    return math.isfinite(point.score) and math.isfinite(getattr(point, axis))


def looks(points: Sequence[Point]) -> dict[str, tuple[str, str]]:
    """Family -> its colour and shape, in the order in which the families first come."""
    families = dict.fromkeys(point.family for point in points)
    return {
        family: (COLOURS[index % len(COLOURS)], SHAPES[index % len(SHAPES)]) for index, family in enumerate(families)
    }


def numbers(points: Sequence[Point]) -> dict[int, int]:
    """Index of each point that is on a front or marked -> its number, from 1, the slowest first."""
    noted = [index for index, point in enumerate(points) if point.front or point.marks]

    def speed(index: int) -> tuple[float, ...]:
        point = points[index]
        return tuple(value if math.isfinite(value) else -math.inf for value in (point.tpf, point.tokens_per_s))

    return {index: number for number, index in enumerate(sorted(noted, key=speed), start=1)}


def staircase(points: Sequence[Point], axis: str) -> list[tuple[float, float]]:
    """Corners of the line that bounds what some setting on the front attains: at each speed the best score of those at
    least as fast. By speed; empty without a front."""
    steps = sorted(
        {(getattr(point, axis), point.score) for point in points if axis in point.front and is_drawn(point, axis)}
    )
    corners = steps[:1]
    for (x, _), after in pairwise(steps):
        corners += [(x, after[1]), after]
    return corners


def listed(known: Sequence[int], others: int = 0) -> str:
    """Settings at one place by number, e.g. "3, 4, 5 and 9 more"; `others` have no number that anything explains."""
    rest = others + max(len(known) - _MOST_TOGETHER, 0)
    return ", ".join(str(number) for number in known[:_MOST_TOGETHER]) + (f" and {rest} more" if rest else "")


def marked(point: Point) -> str:
    """What is special about the point, e.g. "recommended, best score"; empty if nothing is."""
    return ", ".join(words for mark, words in MARKS.items() if mark in point.marks)


def scored(point: Point, kind: str = "") -> str:
    """Its score with the interval, e.g. "85.3 % (95 % interval 81.0 to 89.6)"; `kind` stands before the ends."""
    ends = f"{kind}{point.low:.1f} to {point.high:.1f}" if has_interval(point) else "no interval"
    unit = " %" if point.is_percent else ""
    return f"{_figure(point.score, '.1f')}{unit} ({ends})"


def speeds(point: Point, short: bool = False) -> str:
    """How fast it is, e.g. "2.28 tokens per forward, 11,672 tokens per second", or "2.28 TPF, 11,672 tokens/s"."""
    units = ("TPF", "tokens/s") if short else ("tokens per forward", "tokens per second")
    return f"{_figure(point.tpf, '.2f')} {units[0]}, {_figure(point.tokens_per_s, ',.0f')} {units[1]}"


def described(point: Point, confidence: float) -> list[str]:
    """All that is known of a point but its name, as lines.

    Args:
        point: the setting.
        confidence: of its interval, between 0 and 1.
    """
    noted = [marked(point)] if point.marks else []
    fronts = [words for axis, words in AXES.items() if axis in point.front]
    if fronts:
        noted.append(f"on the front by {' and by '.join(fronts)}")
    if not point.complete:
        noted.append("dropped early")
    documents = f"{point.documents:,} document{'' if point.documents == 1 else 's'}"
    return [
        tidy(point.family),
        f"{scored(point, f'{confidence * 100:.4g} % interval ')} over {documents}",
        f"{speeds(point)}, {_figure(point.nfe, '.1f')} forwards per document",
        *(["; ".join(noted)] if noted else []),
    ]


def _figure(value: float, form: str) -> str:
    if not math.isfinite(value):
        return "unknown"
    return f"{value:.2g}" if 0 < abs(value) < 1 else f"{value:{form}}"
