"""Logits of published formats equal those that the reference implementation recorded."""

import numpy as np
import pytest
import torch

from dllm_ray.models.load import load

MODELS = ["modernbert"]


@pytest.fixture(scope="module", params=MODELS)
def recorded(request, golden):
    folder = golden / request.param
    with np.load(folder / "forward.npz") as arrays:
        return load(folder / "checkpoint"), {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def test_logits_of_unpadded_rows(recorded):
    lm, arrays = recorded
    with torch.no_grad():
        logits = lm.logits(arrays["ids"].long())
    torch.testing.assert_close(logits, arrays["logits"], rtol=0, atol=1e-5)


def test_logits_of_padded_rows_where_they_are_valid(recorded):
    lm, arrays = recorded
    mask = arrays["attn_rpad"].long()
    with torch.no_grad():
        logits = lm.logits(arrays["ids_rpad"].long(), mask)
    torch.testing.assert_close(logits[mask.bool()], arrays["logits_rpad"][mask.bool()], rtol=0, atol=1e-5)


def test_logits_of_a_row_by_itself(recorded):
    lm, arrays = recorded
    with torch.no_grad():
        logits = lm.logits(arrays["solo1_ids"].long())
    torch.testing.assert_close(logits, arrays["solo1_logits"], rtol=0, atol=1e-5)


def test_logits_of_left_padded_rows_where_they_are_valid(recorded):
    lm, arrays = recorded
    mask = arrays["attn_lpad"].long()
    with torch.no_grad():
        logits = lm.logits(arrays["ids_lpad"].long(), mask, arrays["pos_lpad"].long())
    torch.testing.assert_close(logits[mask.bool()], arrays["logits_lpad"][mask.bool()], rtol=0, atol=1e-5)
