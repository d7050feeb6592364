"""What scores of documents say about settings: confidence intervals, and which settings can't be told apart.

Documents are what varies: every interval is about more documents of the kind that were asked. Settings are compared on
the same documents, in pairs, because most of what makes a document hard makes it hard under every setting. This module
knows numbers; of a sweep it knows only `Tried`.

Shapes: S settings, D documents.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from dllm_ray.errors import ConfigError
from dllm_ray.tuning.tried import Tried

FEWEST = 10
"""Documents below which no two settings are told apart: by chance all their differences may be alike."""


class Interval(NamedTuple):
    """A mean, and between what it lies with the confidence that was asked for."""

    mean: float
    """The mean that was found; always within the bounds."""
    low: float
    """Lower bound; nan where one document can't tell."""
    high: float
    """Upper bound; nan where one document can't tell."""


class Comparison(NamedTuple):
    """Every setting against one of them."""

    differences: tuple[Interval, ...]
    """[S] Mean score of a setting minus that of the one it is compared with; 0 without width for that one itself."""
    tied: tuple[int, ...]
    """Indices of the other settings whose interval holds 0, or has no bounds."""


def interval(scores: ArrayLike, confidence: float) -> Interval:
    """The mean over documents, with its confidence interval.

    Wilson's score interval where all scores are 0 or 1 (E. B. Wilson 1927, J. Am. Stat. Assoc. 22), else Student's t,
    which takes scores that are all equal for certain. One document alone gives the whole range from 0 to 1, or nan.

    Args:
        scores: [D] one for each document.
        confidence: e.g. 0.95.

    Raises:
        ConfigError: the confidence isn't between 0 and 1.
        ValueError: there are no scores, or some that aren't finite.
    """
    x_D = _finite(scores, 1)
    _check_confidence(confidence)
    if not _is_binary(x_D):
        return _student(x_D, confidence)
    number, share = len(x_D), float(x_D.mean())
    if number == 1:
        return Interval(share, 0.0, 1.0)
    z = _normal_quantile(confidence)
    centre = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    reach = z * math.sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    return _within(share, centre - reach, centre + reach, 0.0, 1.0)


def difference(ours: ArrayLike, theirs: ArrayLike, confidence: float) -> Interval:
    """The mean difference `ours - theirs` on the same documents, with its confidence interval.

    Where all scores are 0 or 1: the adjusted Wald interval of Bonett and Price (2012, J. Educ. Behav. Stat. 37), which
    counts one document more on either side, so that settings which agree on every document aren't taken for equal with
    certainty. Else Student's t of the differences. One document alone gives the whole range from -1 to 1, or nan.

    Args:
        ours: [D] one score for each document.
        theirs: [D] likewise, in the same order.
        confidence: e.g. 0.95.

    Raises:
        ConfigError: the confidence isn't between 0 and 1.
        ValueError: there are no scores, some that aren't finite, or not as many on both sides.
    """
    x_D, y_D = _finite(ours, 1), _finite(theirs, 1)
    _check_confidence(confidence)
    if len(x_D) != len(y_D):
        raise ValueError(f"paired scores are of the same documents, got {len(x_D)} and {len(y_D)}")
    if not (_is_binary(x_D) and _is_binary(y_D)):
        return _student(x_D - y_D, confidence)
    number, mean = len(x_D), float((x_D - y_D).mean())
    if number == 1:
        return Interval(mean, -1.0, 1.0)
    only_ours = (np.sum(x_D > y_D) + 1) / (number + 2)
    only_theirs = (np.sum(x_D < y_D) + 1) / (number + 2)
    centre = only_ours - only_theirs
    reach = _normal_quantile(confidence) * math.sqrt((only_ours + only_theirs - centre**2) / (number + 2))
    return _within(mean, centre - reach, centre + reach, -1.0, 1.0)


def compare(scores: ArrayLike, best: int, confidence: float, chosen: bool = True) -> Comparison:
    """Every setting against the best one, at a confidence that holds for all these differences together (Bonferroni).

    Args:
        scores: [S, D] of the same documents.
        best: index of the setting that the others are compared with.
        confidence: e.g. 0.95; that all S - 1 intervals cover at once.
        chosen: these very scores made it the best. It could have been any, so the doubt is divided by all S(S - 1)/2
            pairs; off, for a setting that was fixed beforehand: by S - 1.

    Raises:
        ConfigError: the confidence isn't between 0 and 1.
        ValueError: no scores, some that aren't finite, or no such setting.
    """
    x_SD = _finite(scores, 2)
    _check_confidence(confidence)
    settings = len(x_SD)
    if not 0 <= best < settings:
        raise ValueError(f"there is no setting {best} among {settings}")
    claims = max(settings * (settings - 1) // 2 if chosen else settings - 1, 1)
    each = 1 - (1 - confidence) / claims
    differences = tuple(
        Interval(0.0, 0.0, 0.0) if index == best else difference(x_D, x_SD[best], each)
        for index, x_D in enumerate(x_SD)
    )
    few = x_SD.shape[1] < FEWEST
    tied = (
        index
        for index, found in enumerate(differences)
        if index != best and (few or not (found.high < 0 or found.low > 0))
    )
    return Comparison(differences, tuple(tied))


def winner(scores: ArrayLike, confidence: float) -> tuple[int, list[int]]:
    """The setting with the highest mean, and those that it can't be told apart from: a winner only if there are none.

    The setting that is best in truth is among them with at least this confidence.

    Args:
        scores: [S, D] of the same documents.
        confidence: as in `compare`.

    Returns:
        Index of the highest mean (the first of equal ones), and the indices tied with it.

    Raises:
        ConfigError, ValueError: as of `compare`.
    """
    x_SD = _finite(scores, 2)
    best = int(np.argmax([math.fsum(x_D) for x_D in x_SD]))
    return best, list(compare(x_SD, best, confidence).tied)


def common(tried: Sequence[Tried]) -> np.ndarray:
    """Scores [S, D] of the documents that all these settings have answered, in the order of the first one's.

    Raises:
        ValueError: there are no such documents.
    """
    documents = [name for name in tried[0].scores if all(name in one.scores for one in tried)] if tried else []
    if not documents:
        raise ValueError(f"no document was answered under all of: {'; '.join(one.name for one in tried)}")
    return np.array([[one.scores[name] for name in documents] for one in tried], dtype=np.float64)


def paired(a: Tried, b: Tried) -> tuple[np.ndarray, np.ndarray]:
    """Scores [D] of two settings on the documents that both have answered, in the same order.

    Raises:
        ValueError: there are no such documents.
    """
    x_D, y_D = common([a, b])
    return x_D, y_D


def _student(x_D: np.ndarray, confidence: float) -> Interval:
    number, mean = len(x_D), float(x_D.mean())
    if number == 1:
        return Interval(mean, math.nan, math.nan)
    from scipy.special import stdtrit

    reach = float(stdtrit(number - 1, (1 + confidence) / 2)) * float(x_D.std(ddof=1)) / math.sqrt(number)
    return Interval(mean, mean - reach, mean + reach)


def _normal_quantile(confidence: float) -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + confidence) / 2))


def _within(mean: float, low: float, high: float, least: float, most: float) -> Interval:
    """Bounds cut to the possible values, and never beyond the mean itself, where rounding or an adjustment put them."""
    return Interval(mean, float(max(min(low, mean), least)), float(min(max(high, mean), most)))


def _is_binary(x_D: np.ndarray) -> bool:
    return bool(np.all((x_D == 0) | (x_D == 1)))


def _finite(scores: ArrayLike, dimensions: int) -> np.ndarray:
    x = np.asarray(scores, dtype=np.float64)
    if x.ndim != dimensions or not x.size:
        raise ValueError(f"expected scores in {dimensions} dimension(s), at least one, got the shape {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{np.sum(~np.isfinite(x))} of {x.size} scores aren't finite")
    return x


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"must lie between 0 and 1, e.g. 0.95, got {confidence}", "confidence")
