"""How many masks a step commits, and which."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dllm_ray.sampling.unmasking import (
    by_certainty,
    by_factor,
    by_threshold,
    commit_schedule,
    dream_block_schedule,
    due,
    even_schedule,
    rank_in_row,
    stochastic_schedule,
)

SCHEDULES = pytest.mark.parametrize("schedule", ["linear", "cosine", "dream"])


@pytest.fixture(scope="module")
def vectors(golden) -> dict:
    path = golden.parent / "facts" / "schedule_vectors.json"
    if not path.is_file():
        pytest.skip(f"needs {path}, which is not there")
    return json.loads(path.read_text())


def spelled_out(runs: list[list[int]]) -> tuple[int, ...]:
    return tuple(chain.from_iterable([value] * count for value, count in runs))


# --- how many


def test_commit_schedules_are_the_references(golden):
    tables = json.loads((golden / "common" / "schedulers.json").read_text())["get_num_transfer_tokens"]
    assert len(tables) > 10
    for table in tables:
        for masks, row in zip(table["counts"], table["out"], strict=True):
            counts = commit_schedule(masks, table["steps"], table["scheduler"])
            assert [*counts, *[0] * (len(row) - len(counts))] == row, table


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_commit_schedules_are_dllms(vectors, schedule):
    assert len(vectors["vectors"]) > 20
    for item in vectors["vectors"]:
        assert list(commit_schedule(item["masks"], item["steps"], schedule)) == item[f"dllm_{schedule}"], item


def test_halves_fall_as_the_float32_of_the_reference_makes_them(vectors):
    assert len(vectors["disagreements"]) > 100
    for item in vectors["disagreements"]:
        assert list(commit_schedule(item["masks"], item["steps"])) == item["float32_actual"], item
        assert item["float32_actual"] != item["exact_half_even"]


def test_dreams_time_steps_commit_what_its_own_code_commits(vectors):
    assert len(vectors["dream_official"]) > 10
    for item in vectors["dream_official"]:
        counts = spelled_out(item["counts_run_length"])
        assert commit_schedule(item["masks"], item["steps"], "dream") == counts, item


def test_a_cached_block_of_dream_begins_with_one_token_and_goes_on_by_its_time_steps(vectors):
    assert len(vectors["dream_cached_block"]) > 3
    for item in vectors["dream_cached_block"]:
        inner = spelled_out(item["counts_from_inner_step_1_run_length"])
        assert sum(inner) == item["masks_after_first_token"] == item["block"] - 1
        assert dream_block_schedule(item["block"], item["steps_per_block"]) == (1, *inner), item


@pytest.mark.parametrize(
    ("masks", "steps", "counts"),
    [
        (8, 8, (1,) * 8),
        (8, 4, (2, 2, 2, 2)),
        (10, 4, (2, 3, 2, 3)),  # 10/4 -> 2, 8/3 -> 3, 5/2 -> 2 (half to even), 3
        (3, 8, (1, 1, 1)),  # more steps than masks: the others are left out
        (5, 1, (5,)),
        (0, 4, ()),
    ],
)
def test_linear_schedules_by_hand(masks, steps, counts):
    assert commit_schedule(masks, steps) == counts


@SCHEDULES
@given(masks=st.integers(0, 300), steps=st.integers(1, 300))
def test_a_schedule_commits_every_mask_within_its_steps(schedule, masks, steps):
    counts = commit_schedule(masks, steps, schedule)
    assert sum(counts) == masks
    assert len(counts) <= steps
    least = 0 if schedule == "dream" else 1  # steps that commit nothing are part of Dream's histories
    assert all(count >= least for count in counts)
    assert not counts or masks == 0 or counts[-1] > 0


def test_a_cosine_schedule_commits_few_tokens_first():
    counts = commit_schedule(256, 16, "cosine")
    assert sum(counts[:8]) < 256 / 3 < sum(counts[8:])


@SCHEDULES
@given(steps=st.integers(1, 200))
def test_the_last_step_is_due_everything_that_is_left(schedule, steps):
    shares = due(steps, schedule)
    assert len(shares) == steps
    assert shares[-1] == 1
    assert all(0 < share <= 1 for share in shares)


@given(masks=st.integers(0, 100), steps=st.integers(1, 100))
@example(masks=32, steps=1)
def test_a_cached_block_of_dream_commits_every_mask_and_the_first_alone(masks, steps):
    counts = dream_block_schedule(masks, steps)
    assert sum(counts) == masks
    assert all(count >= 0 for count in counts)
    assert counts[:1] == ((1,) if masks else ())
    assert len(counts) <= max(steps, 2)  # beside the first there is at least one step for the others


@SCHEDULES
@given(masks=st.integers(0, 100), steps=st.integers(1, 40), seed=st.integers(-(2**63), 2**63 - 1))
def test_drawn_counts_commit_every_mask_and_follow_from_the_seed(schedule, masks, steps, seed):
    counts = stochastic_schedule(masks, steps, schedule, seed, 3)
    assert sum(counts) == masks
    assert len(counts) <= steps
    assert all(count > 0 for count in counts)
    assert counts == stochastic_schedule(masks, steps, schedule, seed, 3)


@SCHEDULES
def test_drawn_counts_are_binomial_around_the_schedule(schedule):
    masks, steps = 200, 4  # so many that no step draws 0 and is left out
    counts = np.array([stochastic_schedule(masks, steps, schedule, seed, 0) for seed in range(2000)])
    assert np.abs(counts.mean(axis=0) - commit_schedule(masks, steps, schedule)).max() < 1.2  # rounding, and noise
    share = due(steps, schedule)[0]
    assert counts[:, 0].var() == pytest.approx(masks * share * (1 - share), rel=0.15)


def test_other_seeds_and_other_steps_draw_other_counts():
    first = stochastic_schedule(60, 6, "linear", 1, 0)
    assert len({first, stochastic_schedule(60, 6, "linear", 2, 0), stochastic_schedule(60, 6, "linear", 1, 8)}) == 3


@given(size=st.integers(1, 64), steps=st.integers(1, 64))
def test_an_even_schedule_splits_a_block_with_the_larger_parts_first(size, steps):
    counts = even_schedule(size, steps)
    assert len(counts) == steps
    assert sum(counts) == size
    assert max(counts) - min(counts) <= 1
    assert list(counts) == sorted(counts, reverse=True)


def test_an_even_schedule_is_lladas_official_split(vectors):
    for item in vectors["vectors"]:
        counts = even_schedule(item["masks"], item["steps"])
        assert [count for count in counts if count] == item["llada_even_split"], item


# --- which


LEVELS = st.sampled_from([-1.5, 0.0, 0.25, 0.5, 0.75, 0.875, 1.0])
"""Few values, so that ties are common, as between certainties of a trained model."""


@st.composite
def candidates(draw):
    """Rows of any length, some of them without a candidate."""
    rows = draw(st.lists(st.lists(LEVELS, max_size=12), min_size=1, max_size=5))
    row_N = np.array([row for row, values in enumerate(rows) for _ in values], np.int64)
    return rows, row_N, np.array([value for values in rows for value in values], np.float32)


def slow_ranks(values: list[float]) -> list[int]:
    """For each value, how many come before it: the larger ones, and equal ones to its left."""
    return [
        sum(other > value or (other == value and left < place) for left, other in enumerate(values))
        for place, value in enumerate(values)
    ]


def flat(rows: list[list]) -> list:
    return [value for row in rows for value in row]


@given(candidates())
def test_ranks_are_those_of_a_slow_count_and_of_equals_the_leftmost_comes_first(case):
    rows, row_N, order_N = case
    ranks = rank_in_row(row_N, order_N)
    assert ranks.tolist() == flat([slow_ranks(values) for values in rows])


@given(candidates(), st.data())
def test_rows_are_ranked_alike_whatever_their_numbers_and_neighbours(case, data):
    rows, row_N, order_N = case
    numbers = np.array(sorted(data.draw(st.sets(st.integers(0, 50), min_size=len(rows), max_size=len(rows)))))
    assert rank_in_row(numbers[row_N], order_N).tolist() == rank_in_row(row_N, order_N).tolist()


@given(candidates(), LEVELS)
def test_a_threshold_takes_all_that_reach_it_and_at_least_the_best(case, threshold):
    rows, row_N, confidence_N = case
    expected = []
    for values in rows:
        picked = [value >= np.float32(threshold) for value in values]
        if values and not any(picked):
            picked[values.index(max(values))] = True
        expected += picked
    assert by_threshold(confidence_N, rank_in_row(row_N, confidence_N), threshold).tolist() == expected


def test_a_threshold_is_reached_by_the_float32_next_to_it():
    confidence = np.array([1.0, np.float32(0.9), np.nextafter(np.float32(0.9), np.float32(0))], np.float32)
    picked = by_threshold(confidence, np.arange(3), 0.9)
    assert picked.tolist() == [True, True, False]


@given(candidates(), st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.0]))
def test_a_factor_takes_as_many_of_the_best_as_there_are_ranks_that_pass(case, factor):
    rows, row_N, confidence_N = case
    expected = []
    for values in rows:
        ordered = sorted(values, reverse=True)
        passing = sum(rank == 1 or value >= 1 - factor / (rank + 1) for rank, value in enumerate(ordered, start=1))
        expected += [rank < passing for rank in slow_ranks(values)]
    assert by_factor(row_N, confidence_N, rank_in_row(row_N, confidence_N), factor).tolist() == expected


@given(candidates(), st.lists(st.integers(0, 14), min_size=5, max_size=5), LEVELS)
def test_certainty_takes_all_above_the_threshold_or_else_the_quota(case, quotas, threshold):
    rows, row_N, confidence_N = case
    expected = []
    for values, quota in zip(rows, quotas, strict=False):
        certain = [value > threshold for value in values]
        expected += certain if sum(certain) >= quota else [rank < quota for rank in slow_ranks(values)]
    rank_N = rank_in_row(row_N, confidence_N)
    taken = by_certainty(row_N, confidence_N, rank_N, np.array(quotas)[row_N], threshold)
    assert taken.tolist() == expected


@pytest.mark.parametrize("rule", ["threshold", "factor", "certainty"])
def test_no_candidates_are_no_choice(rule):
    nothing, numbers = np.zeros(0, np.float32), np.zeros(0, np.int64)
    assert rank_in_row(numbers, nothing).tolist() == []
    taken = {
        "threshold": lambda: by_threshold(nothing, numbers, 0.5),
        "factor": lambda: by_factor(numbers, nothing, numbers, 1.0),
        "certainty": lambda: by_certainty(numbers, nothing, numbers, numbers, 0.5),
    }[rule]()
    assert taken.tolist() == []
