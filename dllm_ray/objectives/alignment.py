"""Which edits turn one sequence into another: the alignment that Edit Flow (arXiv 2506.09018) interpolates along.

An aligned pair has the length of the alignment; `BLANK` stands where a sequence has no token. A column of (blank,
token) is an insertion, (token, blank) a deletion, (token, other token) a substitution.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np

from dllm_ray.errors import DataError

BLANK = -1

DELETE, INSERT, SUBSTITUTE = "DEL", "INS", "SUB"


class Edit(NamedTuple):
    """One edit of a sequence."""

    kind: str
    """`DELETE`, `INSERT` or `SUBSTITUTE`."""
    position: int
    """Of the token that is deleted or replaced, or after which another is inserted."""
    token: int | None
    """The new one; None where one is deleted."""


def align(x0: Sequence[int], x1: Sequence[int], substitution: int = 1, gap: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """A cheapest alignment (Needleman and Wunsch 1970).

    Of equally cheap ones, the one that from the right end on prefers matches and substitutions to deletions, and those
    to insertions: gaps lie as far left as they can, behind the common beginning.

    Args:
        x0: token ids to begin with.
        x1: token ids to end with.
        substitution: cost of replacing a token.
        gap: cost of deleting or inserting one.

    Returns:
        z0, z1: int64 arrays of one length, of x0 and x1 with `BLANK`s between. len(x0) + len(x1) at most.

    Raises:
        DataError: a sequence holds `BLANK` or another negative number, or isn't one of numbers.
    """
    z0, z1 = _align(_ids(x0, "x0"), _ids(x1, "x1"), substitution, gap)
    return z0, z1


def remaining_edits(zt: Sequence[int], z1: Sequence[int]) -> list[Edit]:
    """The edits that turn `zt` without its blanks into `z1` without its blanks, column by column.

    Args:
        zt: aligned with `z1`: between `z0` and `z1` (`align`).
        z1: the aligned target.

    Raises:
        DataError: they are not of one length, or begin with an insertion: there is no token that it could come after.
    """
    zt, z1 = np.asarray(zt, np.int64), np.asarray(z1, np.int64)
    if zt.shape != z1.shape or zt.ndim != 1:
        raise DataError(f"aligned sequences must have one length, got {zt.shape} and {z1.shape}")
    is_token = zt != BLANK
    columns = np.flatnonzero(zt != z1)
    before = (np.cumsum(is_token) - is_token)[columns]  # tokens to the left
    inserts, deletes = ~is_token[columns], z1[columns] == BLANK
    if (inserts & (before == 0)).any():
        raise DataError("an insertion comes before the first token: sequences need a common beginning, e.g. BOS")
    listed = (array.tolist() for array in (inserts, deletes, before - inserts, z1[columns]))
    return [
        Edit(INSERT if inserted else DELETE if deleted else SUBSTITUTE, position, None if deleted else token)
        for inserted, deleted, position, token in zip(*listed, strict=True)
    ]


def _ids(values: Sequence[int], name: str) -> np.ndarray:
    ids = np.asarray(values)
    if ids.size == 0:
        ids = ids.astype(np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or (ids.size and ids.min() < 0):
        raise DataError(f"{name}: expected token ids, whole numbers of at least 0")
    return ids.astype(np.int64)


@numba.njit(cache=True, nogil=True)
def _align(x0, x1, substitution, gap):
    rows, columns = len(x0), len(x1)
    cost = np.empty((rows + 1, columns + 1), np.int32)  # of aligning the first tokens
    for column in range(columns + 1):
        cost[0, column] = column * gap
    for row in range(1, rows + 1):
        cost[row, 0] = row * gap
        for column in range(1, columns + 1):
            diagonal = cost[row - 1, column - 1]
            if x0[row - 1] != x1[column - 1]:
                diagonal += substitution
            cost[row, column] = min(diagonal, cost[row - 1, column] + gap, cost[row, column - 1] + gap)
    z0, z1 = np.empty(rows + columns, np.int64), np.empty(rows + columns, np.int64)
    row, column, place = rows, columns, rows + columns
    while row > 0 or column > 0:
        place -= 1
        here = cost[row, column]
        if row > 0 and column > 0:
            diagonal = cost[row - 1, column - 1]
            if x0[row - 1] != x1[column - 1]:
                diagonal += substitution
            if here == diagonal:
                row, column = row - 1, column - 1
                z0[place], z1[place] = x0[row], x1[column]
                continue
        if row > 0 and here == cost[row - 1, column] + gap:
            row -= 1
            z0[place], z1[place] = x0[row], BLANK
        else:
            column -= 1
            z0[place], z1[place] = BLANK, x1[column]
    return z0[place:].copy(), z1[place:].copy()
