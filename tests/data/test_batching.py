"""Rows are cut into batches that hold each of them once, whatever the rule, and wherever one begins to look."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data.batching import Batching, Chunk, best_fit
from dllm_ray.errors import ConfigError

MAX_LENGTH = 16

LENGTHS = st.builds(  # up to several chunks
    lambda seed, rows: np.random.default_rng(seed).integers(1, MAX_LENGTH + 1, rows),
    st.integers(0, 9),
    st.integers(0, 900),
)
PACKED = st.builds(Batching, st.integers(1, 3), st.just(MAX_LENGTH), st.just("packed"), block_size=st.integers(1, 5))
BUCKETED = st.builds(
    Batching,
    st.just(1),
    st.just(MAX_LENGTH),
    st.just("bucketed"),
    max_tokens=st.integers(20, 60),
    block_size=st.integers(1, 5),
)
FIXED = st.builds(Batching, st.integers(1, 5), st.just(MAX_LENGTH))
ANY = FIXED | PACKED | BUCKETED


def chunks(lengths: np.ndarray, batching: Batching) -> list[Chunk]:
    """All chunks of a stream."""
    found = []
    start = 0
    while start < len(lengths):
        found.append(batching.chunk(lengths[start:], len(found), ended=True))
        start += found[-1].rows
    return found


def whole(lengths: np.ndarray, batching: Batching) -> np.ndarray:
    return -(-lengths // batching.block_size) * batching.block_size


@given(LENGTHS, ANY)
def test_every_row_is_in_one_batch(lengths, batching):
    start = 0
    for chunk in chunks(lengths, batching):
        assert chunk.rows > 0
        assert sorted(np.concatenate([layout.rows for layout in chunk.batches])) == list(range(chunk.rows))
        start += chunk.rows
    assert start == len(lengths)


@given(LENGTHS, ANY, st.integers(20, 90))
def test_a_chunk_does_not_depend_on_how_many_rows_are_at_hand(lengths, batching, step):
    complete = batching.chunk(lengths, 3, ended=True)
    for count in range(0, len(lengths), step):
        early = batching.chunk(lengths[:count], 3, ended=False)
        if early is not None:
            assert early.rows == complete.rows
            for ours, theirs in zip(early.batches, complete.batches, strict=True):
                assert ours.rows.tolist() == theirs.rows.tolist()
                assert (ours.packs is None) == (theirs.packs is None)
                assert ours.packs is None or ours.packs.tolist() == theirs.packs.tolist()


@given(LENGTHS, ANY)
def test_a_chunk_before_the_last_has_all_its_batches(lengths, batching):
    for chunk in chunks(lengths, batching)[:-1]:
        assert len(chunk.batches) == batching.chunk_batches


@given(LENGTHS, FIXED)
def test_fixed_batches_are_consecutive_rows(lengths, batching):
    found = [layout.rows for chunk in chunks(lengths, batching) for layout in chunk.batches]
    assert all(rows.tolist() == list(range(len(rows))) for rows in found)
    assert all(len(rows) == batching.batch_size for rows in found[:-1])


@given(LENGTHS, PACKED)
def test_packs_hold_what_fits_and_a_batch_has_its_packs(lengths, batching):
    start = 0
    found = chunks(lengths, batching)
    for chunk in found:
        own = whole(lengths[start : start + chunk.rows], batching)
        for layout in chunk.batches:
            room = np.bincount(layout.packs, weights=own[layout.rows])
            assert 0 < room.min() <= room.max() <= batching.width
            assert (np.diff(layout.packs) >= 0).all()
            assert len(room) == batching.batch_size or layout is found[-1].batches[-1]
        start += chunk.rows


@given(LENGTHS, BUCKETED)
def test_buckets_keep_to_the_budget_and_hold_rows_of_like_length(lengths, batching):
    start = 0
    for chunk in chunks(lengths, batching):
        own = whole(lengths[start : start + chunk.rows], batching)
        spans = sorted((own[layout.rows].max(), own[layout.rows].min()) for layout in chunk.batches)
        assert all(shorter[0] <= longer[1] for shorter, longer in pairwise(spans))
        assert all(len(layout.rows) * own[layout.rows].max() <= batching.max_tokens for layout in chunk.batches)
        start += chunk.rows


def test_batches_of_a_chunk_come_in_an_order_that_follows_from_seed_and_number():
    lengths = np.arange(1000) % MAX_LENGTH + 1

    def longest(seed: int, number: int) -> list[int]:
        chunk = Batching(1, MAX_LENGTH, "bucketed", max_tokens=64, seed=seed).chunk(lengths, number, ended=True)
        return [int(lengths[layout.rows].max()) for layout in chunk.batches]

    first = longest(0, 0)
    assert first == longest(0, 0)
    assert first != longest(1, 0) and first != longest(0, 1)
    assert first not in (sorted(first), sorted(first, reverse=True))


def test_a_budget_below_one_row_is_refused():
    with pytest.raises(ConfigError, match=r"one row of 20 tokens \(train.max_length\), got 19") as caught:
        Batching(1, 18, "bucketed", max_tokens=19, block_size=4)
    assert caught.value.field == "max_tokens_per_batch"


@given(st.lists(st.integers(1, 10), min_size=1, max_size=40).map(np.array))
def test_best_fit_opens_a_pack_only_where_no_other_has_room(lengths):
    packs = best_fit(lengths, 10)
    room = 10 - np.bincount(packs, weights=lengths)
    assert room.min() >= 0
    # no pack would fit into the rest of another, and so at most one is half empty
    assert (room > 5).sum() <= 1


@pytest.mark.parametrize(("rule", "share"), [("packed", 0.95), ("bucketed", 0.95)])
def test_little_is_filled_up_in_batches_of_real_questions(real_data, rule, share):
    lines = (real_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    lengths = np.array([len(json.loads(line)["question"] + json.loads(line)["answer"]) // 4 for line in lines])
    batching = Batching(8, 512, rule, max_tokens=8 * 512)
    start = padded = 0
    for chunk in chunks(lengths, batching):
        for layout in chunk.batches:
            longest = lengths[start + layout.rows].max()
            padded += len(layout.rows) * longest if rule == "bucketed" else batching.batch_tokens
        start += chunk.rows
    assert lengths.sum() / padded > share
