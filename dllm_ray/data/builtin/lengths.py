"""`builtin:lengths`: answers of 1 to 12 letters, whose number has to be found out, and drafts of them with mistakes.

Two tasks: put letters in order; name those between two others. A letter is one token and occurs once, so a sampler with
a fixed canvas has to end its text early, and one that edits has to insert as many as are wanted, each in its place.
"""

import random
import string
import zlib
from collections.abc import Iterator

TASKS = ("sort", "between")

_LETTERS = string.ascii_lowercase
_LONGEST = 12
_MISTAKES = 0.3
_HELD_OUT = 5  # one question in this many belongs to the test split


def rows(split: str, start: int, stop: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows `start` to `stop` of an endless data set: `prompt`, `response`, `task`, and `draft`, the response with 30 %
    of its letters replaced, dropped or doubled. No question is in both splits.

    Args:
        split: `train` or `test`.
        start, stop: row numbers; a row depends on its number and the seed only.
        seed: another seed gives other rows of the same splits.
    """
    for index in range(start, stop):
        draw = random.Random(f"lengths/{seed}/{split}/{index}")
        task = TASKS[index % len(TASKS)]
        while True:
            question = " ".join((task, *_given(task, draw)))
            held_out = zlib.crc32(question.encode()) % _HELD_OUT == 0
            if held_out == (split == "test"):
                break
        answer = _answer(question)
        yield {
            "prompt": question,
            "response": " ".join(answer),
            "task": task,
            "draft": " ".join(letter for right in answer for letter in _mistaken(right, draw)),
        }


def is_correct(prompt: str, answer: str) -> bool:
    """Whether `answer` is right for a prompt of this task; blanks beyond one between letters don't count."""
    words = prompt.split()
    if not words or words[0] not in TASKS or not set(words[1:]) <= set(_LETTERS):
        return False
    return answer.split() == _answer(prompt)


def _given(task: str, draw: random.Random) -> list[str]:
    if task == "sort":
        return draw.sample(_LETTERS, draw.randint(1, _LONGEST))
    count = draw.randint(1, _LONGEST)
    first = draw.randrange(len(_LETTERS) - count - 1)
    return [_LETTERS[first], _LETTERS[first + count + 1]]


def _answer(question: str) -> list[str]:
    task, *letters = question.split()
    if task == "sort":
        return sorted(letters)
    first, last = (_LETTERS.index(letter) for letter in (letters[0], letters[-1]))
    return list(_LETTERS[first + 1 : last])


def _mistaken(letter: str, draw: random.Random) -> list[str]:
    if draw.random() >= _MISTAKES:
        return [letter]
    return draw.choice(([draw.choice(_LETTERS)], [], [letter, letter]))
