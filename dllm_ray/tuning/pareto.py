"""What speed costs: the settings that no other beats in everything, and the area under their curve as one number.

Shapes: S settings, K figures of each.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import ArrayLike

from dllm_ray.tuning.tried import Tried

LARGEST_LOSS = 5.0
"""Points of accuracy that a curve may lose against its slowest setting; what loses more doesn't count."""
PENALTY = 3.0
"""How steeply accuracy below the best one is marked down."""

_ROUNDING = 1e-9  # of shares turned into percent, so that a loss of just 5 points is one of 5 points


def front(points: ArrayLike, maximise: Sequence[bool]) -> np.ndarray:
    """Which points no other one dominates: is as good in every figure, and better in one. Of equal points all stay.

    Args:
        points: [S, K]; a point with nan is on no front and dominates nothing.
        maximise: [K] whether more of a figure is better; else less is.

    Returns:
        [S] of bool.

    Raises:
        ValueError: the points don't have K figures.
    """
    signs_K = np.where(np.asarray(maximise, dtype=bool), 1.0, -1.0)
    points_SK = np.asarray(points, dtype=np.float64)
    if points_SK.size == 0:
        return np.zeros(len(points_SK), dtype=bool)
    if points_SK.ndim != 2 or points_SK.shape[1] != len(signs_K):
        raise ValueError(f"expected points with {len(signs_K)} figures each, got the shape {points_SK.shape}")
    gains_SK = points_SK * signs_K
    as_good_SS = np.all(gains_SK[:, None] >= gains_SK[None], axis=-1)
    better_SS = np.any(gains_SK[:, None] > gains_SK[None], axis=-1)
    return ~np.any(as_good_SS & better_SS, axis=0) & ~np.isnan(points_SK).any(axis=1)


def aup(pairs: Sequence[tuple[float, float]], best: float) -> float:
    """Accuracy under parallelism (Qian et al., arXiv 2601.07568) of one method on one task.

    The area under accuracy over tokens per forward: up to the slowest setting at its accuracy, from there by trapezoids
    with each accuracy y weighed by min(exp(-3 (1 - y / best)), 1). Settings more than 5 points below the slowest one
    are left out. Of settings equally fast the better one comes first.

    Args:
        pairs: tokens per forward, and accuracy in percent; in any order.
        best: the highest accuracy of any method on the task, in percent.

    Raises:
        ValueError: there are no pairs, tokens per forward aren't above 0, or a number isn't finite or below 0.
    """
    if not pairs:
        raise ValueError("accuracy under parallelism needs at least one pair")
    ordered = sorted(pairs, key=lambda pair: (pair[0], -pair[1]))
    if not all(0 < tpf < math.inf and 0 <= accuracy < math.inf for tpf, accuracy in pairs) or not 0 <= best < math.inf:
        raise ValueError(f"expected tokens per forward above 0 and accuracies in percent, got {ordered}, best {best}")
    first_tpf, first = ordered[0]
    kept = [(tpf, accuracy) for tpf, accuracy in ordered if accuracy >= first - LARGEST_LOSS - _ROUNDING]
    area = first_tpf * first
    for (slower, before), (faster, after) in pairwise(kept):
        area += (faster - slower) * (_weighed(before, best) + _weighed(after, best)) / 2
    return area


def aup_by_family(tried: Sequence[Tried], best: float | None = None) -> dict[str, float]:
    """Accuracy under parallelism of each family of settings, highest first.

    The published curves vary one setting; a family here holds settings that differ in more than parallelism. Its curve
    therefore is its front: the settings that no other one of the family beats in tokens per forward and score together.

    Args:
        tried: settings; those that were dropped, or wrote nothing, are left out.
        best: the highest published accuracy on the task, in percent, to be taken for the best of all if it is higher
            than the best setting's; None: there is none.

    Returns:
        Family -> area; empty where a mean score isn't a share of 1, for which this isn't defined.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}
    for one in tried:
        if one.complete and one.scores and 0 < one.tpf < math.inf:
            pairs.setdefault(one.family, []).append((one.tpf, 100 * one.score))
    accuracies = [accuracy for family in pairs.values() for _, accuracy in family]
    if not all(0 <= accuracy <= 100 for accuracy in accuracies):
        return {}
    highest = max(accuracies + [best or 0.0])
    areas = {
        name: aup([pair for pair, kept in zip(family, front(family, (True, True)), strict=True) if kept], highest)
        for name, family in pairs.items()
    }
    return dict(sorted(areas.items(), key=lambda item: -item[1]))


def _weighed(accuracy: float, best: float) -> float:
    return accuracy if accuracy >= best else accuracy * math.exp(-PENALTY * (1 - accuracy / best))
