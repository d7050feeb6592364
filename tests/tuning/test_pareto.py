"""Fronts hold what nothing else beats; the area under one is that of the paper."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.tuning import published
from dllm_ray.tuning.pareto import aup, aup_by_family, front
from dllm_ray.tuning.tried import Tried

small = st.integers(0, 4)  # so that figures often are equal
pairs = st.lists(st.tuples(st.floats(0.5, 20), st.floats(0, 100)), min_size=1, max_size=12)


def tried(name, tpf, score, cache="none", complete=True):
    sampler = {"cache": cache, "policy": "low_confidence"}
    return Tried(name, {}, sampler, {"0": score}, tpf, 1.0, 1.0, complete)


@given(st.lists(st.tuples(small, small, small), max_size=25), st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_a_front_is_what_no_other_point_dominates(points, maximise):
    def dominates(a, b):
        gains = [x - y if more else y - x for x, y, more in zip(a, b, maximise, strict=True)]
        return min(gains) >= 0 and max(gains) > 0

    expected = [not any(dominates(other, point) for other in points) for point in points]
    assert front(points, maximise).tolist() == expected


def test_equal_points_are_all_kept_and_directions_count():
    points = [(1, 90), (2, 80), (2, 80), (3, 70), (1, 80)]
    assert front(points, (True, True)).tolist() == [True, True, True, True, False]
    assert front(points, (False, True)).tolist() == [True, False, False, False, False]


def test_a_point_without_a_figure_is_on_no_front_and_keeps_none_off_it():
    assert front([(math.nan, 99), (2, 80), (1, math.nan)], (True, True)).tolist() == [False, True, False]


def test_no_points_have_no_front():
    assert front([], (True, True)).tolist() == []
    assert front(np.zeros((0, 2)), (True, True)).dtype == bool


def test_points_need_the_figures_that_are_compared():
    with pytest.raises(ValueError, match="2 figures"):
        front([(1, 2, 3)], (True, True))


def test_area_by_hand():
    """70 up to a TPF of 2; then 1 by (70 w + 68 w') / 2; 60 loses more than 5 points."""
    weights = [math.exp(-3 * (1 - accuracy / 80)) for accuracy in (70, 68)]
    expected = 2 * 70 + 1 * (70 * weights[0] + 68 * weights[1]) / 2
    assert aup([(9, 60), (2, 70), (3, 68)], 80) == pytest.approx(expected)


def test_the_best_method_isnt_marked_down():
    assert aup([(1, 80), (5, 80)], 80) == pytest.approx(5 * 80)
    assert aup([(1, 80), (5, 80)], 70) == pytest.approx(5 * 80)


def test_a_loss_of_just_five_points_counts():
    assert aup([(1, 62.0), (2, 100 * 0.57)], 62) > aup([(1, 62.0), (2, 56.9)], 62) == 62


@given(pairs, st.floats(1, 100), st.randoms())
def test_the_order_of_the_pairs_makes_no_difference(curve, best, random):
    shuffled = list(curve)
    random.shuffle(shuffled)
    assert aup(shuffled, best) == pytest.approx(aup(curve, best))


@given(pairs, st.floats(1, 100))
def test_area_lies_between_the_slowest_setting_alone_and_accuracy_times_speed(curve, best):
    kept = [pair for pair in curve if pair[1] >= min(curve, key=lambda pair: (pair[0], -pair[1]))[1] - 5.0001]
    first = min(curve, key=lambda pair: (pair[0], -pair[1]))
    fastest, highest = (max(column) for column in zip(*kept, strict=True))
    assert first[0] * first[1] * (1 - 1e-9) <= aup(curve, best) <= fastest * highest * (1 + 1e-9)


@given(pairs, st.floats(1, 60), st.floats(1, 40))
def test_a_better_best_method_marks_others_down(curve, best, more):
    assert aup(curve, best + more) <= aup(curve, best) * (1 + 1e-9)


def test_published_curves_rank_as_published():
    """Of the methods on LLaDA the authors' own has the largest area on all five tasks, by far more than the others'."""
    for name in published.names():
        if name.startswith("llada/"):
            curves = published.curves(name)
            best = max(accuracy for curve in curves.values() for _, accuracy in curve)
            areas = {method: aup(curve, best) for method, curve in curves.items()}
            assert max(areas, key=areas.get) == "d3LLM-LLaDA"
            assert areas["LLaDA"] == curves["LLaDA"][0][1]


@pytest.mark.parametrize("curve", [[], [(0, 50)], [(math.nan, 50)], [(1, -1)], [(1, math.inf)]])
def test_pairs_that_have_no_area_are_refused(curve):
    with pytest.raises(ValueError, match=r"pair|above 0"):
        aup(curve, 80)


def test_a_family_is_as_good_as_its_front():
    settings = [
        tried("slow", 1, 0.75),
        tried("worse", 2, 0.71),
        tried("fast", 4, 0.74),
        tried("cached", 6, 0.72, "dual"),
        tried("dropped", 30, 0.74, complete=False),
    ]
    found = aup_by_family(settings, None)
    assert found == {
        "dual cache, low_confidence": pytest.approx(aup([(6, 72)], 75)),
        "none cache, low_confidence": pytest.approx(aup([(1, 75), (4, 74)], 75)),
    }
    assert list(found) == ["dual cache, low_confidence", "none cache, low_confidence"]


def test_the_published_best_counts_where_it_is_higher():
    settings = [tried("slow", 1, 0.75), tried("fast", 4, 0.74)]
    pairs = [(1, 75), (4, 74)]
    assert list(aup_by_family(settings, 90).values()) == [pytest.approx(aup(pairs, 90))]
    assert list(aup_by_family(settings, 60).values()) == [pytest.approx(aup(pairs, 75))]


def test_families_that_wrote_or_solved_nothing():
    assert aup_by_family([tried("silent", 0, 0.5)], None) == {}
    assert aup_by_family([tried("wrong", 2, 0.0), tried("wrong too", 3, 0.0)], None) == {
        "none cache, low_confidence": 0.0
    }


def test_scores_that_are_no_shares_have_no_area():
    assert aup_by_family([tried("nats", 1, -2.5), tried("share", 1, 0.5)], None) == {}
