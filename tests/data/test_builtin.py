"""The generated task: rows that depend on their number and the seed only, and answers that can be checked."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data.builtin.digits import TASKS, is_correct, rows


def numbers(split: str, count: int, seed: int = 0) -> set[str]:
    return {row["prompt"].split()[1] for row in rows(split, 0, count, seed)}


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_row_depends_on_its_number_and_the_seed_only(split):
    assert list(rows(split, 17, 42, seed=3)) == list(rows(split, 0, 60, seed=3))[17:42]


def test_another_seed_gives_other_rows():
    assert list(rows("train", 0, 20, seed=0)) != list(rows("train", 0, 20, seed=1))


def test_train_and_test_share_no_number_whatever_the_seed():
    assert not numbers("train", 3000, seed=0) & numbers("test", 3000, seed=1)


def test_every_task_comes_equally_often():
    assert Counter(row["task"] for row in rows("train", 0, 500)) == dict.fromkeys(TASKS, 100)


def test_numbers_have_3_to_6_digits_and_are_never_one_digit_repeated():
    drawn = numbers("train", 2000)
    assert {len(number) for number in drawn} == {3, 4, 5, 6}
    assert all(len(set(number)) > 1 for number in drawn)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_stored_answer_is_correct(split):
    assert all(is_correct(row["prompt"], row["response"]) for row in rows(split, 0, 1000))


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [("reverse 1203", "3021"), ("sort 3021", "0123"), ("next 1290", "2301"), ("complement 1290", "8709")],
)
def test_four_tasks_have_exactly_one_right_answer(prompt, answer):
    assert is_correct(prompt, f" {answer}\n")
    number = prompt.split()[1]
    for wrong in ["", answer + "0", answer[:-1], number, answer[1] + answer[0] + answer[2:]]:
        assert not is_correct(prompt, wrong), wrong


@pytest.mark.parametrize("prompt", ["", "hello", "multiply 77", "shuffle"])
def test_no_answer_is_right_to_a_question_of_another_kind(prompt):
    assert not is_correct(prompt, "77")


@given(st.text("0123456789", min_size=2, max_size=6).filter(lambda number: len(set(number)) > 1), st.randoms())
def test_any_other_order_is_a_right_shuffle_and_the_same_order_is_wrong(number, random):
    order = "".join(random.sample(number, len(number)))
    assert is_correct(f"shuffle {number}", order) == (order != number)
    assert not is_correct(f"shuffle {number}", order[1:])
    assert not is_correct(f"shuffle {number}", order + number[0])
