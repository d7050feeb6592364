"""Designs of masks: unbiased, exact where all masks fit, and with a standard error that says how far off they are."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.evaluation.masks import Design, design


def estimate(masks: Design, score) -> tuple[float, float]:
    """Weighted sum and its standard error, written out."""
    mean = variance = 0.0
    differences = {}
    for mask, weight, stratum, sign in zip(*masks, strict=True):
        value = weight * score(mask)
        mean += value
        differences[stratum] = differences.get(stratum, 0.0) + sign * value
    variance = sum(difference**2 for difference in differences.values())
    return mean, variance**0.5


def reference(tokens: int, copies: int, source: np.random.Generator, score) -> float:
    """The estimate of today's code: mask counts on a grid with a random shift, masks drawn independently."""
    first = source.integers(1, tokens + 1)
    counts = np.round(np.linspace(first, first + (copies - 1) * tokens / copies, copies)).astype(int)
    total = 0.0
    for count in (counts - 1) % tokens + 1:
        mask = np.zeros(tokens, dtype=bool)
        mask[source.permutation(tokens)[:count]] = True
        total += score(mask) * tokens / count
    return total / copies


class Score:
    """Cross-entropies that differ from token to token, fall with what is visible, and depend on which tokens are."""

    def __init__(self, tokens: int, seed: int):
        source = np.random.default_rng(seed)
        self.own = source.exponential(2.0, tokens)
        self.pull = source.normal(0, 1.0, (tokens, tokens)) / tokens**0.5

    def __call__(self, mask: np.ndarray) -> float:
        each = self.own * (0.3 + 0.7 * mask.mean()) + np.abs(self.pull @ ~mask)
        return float(each[mask].sum())


def exactly(tokens: int, score) -> float:
    masks = (np.array(bits, dtype=bool) for bits in itertools.product([0, 1], repeat=tokens))
    return sum(score(mask) / (mask.sum() * math.comb(tokens, mask.sum())) for mask in masks if mask.any())


@given(tokens=st.integers(1, 60), copies=st.integers(1, 200), seed=st.integers(0, 99))
def test_masks_hide_something_and_are_no_more_than_asked_for(tokens, copies, seed):
    found = design(tokens, copies, np.random.default_rng(seed))
    assert found.masks.shape[1] == tokens and found.masks.any(axis=1).all()
    assert len(found.masks) <= copies
    assert len(found.masks) > 0.9 * copies - 2 or found.exact
    assert found.exact == (2**tokens - 1 <= copies)
    if copies > 1:
        for stratum in set(found.stratum.tolist()) - {-1}:
            assert found.sign[found.stratum == stratum].sum() == 0
    else:
        assert found.exact or np.isnan(found.sign).all()


@pytest.mark.parametrize("tokens", [1, 2, 3, 6])
def test_all_masks_are_summed_where_they_fit(tokens):
    score = Score(tokens, seed=1)
    found = design(tokens, 2**tokens - 1, np.random.default_rng(0))
    assert len({tuple(mask) for mask in found.masks}) == 2**tokens - 1
    mean, stderr = estimate(found, score)
    assert mean == pytest.approx(exactly(tokens, score)) and stderr == 0


@pytest.mark.parametrize(("tokens", "copies"), [(5, 12), (10, 16), (10, 100), (12, 33)])
def test_the_mean_over_many_seeds_is_the_exact_one(tokens, copies):
    score = Score(tokens, seed=2)
    means = [estimate(design(tokens, copies, np.random.default_rng(seed)), score)[0] for seed in range(600)]
    assert abs(np.mean(means) - exactly(tokens, score)) < 4 * np.std(means) / 600**0.5


@pytest.mark.parametrize(("tokens", "copies"), [(10, 32), (10, 128), (40, 16), (40, 128), (200, 64)])
def test_the_standard_error_says_how_far_estimates_spread_and_that_is_less_than_of_todays_code(tokens, copies):
    score = Score(tokens, seed=3)
    found = [estimate(design(tokens, copies, np.random.default_rng(seed)), score) for seed in range(300)]
    spread = np.std([mean for mean, _ in found])
    told = np.mean([stderr**2 for _, stderr in found]) ** 0.5
    assert told == pytest.approx(spread, rel=0.15)
    assert spread < np.std([reference(tokens, copies, np.random.default_rng(seed), score) for seed in range(300)])
