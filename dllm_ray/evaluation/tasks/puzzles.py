"""Scores of the puzzle tasks beside this file: any right solution counts, not only the file's own."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

_EQUATION = re.compile(r"(\d+)\s*([-+*/x])\s*(\d+)\s*=\s*(-?\d+)")
_STAY = re.compile(r"\b([A-Z][\w'-]*(?: [A-Z][\w'-]*)*) for (\d+) days?\b")


def sudoku(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the answer's first rows of digits solve the puzzle."""
    clues = doc["input"].split()
    size = len(clues)
    found = re.findall(rf"(?<!\d)[1-9]{{{size}}}(?!\d)", results[0])[:size]
    return {"solved": float(len(found) == size and is_sudoku(found) and keeps(found, clues))}


def is_sudoku(rows: Sequence[str]) -> bool:
    """Whether every row, column and box holds each digit once."""
    size = len(rows)
    box = isqrt(size)
    digits = [str(digit) for digit in range(1, size + 1)]
    columns = ["".join(column) for column in zip(*rows, strict=True)]
    corners = [(y, x) for y in range(0, size, box) for x in range(0, size, box)]
    boxes = ["".join(row[x : x + box] for row in rows[y : y + box]) for y, x in corners]
    return all(sorted(part) == digits for part in [*rows, *columns, *boxes])


def keeps(rows: Sequence[str], clues: Sequence[str]) -> bool:
    """Whether the clues stand where they stood; 0 is an empty cell."""
    pairs = zip("".join(rows), "".join(clues), strict=True)
    return all(clue in ("0", cell) for cell, clue in pairs)


def countdown(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the equations of the answer's first line that has any use up the numbers and end at the target."""
    *numbers, target = (int(number) for number in doc["input"].split(","))
    lines = [line for line in results[0].splitlines() if _EQUATION.search(line)]
    return {"solved": float(bool(lines) and reaches(_EQUATION.findall(lines[0]), numbers, target))}


def reaches(equations: Sequence[tuple[str, str, str, str]], numbers: Sequence[int], target: int) -> bool:
    """Whether each equation is right and takes two of the numbers at hand for its result, until the target is left."""
    left = Counter(numbers)
    for first, sign, second, result in equations:
        one, two, said = int(first), int(second), int(result)
        left.subtract((one, two))
        if min(left.values()) < 0:
            return False
        values = {"+": one + two, "-": one - two, "/": one / two if two else None}
        if values.get(sign, one * two) != said:
            return False
        left[said] += 1
    return +left == Counter([target])


def trip(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the plan visits the same cities in the same order and for as many days as the file's own."""
    return {"solved": float(bool(stays(results[0])) and stays(results[0]) == stays(doc["output"]))}


def stays(plan: str) -> list[tuple[str, str]]:
    """City and days of each stay, `... Riga for 3 days ...`, in order."""
    return _STAY.findall(plan)
