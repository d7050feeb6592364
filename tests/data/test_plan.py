"""The order of a source's rows is fixed by a seed, complete in every pass, and can be taken up anywhere."""

from itertools import islice, takewhile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data.plan import Plan, priorities

PLANS = st.builds(
    Plan,
    shard_bytes=st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple),
    window_bytes=st.integers(1, 30),
    seed=st.tuples(st.integers(0, 3)),
    first=st.integers(0, 1),
)
BIG = Plan((40, 1, 25, 35), window_bytes=30, seed=(0,))


def passes(plan: Plan, count: int) -> list[list]:
    windows = list(takewhile(lambda window: window.epoch < count, plan.windows()))
    return [[window for window in windows if window.epoch == epoch] for epoch in range(count)]


@given(PLANS)
def test_every_pass_visits_every_shard_once(plan):
    for windows in passes(plan, 3):
        visited = sorted(shard for window in windows for shard in window.shards)
        assert visited == list(range(len(plan.shard_bytes)))
        assert [window.number for window in windows] == list(range(len(windows)))


@given(PLANS)
def test_windows_know_their_part_of_the_pass(plan):
    total = sum(plan.shard_bytes)
    for windows in passes(plan, 2):
        begin = 0
        for window in windows:
            end = begin + sum(plan.shard_bytes[shard] for shard in window.shards)
            assert (window.begin, window.end) == (begin / total, end / total)
            begin = end
        assert windows[-1].end == 1.0


@given(PLANS, st.integers(0, 2), st.integers(0, 3))
def test_windows_that_begin_in_the_middle_are_the_rest_of_all(plan, epoch, number):
    number = min(number, len(passes(plan, 3)[epoch]) - 1)
    rest = [window for window in islice(plan.windows(), 40) if (window.epoch, window.number) >= (epoch, number)]
    assert list(islice(plan.windows(epoch, number), len(rest))) == rest


@given(PLANS)
def test_a_window_takes_shards_only_until_it_is_full(plan):
    for epoch, windows in enumerate(passes(plan, 2)):
        for window in windows:
            sizes = [plan.shard_bytes[shard] for shard in window.shards]
            assert sum(sizes[:-1]) < plan.window_bytes
            if epoch and window is not windows[-1]:
                assert sum(sizes) >= plan.window_bytes


def test_the_very_first_windows_are_smaller_so_that_training_begins_soon():
    first, second = passes(Plan((1,) * 64, window_bytes=16, seed=(0,)), 2)
    assert [len(window.shards) for window in first] == [4, 8, 16, 16, 16, 4]
    assert [len(window.shards) for window in second] == [16] * 4


def test_shards_that_are_at_hand_come_first_in_the_first_pass():
    first, second = passes(Plan((1,) * 50, window_bytes=1, seed=(0,), first=3), 2)
    assert [window.shards for window in first[:3]] == [(0,), (1,), (2,)]
    assert sorted(window.shards for window in first) == sorted(window.shards for window in second)
    assert {window.shards for window in second[:3]} != {(0,), (1,), (2,)}


def test_the_same_seed_gives_the_same_order():
    again = Plan((40, 1, 25, 35), 30, (0,))
    assert passes(BIG, 3) == passes(again, 3)
    window = next(BIG.windows())
    assert BIG.order(window, 50).tolist() == again.order(window, 50).tolist()


def test_orders_of_shards_differ_between_passes_and_seeds():
    first, second = passes(Plan((1,) * 50, 1, (0,)), 2)
    (other,) = passes(Plan((1,) * 50, 1, (1,)), 1)
    orders = [[window.shards for window in windows] for windows in (first, second, other)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != sorted(orders[0])


def test_orders_of_rows_differ_between_windows_passes_and_seeds():
    plan, other = (Plan((50, 50), window_bytes=50, seed=(seed,)) for seed in (0, 1))
    one, two, later = islice(plan.windows(), 3)
    orders = [plan.order(one, 50), plan.order(two, 50), plan.order(later, 50), other.order(one, 50)]
    assert all(sorted(order.tolist()) == list(range(50)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 4


class TestPriorities:
    def test_they_are_reproducible_numbers_below_one(self):
        drawn = priorities(1000, shard=3, seed=(4,))
        assert (drawn == priorities(1000, shard=3, seed=(4,))).all()
        assert (drawn >= 0).all()
        assert (drawn < 1).all()

    @pytest.mark.parametrize("other", [{"shard": 1, "seed": (0,)}, {"shard": 0, "seed": (1,)}])
    def test_shards_and_seeds_differ(self, other):
        assert (priorities(100, shard=0, seed=(0,)) != priorities(100, **other)).all()

    def test_the_smallest_are_a_fair_sample_of_all_shards(self):
        sizes = [4000, 1000, 3000]
        drawn = np.concatenate([priorities(size, shard, seed=(0,)) for shard, size in enumerate(sizes)])
        chosen = np.argsort(drawn)[:800]
        shares = np.histogram(chosen, bins=np.cumsum([0, *sizes]))[0] / 800
        assert shares == pytest.approx([0.5, 0.125, 0.375], abs=0.06)
