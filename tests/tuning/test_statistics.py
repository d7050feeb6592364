"""Intervals cover what they should about as often as they say, and noise isn't taken for a winner."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError
from dllm_ray.tuning.statistics import FEWEST, common, compare, difference, interval, paired, winner
from dllm_ray.tuning.tried import Tried

Z = 1.959963984540054  # of 95 %

answers = st.lists(st.sampled_from([0, 1]), min_size=1, max_size=40)
levels = st.floats(0.5, 0.9999)


def tried(scores, name="a"):
    return Tried(name, {}, {}, scores, 1.0, 1.0, 1.0, True)


def binary(ones, zeros):
    return np.repeat([1.0, 0.0], [ones, zeros])


def discordant(ours, theirs, number):
    """Pairs of scores of which so many differ one way and the other."""
    x, y = np.zeros(number), np.zeros(number)
    x[:ours], y[ours : ours + theirs] = 1, 1
    return x, y


def probabilities(number, shares):
    """Outcome -> its probability, of `number` draws with these shares."""
    for counts in product(range(number + 1), repeat=len(shares) - 1):
        if sum(counts) <= number:
            whole = (*counts, number - sum(counts))
            ways = math.factorial(number) // math.prod(map(math.factorial, whole))
            yield counts, ways * math.prod(share**count for share, count in zip(shares, whole, strict=True))


def test_wilson_interval_solves_its_equation():
    """Its bounds are the shares p at which the found one is z standard errors of p away."""
    found = interval(binary(3, 17), 0.95)
    assert found.mean == 0.15
    for bound in (found.low, found.high):
        assert abs(found.mean - bound) == pytest.approx(Z * math.sqrt(bound * (1 - bound) / 20))


def test_wilson_interval_is_cut_at_the_ends_of_the_range():
    assert interval(np.zeros(30), 0.95)[:2] == (0.0, 0.0)
    assert interval(np.ones(30), 0.95)[::2] == (1.0, 1.0)
    assert interval(np.zeros(30), 0.95).high == pytest.approx(Z**2 / (30 + Z**2))


@pytest.mark.parametrize(("number", "least"), [(2, 0.82), (5, 0.83), (10, 0.85), (50, 0.90), (200, 0.915)])
def test_intervals_of_shares_cover_at_the_nominal_rate(number, least):
    """Exactly, for shares from 0.5 % to 99.5 %: on average 95 %, and never far less where it is most in doubt."""
    bounds = [interval(binary(ones, number - ones), 0.95) for ones in range(number + 1)]
    coverage = [
        sum(
            probability
            for (ones,), probability in probabilities(number, (share, 1 - share))
            if bounds[ones].low <= share <= bounds[ones].high
        )
        for share in np.linspace(0.005, 0.995, 100)
    ]
    assert 0.945 <= np.mean(coverage) <= 0.96
    assert min(coverage) >= least


def test_intervals_of_real_scores_cover_at_the_nominal_rate():
    random = np.random.default_rng(0)
    found = [interval(random.normal(3.0, 2.0, 4), 0.9) for _ in range(2000)]
    assert np.mean([low <= 3.0 <= high for _, low, high in found]) == pytest.approx(0.9, abs=0.02)


def test_interval_of_real_scores_by_hand():
    found = interval([1.0, 2.0, 3.0], 0.95)  # a standard deviation of 1, and t with 2 degrees of freedom
    assert found == pytest.approx((2.0, 2 - 4.302652729911275 / math.sqrt(3), 2 + 4.302652729911275 / math.sqrt(3)))


def test_one_document_alone_says_nothing():
    assert interval([1], 0.95) == (1.0, 0.0, 1.0)
    assert difference([1], [0], 0.95) == (1.0, -1.0, 1.0)
    assert interval([0.3], 0.95).mean == 0.3
    assert math.isnan(interval([0.3], 0.95).low) and math.isnan(difference([0.3], [0.1], 0.95).high)


def test_paired_difference_by_hand():
    """1 and 7 of 21 pairs differ: with one more on either side 2/23 and 8/23."""
    found = difference(*discordant(1, 7, 21), 0.95)
    reach = Z * math.sqrt((10 / 23 - (6 / 23) ** 2) / 23)
    assert found == pytest.approx((-6 / 21, -6 / 23 - reach, -6 / 23 + reach))


def test_agreement_on_every_document_leaves_doubt_that_shrinks():
    few, many = (difference(scores, scores, 0.95) for scores in (np.ones(10), np.ones(1000)))
    assert few.mean == many.mean == 0
    assert few.low == -few.high < many.low < 0 < many.high < 0.005


@pytest.mark.parametrize("number", [5, 10, 25])
@pytest.mark.parametrize("ours", [0.001, 0.05, 0.3, 0.45])
@pytest.mark.parametrize("theirs", [0.001, 0.05, 0.3, 0.45])
def test_paired_differences_cover_at_the_nominal_rate(number, ours, theirs):
    """Exactly, however few documents set two settings apart."""
    coverage = 0.0
    for counts, probability in probabilities(number, (ours, theirs, 1 - ours - theirs)):
        found = difference(*discordant(*counts, number), 0.95)
        coverage += probability * (found.low <= ours - theirs <= found.high)
    assert coverage >= 0.915


def test_paired_differences_of_real_scores_know_that_hard_documents_are_hard_for_both():
    random = np.random.default_rng(0)
    covered, widths = [], []
    for _ in range(1000):
        hardness = random.normal(0, 5, 12)
        x, y = hardness + random.normal(0.5, 1, 12), hardness + random.normal(0, 1, 12)
        found = difference(x, y, 0.95)
        covered.append(found.low <= 0.5 <= found.high)
        widths.append((found.high - found.low) / (interval(x, 0.95).high - interval(x, 0.95).low))
    assert np.mean(covered) == pytest.approx(0.95, abs=0.02)
    assert np.mean(widths) < 0.5


@given(answers, levels)
def test_bounds_hold_the_mean_and_stay_in_the_range(scores, level):
    found = interval(scores, level)
    assert 0 <= found.low <= found.mean <= found.high <= 1


@given(st.lists(st.tuples(st.sampled_from([0, 1]), st.sampled_from([0, 1])), min_size=1, max_size=40), levels)
def test_a_difference_the_other_way_round_is_its_negative(pairs, level):
    x, y = np.array(pairs).T
    found, back = difference(x, y, level), difference(y, x, level)
    assert -1 <= found.low <= found.mean <= found.high <= 1
    assert (back.mean, back.low, back.high) == pytest.approx((-found.mean, -found.high, -found.low))


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), st.floats(-10, 10))
def test_more_confidence_is_wider_and_a_shift_moves_the_bounds(scores, shift):
    scores = [*scores, 0.5]  # so that they aren't all 0 or 1
    narrow, wide = interval(scores, 0.8), interval(scores, 0.99)
    assert wide.low <= narrow.low <= narrow.mean <= narrow.high <= wide.high
    moved = interval(np.array(scores) + shift + 1000, 0.8)
    assert moved == pytest.approx(np.array(narrow) + shift + 1000)


def settings_alike(random, documents, noise=0.0):
    """[20, D] answers of settings that don't differ, to documents of all degrees of hardness."""
    share_D = random.beta(1, 1, documents)
    return (random.random((20, documents)) < share_D).astype(float) + noise * random.normal(size=(20, documents))


@pytest.mark.parametrize("documents", [8, 50, 200])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_noise_alone_crowns_nobody(documents, noise):
    """Twenty equal settings: all of them stay tied in at least 95 % of sweeps, whichever looks best."""
    random = np.random.default_rng(documents)
    found = [winner(settings_alike(random, documents, noise), 0.95) for _ in range(150)]
    assert all(tied for _, tied in found)
    assert np.mean([len(tied) < 19 for _, tied in found]) <= 0.075  # 5 %, and chance


def test_against_a_setting_fixed_beforehand_fewer_comparisons_need_less_doubt():
    random = np.random.default_rng(0)
    lost = 0
    for _ in range(150):
        scores = settings_alike(random, 200)
        fixed, chosen = (compare(scores, 0, 0.95, chosen=flag) for flag in (False, True))
        lost += len(fixed.tied) < 19
        assert all(a.low > b.low and a.high < b.high for a, b in list(zip(*(fixed[0], chosen[0]), strict=True))[1:])
    assert lost / 150 <= 0.075


def test_a_setting_that_is_far_better_wins():
    random = np.random.default_rng(0)
    scores = (random.random((5, 500)) < np.array([0.5, 0.5, 0.7, 0.5, 0.5])[:, None]).astype(float)
    assert winner(scores, 0.95) == (2, [])


def test_settings_tied_with_the_best_are_named():
    scores = np.array([binary(90, 10), binary(20, 80), binary(91, 9), binary(88, 12)])
    best, tied = winner(scores, 0.95)
    assert (best, tied) == (2, [0, 3])
    found = compare(scores, best, 0.95)
    assert found.tied == (0, 3)
    assert [entry.mean for entry in found.differences] == pytest.approx([-0.01, -0.71, 0, -0.03])
    assert found.differences[2] == (0, 0, 0)


def test_the_doubt_is_divided_among_all_comparisons():
    scores = np.array([binary(9, 31), binary(12, 28), binary(20, 20)])
    for chosen, claims in ((True, 3), (False, 2)):
        found = compare(scores, 2, 0.9, chosen).differences[0]
        assert found == pytest.approx(difference(scores[0], scores[2], 1 - 0.1 / claims))


def test_one_setting_wins_alone_and_one_document_decides_nothing():
    assert winner([[0, 1, 1]], 0.95) == (0, [])
    assert winner([[0.0], [1.0]], 0.95) == (1, [0])
    assert winner([[0.2], [0.7]], 0.95) == (1, [0])


def test_settings_are_paired_on_the_documents_that_both_have_answered():
    a, b = tried({"1": 1.0, "2": 0.0, "3": 0.5}), tried({"3": 1.0, "0": 0.0, "1": 0.25})
    x, y = paired(a, b)
    assert (x.tolist(), y.tolist()) == ([1.0, 0.5], [0.25, 1.0])
    assert common([a, b, tried({"3": 0.0})]).tolist() == [[0.5], [1.0], [0.0]]


def test_settings_without_a_common_document_are_refused():
    with pytest.raises(ValueError, match="quick; slow"):
        paired(tried({"1": 1.0}, "quick"), tried({"2": 1.0}, "slow"))


@pytest.mark.parametrize("level", [0, 1, 95, math.nan])
def test_a_confidence_is_a_share(level):
    for ask in (lambda: interval([0, 1], level), lambda: winner([[0, 1]], level)):
        with pytest.raises(ConfigError, match=r"confidence: .* between 0 and 1"):
            ask()


@pytest.mark.parametrize(
    "ask",
    [
        lambda: interval([], 0.95),
        lambda: interval([0, math.nan], 0.95),
        lambda: difference([0, 1], [0], 0.95),
        lambda: winner([0, 1], 0.95),
        lambda: winner([[0, math.inf]], 0.95),
        lambda: compare([[0, 1]], 1, 0.95),
        lambda: common([]),
    ],
)
def test_scores_that_say_nothing_are_refused(ask):
    with pytest.raises(ValueError, match=r"scores|setting|document"):
        ask()


def test_few_documents_tell_no_settings_apart():
    few = np.array([[1.5, 1.5], [1.0, 1.0]])
    assert winner(few, 0.95) == (0, [1])
    assert winner(np.repeat(few, FEWEST // 2, axis=1), 0.95) == (0, [])
