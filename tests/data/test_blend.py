"""Sources are blended by their weights, or evenly, to within a row; the blend can be taken up anywhere."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.data.blend import Blend, Place, Share, advance, epoch_time
from dllm_ray.data.plan import Plan, Window
from dllm_ray.errors import DataError


@dataclass(frozen=True)
class Loaded:
    lengths: np.ndarray
    names: list


@dataclass(frozen=True)
class Mix:
    """Sources whose shards hold rows of known lengths."""

    lengths: tuple[tuple[tuple[int, ...], ...], ...]
    shares: tuple[Share, ...]
    window_bytes: int = 2

    @property
    def plans(self) -> list[Plan]:
        return [
            Plan(tuple(1 + len(shard) for shard in shards), self.window_bytes, (number,))
            for number, shards in enumerate(self.lengths)
        ]

    def read(self, source: int, window: Window) -> Loaded:
        rows = [(shard, row) for shard in window.shards for row in range(len(self.lengths[source][shard]))]
        lengths = [self.lengths[source][shard][row] for shard, row in rows]
        return Loaded(np.array(lengths, dtype=np.int32), rows)

    def blend(self, places: list[Place] | None = None) -> Blend:
        return Blend(
            self.plans, self.shares, places or [Place()] * len(self.shares), self.read, "abc"[: len(self.shares)]
        )


def names(drawn) -> list[tuple]:
    return [(int(row["source"]), int(row["epoch"]), *drawn.loads[row["load"]].names[row["pick"]]) for row in drawn.rows]


def draw(blend: Blend, count: int, step: int = 1000):
    drawn = blend.draw(min(count, step))
    while len(drawn) < count:
        drawn = drawn.join(blend.draw(min(count - len(drawn), step)))
    return drawn


SHARDS = st.lists(st.lists(st.integers(1, 9), max_size=4).map(tuple), min_size=1, max_size=4).map(tuple)
LENGTHS = SHARDS.filter(lambda shards: any(shards))


@st.composite
def mixes(draw):
    lengths = tuple(draw(st.lists(LENGTHS, min_size=1, max_size=3)))
    weighted, by = draw(st.booleans()), draw(st.sampled_from(["rows", "tokens"]))
    shares = tuple(
        Share(draw(st.sampled_from([0.2, 0.5, 1.0, 3.0])) if weighted else None, by, draw(st.sampled_from([1.0, 2.0])))
        for _ in lengths
    )
    return Mix(lengths, shares, draw(st.integers(1, 12)))


@settings(max_examples=60)
@given(mixes(), st.integers(1, 7))
def test_every_pass_of_a_source_gives_every_row_once(mix, step):
    drawn = names(draw(mix.blend(), 80, step))
    for source, shards in enumerate(mix.lengths):
        everything = sorted((shard, row) for shard, lengths in enumerate(shards) for row in range(len(lengths)))
        own = [name[2:] for name in drawn if name[0] == source]
        for start in range(0, len(own) - len(everything) + 1, len(everything)):
            assert sorted(own[start : start + len(everything)]) == everything


@settings(max_examples=60)
@given(mixes(), st.integers(0, 60), st.integers(1, 5))
def test_a_blend_taken_up_anywhere_is_the_rest_of_the_blend(mix, stop, step):
    whole = draw(mix.blend(), 90)
    places = advance([Place()] * len(mix.shares), whole[:stop].rows)
    assert [place.rows for place in places] == np.bincount(whole[:stop].rows["source"], minlength=len(places)).tolist()
    rest = draw(mix.blend(places), 90 - stop, step)
    assert names(rest) == names(whole[stop:])
    for field in ("time", "progress", "tokens"):
        assert rest.rows[field].tolist() == whole[stop:].rows[field].tolist()


@settings(max_examples=60)
@given(mixes(), st.integers(1, 90))
def test_at_any_point_sources_have_given_their_shares_to_within_a_row(mix, stop):
    rows = draw(mix.blend(), stop).rows
    if mix.shares[0].weight is None:
        assert (np.diff(rows["progress"]) >= 0).all()
        return
    amounts = rows["tokens"] if mix.shares[0].by == "tokens" else np.ones(stop)
    times = [amounts[rows["source"] == number].sum() / share.weight for number, share in enumerate(mix.shares)]
    largest = 9 if mix.shares[0].by == "tokens" else 1
    slack = max(largest / share.weight for share in mix.shares)
    assert max(times) - min(times) <= slack + 1e-9


@settings(max_examples=60)
@given(mixes().filter(lambda mix: mix.shares[0].weight is None))
def test_without_weights_passes_end_together(mix):
    counts = [int(share.repeat) * sum(map(len, shards)) for share, shards in zip(mix.shares, mix.lengths, strict=True)]
    for epoch in range(3):
        drawn = draw(mix.blend(), (epoch + 1) * sum(counts)).rows[epoch * sum(counts) :]
        assert np.bincount(drawn["source"], minlength=len(counts)).tolist() == counts
        assert (drawn["time"] <= epoch + 1).all()


def test_an_epoch_ends_where_the_first_source_has_given_its_passes():
    assert epoch_time([Share(None)], [7], [70]) == 1.0
    shares = [Share(0.5, "tokens", 1.0), Share(0.25, "tokens", 2.0)]
    assert epoch_time(shares, [9, 9], [100, 20]) == 160.0
    assert epoch_time([Share(3.0, "rows")], [9], [100]) == 3.0


def test_windows_that_are_done_with_are_let_go():
    blend = Mix(((((1,) * 4,) * 20),), (Share(None),), window_bytes=1).blend()
    drawn = blend.draw(3)
    for _ in range(30):
        drawn = drawn[-2:].join(blend.draw(3))
    assert len(drawn.loads) <= 3


def test_a_source_without_rows_is_an_error_and_not_an_endless_search():
    with pytest.raises(DataError, match="a: no row to train on"):
        Mix((((), ()), ((1,),)), (Share(None),) * 2).blend().draw(1)
