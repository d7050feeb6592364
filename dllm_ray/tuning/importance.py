"""How much of the differences between settings each swept parameter explains: functional ANOVA (Hutter et al. 2014,
"An Efficient Approach for Assessing Hyperparameter Importance", ICML) over a random forest, by Optuna.

Shapes: S settings.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from dllm_ray.tuning.tried import Tried

TARGETS = ("score", "tpf", "tokens_per_s", "nfe")
"""Figures of a setting that can be explained."""
FEWEST = 4
"""Settings below which nothing is explained."""


def importance(tried: Sequence[Tried], target: str, seed: int = 0) -> dict[str, float]:
    """The share of the variation of a figure that each swept parameter explains by itself, most important first.

    Every setting counts with its value of every parameter, also where a condition kept that at the base's: what
    switching a parameter on or off does is a part of its effect. Numbers count by their order, and each about as often
    as it was tried, so that it doesn't matter whether they were drawn on a logarithmic scale. What parameters do only
    together isn't shown, and where two of them always change together the share is divided between them.

    Args:
        tried: settings, with whatever documents each was answered on; those whose figure isn't finite are left out.
        target: one of `TARGETS`.
        seed: seeds the forest.

    Returns:
        Parameter -> share; they sum to 1. A parameter with one value has 0. Empty with fewer than four settings, or if
        the figure or all parameters are the same in all of them.

    Raises:
        ValueError: no such target.
    """
    if target not in TARGETS:
        raise ValueError(f"expected a target of {', '.join(TARGETS)}, got {target!r}")
    tried = [one for one in tried if math.isfinite(getattr(one, target))]
    found_S = [float(getattr(one, target)) for one in tried]
    names = list(dict.fromkeys(name for one in tried for name in one.changes))
    values = {name: [_plain(one.sampler[name]) for one in tried] for name in names}
    varied = {name: column for name, column in values.items() if len(set(map(repr, column))) > 1}
    if len(tried) < FEWEST or not varied or min(found_S) == max(found_S):
        return {}
    explained = _explained(varied, found_S, seed)
    total = sum(explained.values())
    if not total:
        return {}
    shares = {name: explained.get(name, 0.0) / total for name in names}
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _explained(columns: dict[str, list[Any]], found_S: Sequence[float], seed: int) -> dict[str, float]:
    """Parameter -> fraction of the variance that it explains by itself."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    distributions: dict[str, Any] = {}
    encoded: dict[str, Sequence[Any]] = {}
    for name, column in columns.items():
        if all(value is None or isinstance(value, int | float) for value in column):
            encoded[name], distributions[name] = _places(column), FloatDistribution(0.0, float(len(column)))
        else:
            encoded[name] = [repr(value) for value in column]
            distributions[name] = CategoricalDistribution(sorted(set(encoded[name])))
    with _quiet():
        study = optuna.create_study()
        study.add_trials(
            optuna.create_trial(
                params={name: column[index] for name, column in encoded.items()},
                distributions=distributions,
                value=value,
            )
            for index, value in enumerate(found_S)
        )
        return optuna.importance.FanovaImportanceEvaluator(seed=seed).evaluate(study)


def _places(column: Sequence[float | None]) -> list[float]:
    """Numbers -> the middle of the places that they take among all, in order, from 0 to S; null comes first."""
    numbers = np.array([-math.inf if value is None else value for value in column], dtype=np.float64)
    below_S = np.sum(numbers[None] < numbers[:, None], axis=1)
    equal_S = np.sum(numbers[None] == numbers[:, None], axis=1)
    return [float(place) for place in below_S + equal_S / 2]


def _plain(value: Any) -> Any:
    """One spelling for what is one value: 1 and 1.0, lists and tuples."""
    if isinstance(value, list | tuple):
        return tuple(value)
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Optuna says of its studies."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)
