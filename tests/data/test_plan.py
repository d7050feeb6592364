"""The order of training: every row once in every pass, reproducible, and the same stream wherever one begins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data.plan import Plan, priorities

PLANS = st.builds(
    Plan,
    st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any).map(tuple),
    st.integers(1, 12),
    st.integers(0, 2**32),
)
STARTS = st.integers(0, 60)
BIG = Plan((40, 0, 25, 35), window_rows=30, seed=0)


def stream(plan: Plan, start: int, stop: int) -> list[tuple[int, int]]:
    """Rows `start` to `stop` of the endless stream, as (shard, row in it)."""
    found = []
    for window in plan.windows(start, stop):
        laid_out = [(shard, row) for shard in window.shards for row in range(plan.shard_rows[shard])]
        order = plan.order(window)
        assert len(order) == plan.size(window) > 0
        found += [laid_out[place] for place in order]
    return found[: stop - start]


@given(PLANS)
def test_every_pass_holds_every_row_once(plan):
    everything = sorted((shard, row) for shard, rows in enumerate(plan.shard_rows) for row in range(rows))
    rows = stream(plan, 0, 3 * plan.rows)
    for epoch in range(3):
        assert sorted(rows[epoch * plan.rows : (epoch + 1) * plan.rows]) == everything


@given(PLANS, STARTS, st.integers(0, 60))
def test_a_stream_that_begins_in_the_middle_is_the_rest_of_the_stream(plan, start, length):
    assert stream(plan, start, start + length) == stream(plan, 0, start + length)[start:]


@given(PLANS, STARTS, st.integers(1, 60))
def test_no_window_is_read_in_vain(plan, start, length):
    sizes = [plan.size(window) for window in plan.windows(start, start + length)]
    assert sum(sizes[:-1]) < length <= sum(sizes)


@given(PLANS)
def test_a_window_takes_shards_only_until_it_is_full(plan):
    for window in plan.windows(0, plan.rows):
        assert sum(plan.shard_rows[shard] for shard in window.shards[:-1]) < plan.window_rows


def test_an_empty_range_has_no_windows():
    assert list(BIG.windows(7, 7)) == []


def test_the_same_seed_gives_the_same_order():
    assert stream(BIG, 0, 250) == stream(Plan((40, 0, 25, 35), 30, 0), 0, 250)


@pytest.mark.parametrize(
    "shard_rows", [BIG.shard_rows, (100,), (1,) * 100], ids=["several shards", "rows of one shard", "order of shards"]
)
def test_seeds_and_passes_differ(shard_rows):
    plan, other = Plan(shard_rows, 1, seed=0), Plan(shard_rows, 1, seed=1)
    first, second = stream(plan, 0, 100), stream(plan, 100, 200)
    assert first != second
    assert first != stream(other, 0, 100)
    assert first != sorted(first)


def test_windows_of_one_pass_are_shuffled_differently():
    plan = Plan((50, 50), window_rows=50, seed=0)
    one, two = plan.windows(0, 100)
    assert plan.order(one).tolist() != plan.order(two).tolist()


class TestPriorities:
    def test_they_are_reproducible_numbers_below_one(self):
        drawn = priorities(1000, shard=3, seed=4)
        assert (drawn == priorities(1000, shard=3, seed=4)).all()
        assert (drawn >= 0).all()
        assert (drawn < 1).all()

    @pytest.mark.parametrize("other", [{"shard": 1, "seed": 0}, {"shard": 0, "seed": 1}])
    def test_shards_and_seeds_differ(self, other):
        assert (priorities(100, shard=0, seed=0) != priorities(100, **other)).all()

    def test_the_smallest_are_a_fair_sample_of_all_shards(self):
        sizes = [4000, 1000, 3000]
        drawn = np.concatenate([priorities(size, shard, seed=0) for shard, size in enumerate(sizes)])
        chosen = np.argsort(drawn)[:800]
        shares = np.histogram(chosen, bins=np.cumsum([0, *sizes]))[0] / 800
        assert shares == pytest.approx([0.5, 0.125, 0.375], abs=0.06)
