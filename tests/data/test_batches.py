"""Global batches are padded, then dealt: every worker gets as many rows, and no row is lost or counted twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_ray.data.batches import PaddingRule, deal, pad
from dllm_ray.data.tokenize import TokenRows

EOS, FILLER = 1, 0
ROWS = TokenRows.of([([5, 6, 7], [-100, 6, 7]), ([8], [8])])

RULES = st.builds(PaddingRule, st.integers(0, 3), st.booleans())
BATCHES = st.builds(
    lambda lengths, rule: pad(TokenRows.of([([9] * length, [9] * length) for length in lengths]), rule),
    st.lists(st.integers(1, 4), min_size=1, max_size=7),
    RULES,
)


def test_supervised_padding_is_attended_and_carries_loss():
    batch = pad(ROWS, PaddingRule(EOS, supervised=True))
    assert batch.keys() == {"input_ids", "labels"}
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, EOS, EOS]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, EOS, EOS]]


def test_ignored_padding_is_neither_seen_nor_trained():
    batch = pad(ROWS, PaddingRule(FILLER, supervised=False))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, FILLER, FILLER]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("supervised", [True, False])
def test_everything_in_a_batch_is_int64(supervised):
    assert {array.dtype for array in pad(ROWS, PaddingRule(EOS, supervised)).values()} == {np.dtype(np.int64)}


@given(BATCHES, st.integers(1, 5))
def test_the_parts_are_equal_and_together_the_batch_with_filler_without_labels(batch, workers):
    parts = deal(batch, workers)
    rows = len(batch["input_ids"])
    assert len(parts) == workers
    assert {len(array) for part in parts for array in part.values()} == {-(-rows // workers)}
    for name, array in batch.items():
        together = np.concatenate([part[name] for part in parts])
        assert (together[:rows] == array).all()
        if name == "labels":
            assert (together[rows:] == -100).all()


@given(BATCHES, st.integers(1, 5))
def test_filler_is_as_long_and_as_attended_as_a_real_row(batch, workers):
    parts = deal(batch, workers)
    for name in batch.keys() - {"labels"}:
        filler = np.concatenate([part[name] for part in parts])[len(batch["input_ids"]) :]
        assert (filler == batch[name][0]).all()
