"""`builtin:lengths`: answers of many lengths, and drafts of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data import sources
from dllm_ray.data.builtin.lengths import TASKS, is_correct, rows

SPLITS = st.sampled_from(["train", "test"])


@pytest.mark.parametrize(
    ("prompt", "answer", "right"),
    [
        ("sort c a b", "a b c", True),
        ("sort c a b", " a  b c\n", True),
        ("sort c a b", "abc", False),
        ("sort c a b", "a b", False),
        ("sort c a b", "a b c c", False),
        ("between a e", "b c d", True),
        ("between a e", "b d", False),
        ("reverse a e", "e a", False),
        ("sort 2 1", "1 2", False),
        ("", "", False),
    ],
)
def test_what_is_right(prompt, answer, right):
    assert is_correct(prompt, answer) == right


@given(SPLITS, st.integers(0, 10_000), st.integers(0, 5))
def test_answers_are_right_and_have_1_to_12_letters(split, start, seed):
    for number, row in enumerate(rows(split, start, start + 6, seed), start=start):
        assert row["task"] == TASKS[number % len(TASKS)] == row["prompt"].split()[0]
        letters = row["response"].split()
        assert 1 <= len(letters) <= 12 and letters == sorted(set(letters)) and all(len(one) == 1 for one in letters)
        assert is_correct(row["prompt"], row["response"])


def test_all_lengths_occur():
    assert {len(row["response"].split()) for row in rows("train", 0, 600)} == set(range(1, 13))


@given(SPLITS, st.integers(0, 10_000), st.integers(1, 20))
def test_a_row_depends_on_its_number_and_the_seed_only(split, start, count):
    together = list(rows(split, start, start + count))
    assert together == [row for number in range(start, start + count) for row in rows(split, number, number + 1)]
    assert list(rows(split, 0, 50, seed=1)) != list(rows(split, 0, 50, seed=2))


def test_no_question_is_in_both_splits():
    train, test = ({row["prompt"] for row in rows(split, 0, 3000)} for split in ("train", "test"))
    assert train and test and train.isdisjoint(test)


@given(SPLITS, st.integers(0, 10_000))
def test_a_draft_is_the_answer_with_letters_replaced_dropped_or_doubled(split, start):
    for row in rows(split, start, start + 5):
        draft = row["draft"].split()
        # each letter has become itself, another, nothing, or itself twice: a plain walk through all ways
        ends = {0}
        for letter in row["response"].split():
            ends = {
                end + size
                for end in ends
                for size in (0, 1, 2)
                if end + size <= len(draft) and (size < 2 or draft[end : end + 2] == [letter, letter])
            }
        assert len(draft) in ends


def test_three_letters_in_ten_of_a_draft_are_wrong():
    found = [(row["response"].split(), row["draft"].split()) for row in rows("train", 0, 3000)]
    letters = sum(len(answer) for answer, _ in found)
    kept = sum(len(set(answer) & set(draft)) for answer, draft in found)  # doubled ones too, and some by chance
    assert 0.78 < kept / letters < 0.84
    assert sum(answer != draft for answer, draft in found) / len(found) > 0.7


def test_it_is_a_source_of_data():
    shards = sources.resolve("builtin:lengths[test:25]")
    assert [row for shard in shards for _, row in shard.read()] == list(rows("test", 0, 25))
    assert sources.resolve("builtin:lengths?seed=3[train:2]")[0].where(1) == "builtin:lengths[train], row 1"
