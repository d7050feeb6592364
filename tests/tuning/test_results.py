"""What settings have shown: a winner only where there is one, and nothing that was not answered in full."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tuning_testing import tried

from dllm_ray.tuning.config import SweepConfig
from dllm_ray.tuning.results import confirmed, find, with_held_out

GOOD, FAIR, BAD = [1] * 90 + [0] * 10, [1] * 88 + [0] * 12, [0] * 90 + [1] * 10


def found(*settings, official=None, published_best=None, **config):
    return find(settings, official or settings[0].name, SweepConfig(**config), published_best)


def test_a_lead_beyond_noise_is_won():
    what = found(tried("bad", BAD, 4.0), tried("good", GOOD, 1.0))
    assert (what.best, what.recommended, what.tied, what.is_won) == ("good", "good", frozenset(), True)
    assert what.fronts["tpf"] == {"good", "bad"}


def test_noise_is_not_a_lead_and_speed_decides():
    what = found(tried("slow", GOOD, 1.0), tried("quick", FAIR, 3.0), tried("bad", BAD, 9.0))
    assert (what.best, what.tied, what.is_won) == ("slow", {"quick"}, False)
    assert what.recommended == "quick"


@pytest.mark.parametrize(("tolerance", "recommended"), [(0.0, "slow"), (0.019, "slow"), (0.02, "quick"), (1, "quick")])
def test_the_recommended_setting_is_within_the_tolerance(tolerance, recommended):
    what = found(tried("slow", GOOD, 1.0), tried("quick", FAIR, 3.0), tolerance=tolerance)
    assert what.recommended == recommended


def test_what_can_be_told_apart_is_not_recommended_however_tolerant_one_is():
    what = found(tried("good", GOOD, 1.0), tried("bad", BAD, 9.0), tolerance=1.0)
    assert what.recommended == "good"


def test_of_equal_scores_the_fastest_is_the_best_one():
    settings = [tried("a", GOOD, 1.0), tried("b", GOOD, 3.0), tried("c", GOOD, 2.0)]
    what = found(*settings)
    assert (what.best, what.tied, what.recommended) == ("b", {"a", "c"}, "b")
    assert what.fronts["tpf"] == {"b"}
    assert [one.name for one in what.tried] == ["a", "b", "c"]


def test_the_sweeps_own_objective_says_what_is_fast():
    settings = [tried("a", GOOD, 1.0, 900.0, nfe=8.0), tried("b", GOOD, 2.0, 100.0, nfe=9.0)]
    recommended = [found(*settings, objectives=["score", name]).recommended for name in ("tpf", "tokens_per_s", "nfe")]
    assert recommended == ["b", "a", "a"]
    assert found(*settings, objectives=["score"], searcher="tpe").recommended == "b"


def test_an_unknown_speed_is_the_slowest():
    what = found(tried("a", GOOD, math.nan), tried("b", GOOD, 1.0))
    assert (what.best, what.recommended, what.fronts["tpf"]) == ("b", "b", {"b"})


def test_dropped_settings_do_not_win_while_there_is_one_that_was_not():
    what = found(tried("official", BAD), tried("dropped", [1] * 50, 9.0, complete=False))
    assert (what.best, what.recommended, what.tied) == ("official", "official", frozenset())
    assert all(names == {"official"} for names in what.fronts.values())
    assert what.intervals["dropped"].mean == 1.0


def test_where_none_is_complete_those_win_that_have_come_farthest():
    cut = [
        tried("a", [0] * 60, complete=False),
        tried("b", [1] * 60, complete=False),
        tried("c", [1] * 9, 9.0, complete=False),
    ]
    what = found(*cut)
    assert what.best == what.recommended == "b" and what.is_won
    assert what.fronts["tpf"] == {"b"}


def test_nothing_is_won_without_a_rival():
    assert not found(tried("official", GOOD)).is_won
    assert not found(tried("official", BAD), tried("dropped", [1] * 50, complete=False)).is_won


def test_scores_need_not_be_shares():
    what = found(tried("a", 3 * [40.0, 50.0, 45.0, 61.0]), tried("b", 3 * [90.0, 99.0, 95.0, 98.0], 0.5))
    assert (what.best, what.is_won, what.aup) == ("b", True, {})
    assert what.intervals["b"].mean == 95.5


def test_one_document_wins_nothing():
    what = found(tried("a", [0]), tried("b", [1]))
    assert what.best == "b" and what.tied == {"a"}


def test_a_setting_is_found_by_its_name():
    what = found(tried("a", GOOD), tried("b", BAD))
    assert what.named("b").scores["t/99"] == 1


binary = st.lists(st.integers(0, 1), min_size=6, max_size=6)
rows = st.lists(st.tuples(binary, st.integers(1, 5), st.booleans()), min_size=1, max_size=9)


@given(rows, st.integers(1, 6), st.data())
def test_what_is_chosen_holds_the_official_setting_and_no_more_than_was_asked_for(drawn, most, data):
    settings = [tried(f"s{index}", scores, tpf, complete=whole) for index, (scores, tpf, whole) in enumerate(drawn)]
    official = data.draw(st.sampled_from([one.name for one in settings]))
    what = found(*settings, official=official)
    chosen = what.chosen(most)
    assert official in chosen and chosen[0] == what.recommended
    assert len(chosen) == len(set(chosen)) <= most + (official not in chosen[:most])
    assert most == 1 or what.best in chosen
    assert set(chosen) <= {what.recommended, what.best, official} | what.fronts["tpf"]


@given(rows)
def test_findings_hang_together(drawn):
    settings = [tried(f"s{index}", scores, tpf, complete=whole) for index, (scores, tpf, whole) in enumerate(drawn)]
    what = found(*settings)
    rivals = [one for one in settings if one.complete] or settings
    assert what.named(what.best).score == max(one.score for one in rivals)
    assert {what.best, *what.tied} <= {one.name for one in rivals} and what.best not in what.tied
    solved = what.named(what.best).score > 0
    assert what.recommended in ({what.best, *what.tied} if solved else {what.official})
    assert any(what.named(name).score == what.named(what.best).score for name in what.fronts["tpf"])
    fastest = max(one.tpf for one in rivals)
    assert any(what.named(name).tpf == fastest for name in what.fronts["tpf"])


def test_where_nothing_is_solved_nothing_is_recommended():
    nothing = [0] * 20
    what = found(tried("official", nothing, 1.0), tried("fast", nothing, 4.0), official="official")
    assert what.recommended == "official"


def test_a_recommended_setting_that_is_worse_on_held_out_documents_gives_way():
    what = found(tried("best", GOOD, 1.0), tried("fast", GOOD, 4.0), tried("official", BAD, 0.5), official="official")
    assert (what.recommended, what.best) == ("fast", "fast")
    what = replace(what, best="best")
    held_out = {one.name: one for one in (tried("fast", [0] * 100), tried("best", GOOD), tried("official", BAD))}
    told = with_held_out(what, held_out, 0.95)
    assert (told.recommended, told.withdrawn) == ("best", "fast") and len(told.held_out) == 3
    held_out["best"] = tried("best", [0] * 100)
    assert with_held_out(what, held_out, 0.95).recommended == "official"
    held_out["fast"] = tried("fast", BAD)
    assert with_held_out(what, held_out, 0.95).withdrawn == ""


def test_chosen_settings_are_the_fronts_from_its_best_score_on():
    settings = [
        tried("official", BAD, 0.5),
        *(tried(f"f{tpf}", [1] * (100 - 9 * tpf) + [0] * 9 * tpf, tpf) for tpf in range(1, 6)),
    ]
    what = found(*settings)
    assert what.chosen(3) == ["f1", "f2", "f3", "official"]
    assert what.chosen(99) == ["f1", "f2", "f3", "f4", "f5", "official"]
    assert replace(what, official="f3").chosen(3) == ["f1", "f2", "f3"]


def test_confirmed_settings_stand_beside_the_official_one():
    held_out = {one.name: one for one in (tried("better", GOOD), tried("official", BAD), tried("same", BAD))}
    better, official, same = confirmed(held_out, "official", 0.95)
    assert [one.name for one in (better, official, same)] == ["better", "official", "same"]
    assert (better.verdict, official.verdict, same.verdict) == ("better", "official", "unclear")
    assert better.to_official.mean == pytest.approx(0.8) and official.to_official is None
    assert better.documents == 100 and better.interval.mean == pytest.approx(0.9)
    (_, worse) = confirmed({"good": tried("good", GOOD), "bad": tried("bad", BAD)}, "good", 0.95)
    assert worse.verdict == "worse"


def test_doubt_grows_with_the_settings_confirmed():
    scores = [1] * 6 + [0] * 34, [0] * 40

    def verdict(others):
        more = {f"o{index}": tried(f"o{index}", scores[1]) for index in range(others)}
        held_out = {"official": tried("official", scores[1]), "a": tried("a", scores[0]), **more}
        return next(one.verdict for one in confirmed(held_out, "official", 0.95) if one.name == "a")

    assert (verdict(0), verdict(20)) == ("better", "unclear")


def test_one_held_out_document_shows_no_difference():
    pair = {"official": tried("official", [0.5]), "a": tried("a", [9.5])}
    assert [one.verdict for one in confirmed(pair, "official", 0.95)] == ["official", "unclear"]
