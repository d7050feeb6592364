"""Edit Flow's pure functions against recorded numbers and a plain version."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.objectives import alignment
from dllm_ray.objectives.alignment import BLANK, align, remaining_edits
from dllm_ray.objectives.edits import (
    DELETE,
    INSERT,
    SUBSTITUTE,
    Edits,
    between,
    negative_log_likelihood,
    remaining,
    sequences,
)

KINDS = {SUBSTITUTE: alignment.SUBSTITUTE, DELETE: alignment.DELETE, INSERT: alignment.INSERT}


@pytest.fixture
def recorded(golden) -> dict:
    [found] = json.loads((golden / "editflow_modernbert" / "losses.json").read_text())
    return found


def padded(rows: list[list[int]]) -> torch.Tensor:
    """[B, A], with columns of blanks at the end, which say nothing."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[BLANK] * (width - len(row))] for row in rows])


def listed(edits: Edits, row: int) -> list[list]:
    return [
        [KINDS[kind], position, None if kind == DELETE else token]
        for of, position, kind, token in zip(
            *(getattr(edits, name).tolist() for name in ("row", "position", "kind", "token")), strict=True
        )
        if of == row
    ]


def test_recorded_sequences_and_edits(recorded):
    zt, z1 = padded(recorded["zt"]), padded(recorded["z1"])
    x, valid = sequences(zt, pad_token_id=0)
    assert (x.tolist(), valid.long().tolist()) == (recorded["x_tok"], recorded["x_mask"])
    assert [listed(remaining(zt, z1), row) for row in range(len(zt))] == recorded["edits"]


@st.composite
def batches(draw) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    pairs = [
        align(*([9, *draw(st.lists(st.integers(0, 4), max_size=7))] for _ in range(2)))
        for _ in range(draw(st.integers(1, 4)))
    ]
    z0, z1 = (padded([pair[side].tolist() for pair in pairs]) for side in (0, 1))
    made = torch.from_numpy(np.random.default_rng(draw(st.integers(0, 2**30))).random(z0.shape) < 0.5)
    return z0, z1, made


@given(batches())
@settings(max_examples=200)
def test_batches_are_what_their_rows_are(batch):
    z0, z1, made = batch
    zt = between(z0, z1, made)
    x, valid = sequences(zt, pad_token_id=7)
    edits = remaining(zt, z1)
    for row in range(len(zt)):
        tokens = [token for token in zt[row].tolist() if token != BLANK]
        assert x[row].tolist() == [*tokens, *[7] * (x.shape[1] - len(tokens))]
        assert x[row][valid[row]].tolist() == tokens
        assert listed(edits, row) == [list(edit) for edit in remaining_edits(zt[row].tolist(), z1[row].tolist())]


@given(batches(), st.integers(0, 2**30))
@settings(max_examples=50)
def test_the_likelihood_is_that_of_the_plain_version(batch, seed):
    z0, z1, made = batch
    zt = between(z0, z1, made)
    (x, valid), edits = sequences(zt, pad_token_id=0), remaining(zt, z1)
    source = torch.Generator().manual_seed(seed)
    rates = torch.rand(*x.shape, 3, generator=source) + 0.01
    log_probability = -torch.rand(len(edits.row), generator=source)
    log_probability[edits.kind == DELETE] = 0.0
    found = negative_log_likelihood(rates, valid, edits, log_probability)
    expected = [
        sum(rates[row, place].sum().item() for place in range(x.shape[1]) if valid[row, place]) for row in range(len(x))
    ]
    for number in range(len(edits.row)):
        row, position, kind = (int(getattr(edits, name)[number]) for name in ("row", "position", "kind"))
        expected[row] -= math.log(rates[row, position, kind].item()) + log_probability[number].item()
    assert found.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
