"""`builtin:lengths`: answers of many lengths, and drafts of them."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data import sources
from dllm_ray.data.builtin.lengths import TASKS, is_correct, rows

SPLITS = st.sampled_from(["train", "test"])


def test_a_row_of_each_task_and_its_answer():
    assert is_correct("copy 0120", "0120") and is_correct("double 12", " 1122\n") and is_correct("odd 1234567", "1357")
    assert not is_correct("copy 0120", "120") and not is_correct("double 12", "1212") and not is_correct("odd 12", "12")
    assert not is_correct("sort 21", "12") and not is_correct("", "")


@given(SPLITS, st.integers(0, 10_000), st.integers(0, 5))
def test_answers_are_right_and_have_1_to_12_digits(split, start, seed):
    for number, row in enumerate(rows(split, start, start + 6, seed), start=start):
        assert row["task"] == TASKS[number % len(TASKS)] == row["prompt"].split()[0]
        assert row["response"].isdigit() and 1 <= len(row["response"]) <= 12
        assert is_correct(row["prompt"], row["response"])


def test_all_lengths_occur():
    assert {len(row["response"]) for row in rows("train", 0, 600)} == set(range(1, 13))


@given(SPLITS, st.integers(0, 10_000), st.integers(1, 20))
def test_a_row_depends_on_its_number_and_the_seed_only(split, start, count):
    together = list(rows(split, start, start + count))
    assert together == [row for number in range(start, start + count) for row in rows(split, number, number + 1)]
    assert list(islice(rows(split, 0, 50, seed=1), 50)) != list(islice(rows(split, 0, 50, seed=2), 50))


def test_no_number_is_in_both_splits():
    train, test = ({row["prompt"].split()[1] for row in rows(split, 0, 3000)} for split in ("train", "test"))
    assert train and test and train.isdisjoint(test)


@given(SPLITS, st.integers(0, 10_000))
def test_a_draft_is_the_answer_with_digits_replaced_dropped_or_doubled(split, start):
    for row in rows(split, start, start + 5):
        # each digit has become itself, another, nothing, or itself twice: a plain walk through all ways
        ends = {0}
        for digit in row["response"]:
            ends = {
                end + len(part)
                for end in ends
                for part in {"", digit + digit, *("0123456789" if end < len(row["draft"]) else "")}
                if row["draft"].startswith(part, end)
            }
        assert len(row["draft"]) in ends


def test_three_digits_in_ten_of_a_draft_are_wrong():
    found = list(rows("train", 0, 3000))
    unchanged = sum(row["draft"] == row["response"] for row in found) / len(found)
    # a mistake leaves a digit as it was in one case of thirty
    expected = sum((1 - 0.3 * 29 / 30) ** len(row["response"]) for row in found) / len(found)
    assert abs(unchanged - expected) < 0.03


def test_it_is_a_source_of_data():
    (shard,) = sources.resolve("builtin:lengths[test:5]")
    assert [row for _, row in shard.read()] == list(rows("test", 0, 5))
