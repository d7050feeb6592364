"""Alignments and what is left to edit, against recorded ones and a plain version."""

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.errors import DataError
from dllm_ray.objectives.alignment import BLANK, DELETE, INSERT, SUBSTITUTE, Edit, align, remaining_edits

ids = st.lists(st.integers(0, 5), max_size=12)
costs = st.tuples(st.integers(1, 4), st.integers(1, 3))


def plain(x0: list[int], x1: list[int], substitution: int, gap: int) -> tuple[list[int], list[int]]:
    """The recursion as it is written in textbooks."""

    @cache
    def cost(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return (i + j) * gap
        return min(cost(i - 1, j - 1) + differ(i, j), cost(i - 1, j) + gap, cost(i, j - 1) + gap)

    def differ(i: int, j: int) -> int:
        return 0 if x0[i - 1] == x1[j - 1] else substitution

    columns, i, j = [], len(x0), len(x1)
    while i or j:
        if i and j and cost(i, j) == cost(i - 1, j - 1) + differ(i, j):
            i, j = i - 1, j - 1
            columns.append((x0[i], x1[j]))
        elif i and cost(i, j) == cost(i - 1, j) + gap:
            i -= 1
            columns.append((x0[i], BLANK))
        else:
            j -= 1
            columns.append((BLANK, x1[j]))
    columns.reverse()
    return [column[0] for column in columns], [column[1] for column in columns]


def without_blanks(z) -> list[int]:
    return [int(token) for token in z if token != BLANK]


def edited(tokens: list[int], edits: list[Edit]) -> list[int]:
    """A sequence after its edits, all made at once."""
    deleted = {edit.position for edit in edits if edit.kind == DELETE}
    replaced = {edit.position: edit.token for edit in edits if edit.kind == SUBSTITUTE}
    result = []
    for position, token in enumerate(tokens):
        if position not in deleted:
            result.append(replaced.get(position, token))
        result += [edit.token for edit in edits if edit.kind == INSERT and edit.position == position]
    return result


def test_recorded_alignments(golden):
    recorded = json.loads((golden / "editflow" / "alignments.json").read_text())
    assert recorded["BLANK"] == BLANK
    for pair in recorded["pairs"]:
        z0, z1 = align(pair["x0"], pair["x1"])
        assert (z0.tolist(), z1.tolist()) == (pair["z0"], pair["z1"])
        for moment in pair["zt"]:
            assert [list(edit) for edit in remaining_edits(moment["zt"], pair["z1"])] == moment["edits"]
    for pair in recorded["other_costs"]:
        z0, z1 = align(pair["x0"], pair["x1"], pair["sub_cost"], pair["gap_cost"])
        assert (z0.tolist(), z1.tolist()) == (pair["z0"], pair["z1"])


@given(x0=ids, x1=ids, cost=costs)
@settings(max_examples=1000)
def test_alignments_are_those_of_the_plain_version(x0, x1, cost):
    z0, z1 = align(x0, x1, *cost)
    assert (z0.tolist(), z1.tolist()) == plain(x0, x1, *cost)
    assert without_blanks(z0) == x0 and without_blanks(z1) == x1
    assert not ((z0 == BLANK) & (z1 == BLANK)).any()


@given(x0=ids, x1=ids, made=st.integers(0, 2**30))
@settings(max_examples=300)
def test_what_remains_leads_to_the_target_from_every_point_between(x0, x1, made):
    z0, z1 = align([9, *x0], [9, *x1])
    is_made = np.random.default_rng(made).random(len(z0)) < 0.5
    zt = np.where(is_made, z1, z0)
    edits = remaining_edits(zt, z1)
    assert edited(without_blanks(zt), edits) == [9, *x1]
    assert len(edits) == int((zt != z1).sum())


def test_long_sequences():
    source = np.random.default_rng(0)
    x0, x1 = (source.integers(0, 500, 512) for _ in range(2))
    z0, z1 = align(x0, x1)
    assert without_blanks(z0) == x0.tolist() and without_blanks(z1) == x1.tolist()
    assert int((z0 != z1).sum()) <= 512


@pytest.mark.parametrize("ids", [[1, BLANK], [[1]], [0.5], "ab"])
def test_what_is_no_sequence_of_ids_is_refused(ids):
    with pytest.raises(DataError, match="x1: expected token ids"):
        align([1], ids)


def test_an_insertion_before_the_first_token_is_refused():
    with pytest.raises(DataError, match="common beginning"):
        remaining_edits([BLANK, 3], [2, 3])
    with pytest.raises(DataError, match="one length"):
        remaining_edits([1], [1, 2])
