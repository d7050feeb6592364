"""`builtin:lengths`: answers of 1 to 12 digits, whose length has to be found out, and drafts of them with mistakes.

Three tasks: copy a number; double each of its digits; leave its even digits out. Digits are single tokens, so a sampler
with a fixed canvas has to end its text early, and one that edits has to insert as many as are wanted.
"""

import random
import zlib
from collections.abc import Iterator

TASKS = ("copy", "double", "odd")

_DIGITS = "0123456789"
_LONGEST = {"copy": 12, "double": 6, "odd": 12}
_MISTAKES = 0.3
_HELD_OUT = 5  # one number in this many belongs to the test split


def rows(split: str, start: int, stop: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows `start` to `stop` of an endless data set: `prompt`, `response`, `task`, and `draft`, the response with 30 %
    of its digits replaced, dropped or doubled. No number is in both splits.

    Args:
        split: `train` or `test`.
        start, stop: row numbers; a row depends on its number and the seed only.
        seed: another seed gives other rows of the same splits.
    """
    for index in range(start, stop):
        draw = random.Random(f"lengths/{seed}/{split}/{index}")
        task = TASKS[index % len(TASKS)]
        while True:
            number = "".join(draw.choices(_DIGITS, k=draw.randint(1, _LONGEST[task])))
            held_out = zlib.crc32(number.encode()) % _HELD_OUT == 0
            answer = _answer(task, number)
            if held_out == (split == "test") and answer:
                break
        yield {
            "prompt": f"{task} {number}",
            "response": answer,
            "task": task,
            "draft": "".join(_mistaken(digit, draw) for digit in answer),
        }


def is_correct(prompt: str, answer: str) -> bool:
    """Whether `answer` is right for a prompt of this task; surrounding blanks don't count."""
    task, _, number = prompt.partition(" ")
    return task in TASKS and answer.strip() == _answer(task, number)


def _answer(task: str, number: str) -> str:
    if task == "copy":
        return number
    if task == "double":
        return "".join(digit + digit for digit in number)
    return "".join(digit for digit in number if digit in "13579")


def _mistaken(digit: str, draw: random.Random) -> str:
    if draw.random() >= _MISTAKES:
        return digit
    return draw.choice((draw.choice(_DIGITS), "", digit + digit))
