"""`builtin:digits`: a generated instruction task that a small model learns in minutes, with checkable answers.

Four tasks have one right answer, fixed by the prompt: reverse, sort, next (each digit's successor, 0 after 9) and
complement (nine minus each digit). For the fifth, shuffle, any other order of the digits is right: its digits depend on
each other, so writing several of them in one step costs accuracy there and nowhere else.
"""

import random
import zlib
from collections.abc import Iterator

TASKS = ("reverse", "sort", "next", "complement", "shuffle")

_DIGITS = "0123456789"
_SHORTEST, _LONGEST = 3, 6
_HELD_OUT = 5  # one number in this many belongs to the test split


def rows(split: str, start: int, stop: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Rows `start` to `stop` of an endless data set: `prompt`, `response`, `task`. No number is in both splits.

    Args:
        split: `train` or `test`.
        start, stop: row numbers; a row depends on its number and the seed only.
        seed: another seed gives other rows of the same splits.
    """
    for index in range(start, stop):
        draw = random.Random(f"{seed}/{split}/{index}")
        task = TASKS[index % len(TASKS)]
        while True:
            number = "".join(draw.choices(_DIGITS, k=draw.randint(_SHORTEST, _LONGEST)))
            held_out = zlib.crc32(number.encode()) % _HELD_OUT == 0
            if held_out == (split == "test") and len(set(number)) > 1:
                break
        yield {"prompt": f"{task} {number}", "response": _answer(task, number, draw), "task": task}


def is_correct(prompt: str, answer: str) -> bool:
    """Whether `answer` is right for a prompt of this task; surrounding blanks don't count."""
    task, _, number = prompt.partition(" ")
    if task not in TASKS:
        return False
    answer = answer.strip()
    if task == "shuffle":
        return answer != number and sorted(answer) == sorted(number)
    return answer == _answer(task, number, random.Random(0))


def _answer(task: str, number: str, draw: random.Random) -> str:
    if task == "reverse":
        return number[::-1]
    if task == "sort":
        return "".join(sorted(number))
    if task == "next":
        return "".join(_DIGITS[(int(digit) + 1) % 10] for digit in number)
    if task == "complement":
        return "".join(_DIGITS[9 - int(digit)] for digit in number)
    digits = list(number)
    while "".join(digits) == number:
        draw.shuffle(digits)
    return "".join(digits)
