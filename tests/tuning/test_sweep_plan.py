"""What a sweep will ask: documents that don't overlap, settings in order, and how many at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.run import Loaded
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning.config import SweepConfig
from dllm_ray.tuning.plan import plan, rows

BASE = SamplerConfig(max_new_tokens=8, block_size=8, steps=8)
SPACE = {"temperature": [0.0, 0.5], "steps": [8, 4, 2, 1]}


def task(documents=100, name="t"):
    return Loaded(name, documents, {}, {}, ("none",))


def planned(tasks=None, limit=None, seed=0, base=BASE, **settings):
    return plan(SweepConfig(**{"space": SPACE} | settings), tasks or [task()], base, limit, seed)


counts = st.none() | st.integers(1, 60)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=3), counts, st.none() | st.integers(0, 60), st.none() | counts)
def test_documents_of_search_and_confirmation_are_apart_and_there(sizes, documents, holdout, limit):
    tasks = [task(size, f"t{index}") for index, size in enumerate(sizes)]
    most = min([*sizes, limit or 60])
    try:
        found = planned(tasks, limit, documents=documents, holdout=holdout)
    except ConfigError as error:
        assert error.field in ("sweep.documents", "sweep.holdout")
        assert max(documents or 0, 1) + (holdout or 0) > most
        return
    assert found.search.start == 0 and len(found.search) >= 1
    assert found.held_out.start == found.search.stop and found.held_out.stop <= most
    assert documents in (None, len(found.search)) and holdout in (None, len(found.held_out))
    assert found.asked == len(tasks) * len(found.search)


@pytest.mark.parametrize(
    ("settings", "search", "held_out"),
    [
        ({}, range(67), range(67, 100)),
        ({"limit": 9}, range(6), range(6, 9)),
        ({"documents": 50}, range(50), range(50, 83)),
        ({"documents": 90}, range(90), range(90, 100)),
        ({"documents": 100}, range(100), range(100, 100)),
        ({"holdout": 0}, range(100), range(100, 100)),
        ({"holdout": 30}, range(70), range(70, 100)),
        ({"documents": 20, "holdout": 10, "limit": 40}, range(20), range(20, 30)),
    ],
)
def test_what_is_not_set_is_two_thirds_and_one(settings, search, held_out):
    found = planned(**settings)
    assert (found.search, found.held_out) == (search, held_out)


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"documents": 101}, "sweep.documents", "101 documents for the search and 0 held-out ones .* there are: 100$"),
        ({"documents": 90, "holdout": 11}, "sweep.documents", "90 documents .* 11 held-out ones are more"),
        ({"holdout": 100}, "sweep.holdout", "0 documents for the search and 100 held-out ones"),
        ({"holdout": 9, "limit": 9}, "sweep.holdout", r"there are: 9 \(of 100, evaluate\.limit\)"),
        (
            {"asha": True, "objectives": ["score"], "first_documents": 67},
            "sweep.first_documents",
            "dropped after 67 documents, and the search has only 67",
        ),
        ({"space": {"temprature": [0.0]}}, "sweep.space", "temprature"),
    ],
)
def test_what_can_not_be_asked_is_said_before(settings, field, message):
    with pytest.raises(ConfigError, match=message) as error:
        planned(**settings)
    assert error.value.field.startswith(field)


def test_tasks_share_the_places_of_the_smallest():
    found = planned([task(100, "a"), task(12, "b")])
    assert (found.search, found.held_out, found.asked) == (range(8), range(8, 12), 16)


def test_a_grid_is_tried_in_its_order_and_with_asha_in_a_drawn_one():
    def tried(**settings):
        return [one.name for one in planned(**settings).candidates]

    asha = {"asha": True, "objectives": ["score"]}
    grid = tried()
    assert len(grid) == planned().trials == 8
    assert tried(**asha) == tried(**asha) != grid
    assert sorted(tried(**asha)) == sorted(grid)
    assert tried(**asha) != tried(**asha, seed=1)


def test_drawn_settings_follow_from_the_seed_and_searchers_draw_their_own():
    drawn = [planned(searcher="random", samples=3, seed=seed) for seed in (0, 0, 1)]
    names = [[one.name for one in found.candidates] for found in drawn]
    assert names[0] == names[1] != names[2]
    assert [found.trials for found in drawn] == [3, 3, 3]
    found = planned(searcher="tpe", samples=5)
    assert found.candidates is None and found.trials == 5


def test_the_official_setting_is_a_candidate_where_the_space_holds_it():
    inside = planned()
    assert inside.official in inside.candidates and inside.official.sampler == BASE
    outside = planned(base=SamplerConfig(max_new_tokens=8, block_size=8, steps=3))
    assert outside.official.name == "official" and outside.official.changes == {}
    assert outside.official not in outside.candidates
    assert planned(searcher="tpe").official.name == "official"


@pytest.mark.parametrize(
    ("settings", "workers", "slice_rows", "expected"),
    [
        ({"concurrent": 5}, 2, 64, 5),
        ({}, 2, 64, 2),  # two slices keep two workers busy; a second setting when the last slice is under way
        ({}, 8, 64, 5),
        ({}, 1, 1, 2),
        ({}, 64, 64, 8),  # no more than there are
        ({"asha": True, "objectives": ["score"], "first_documents": 32}, 2, 16, 2),
        ({"asha": True, "objectives": ["score"], "first_documents": 32}, 2, 64, 3),
    ],
)
def test_as_many_settings_at_a_time_as_keep_workers_busy(settings, workers, slice_rows, expected):
    config = SweepConfig(space=SPACE, **settings)
    found = plan(config, [task()], BASE, None, 0)
    assert found.concurrent(config, workers, slice_rows) == expected


def test_a_plan_is_told_in_rows():
    config = SweepConfig(space=SPACE, confirm=2)
    tasks = [task(90, "a"), task(90, "b")]
    outside = SamplerConfig(max_new_tokens=8, block_size=8, steps=3)

    def told(base):
        return {row["what"]: row["number"] for row in rows(plan(config, tasks, base, None, 0), config, tasks)}

    assert told(BASE) == {
        "settings": "8, by grid",
        "documents of the search": "60 (0 to 59) of a, b",
        "held-out documents": "30 (60 to 89) of a, b",
        "answers at most": "960 and 3 x 60 held out",
        "combinations that can't be": "0",
    }
    assert told(outside)["answers at most"] == "1,080 and 3 x 60 held out"
    whole = SweepConfig(space=SPACE, holdout=0)
    told_rows = rows(plan(whole, tasks, BASE, None, 0), whole, tasks)
    assert {row["what"]: row["number"] for row in told_rows}["held-out documents"] == "none"
