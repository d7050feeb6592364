"""Several samples in one row: the loss of the same samples in rows of their own."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.objectives import BD3LM, MDLM, Part
from dllm_ray.objectives.samples import needs_bos

WIDTH = 12
KINDS = {
    "mdlm": (MDLM, {}),
    "mdlm cart": (MDLM, {"weight": "cart"}),
    "bd3lm": (BD3LM, {"block_size": 3}),
    "bd3lm block times": (BD3LM, {"block_size": 4, "block_times": True}),
}


@st.composite
def packed_rows(draw) -> list[list[tuple[list[int], list[int]]]]:
    """Rows of samples: (tokens, labels)."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row, room = [], WIDTH
        while room and len(row) < 3:
            size = draw(st.integers(1, room))
            tokens = draw(st.lists(st.integers(10, 250), min_size=size, max_size=size))
            labelled = draw(st.lists(st.booleans(), min_size=size, max_size=size))
            row.append((tokens, [token if keep else -100 for token, keep in zip(tokens, labelled, strict=True)]))
            room -= size
        rows.append(row)
    return rows


def pack(rows) -> dict[str, torch.Tensor]:
    shape = len(rows), WIDTH
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "segment_ids", "position_ids")}
    batch["labels"] = torch.full(shape, -100)
    for b, row in enumerate(rows):
        start = 0
        for number, (tokens, labels) in enumerate(row, start=1):
            part = slice(start, start := start + len(tokens))
            batch["input_ids"][b, part], batch["labels"][b, part] = torch.tensor(tokens), torch.tensor(labels)
            batch["segment_ids"][b, part], batch["position_ids"][b, part] = number, torch.arange(len(tokens))
    return batch


def unpack(noisy, sample: int, row: int):
    """One sample of a corrupted batch, in a row of its own."""
    keep = noisy.segment_ids[row] == sample
    grid = {
        name: getattr(noisy, name)[row, keep].unsqueeze(0) for name in ("input_ids", "targets", "maskable", "masked")
    }
    t = noisy.t[row, keep].unsqueeze(0)
    width = int(keep.sum())
    return dataclasses.replace(noisy, **grid, t=t, segment_ids=None, position_ids=None, width=width)


@pytest.mark.parametrize("norm", ["token", "sequence", "batch", "masked"])
@pytest.mark.parametrize("kind", KINDS)
@given(rows=packed_rows(), shift=st.booleans(), architecture=st.sampled_from(["bert", "llama", "modernbert"]))
@settings(max_examples=6)
def test_packing_changes_no_loss(make_lm, kind, norm, rows, shift, architecture):
    make, change = KINDS[kind]
    lm = make_lm(architecture, extra={"local_attention": 8} if architecture == "modernbert" else {})
    objective = make(lm.spec, norm=norm, shift_logits=shift, **change)
    noisy = objective.corrupt(pack(rows), torch.Generator().manual_seed(0))
    alone = [
        unpack(noisy, sample, row)
        for row in range(len(rows))
        for sample in range(1, int(noisy.segment_ids[row].max()) + 1)
    ]
    with torch.no_grad():
        packed = objective.loss(lm, noisy)
        denominator = sum(objective.denominator(sample) for sample in alone)
        results = [objective.loss(lm, sample, denominator) for sample in alone]
    assert objective.denominator(noisy) == denominator
    for field in ("loss", "nll_sum", "tokens"):
        expected = torch.stack([getattr(result, field) for result in results]).sum()
        torch.testing.assert_close(getattr(packed, field), expected, rtol=1e-5, atol=1e-5)


@given(rows=packed_rows())
@settings(max_examples=30)
def test_a_bos_goes_in_front_of_each_sample_and_nothing_else_moves(make_lm, rows):
    spec, batch = make_lm("llama").spec, pack(rows)
    noisy = MDLM(spec, shift_logits=True).corrupt(batch, torch.Generator().manual_seed(0))
    wanted = needs_bos(batch)
    assert wanted is any(labels[0] != -100 for row in rows for _, labels in row)
    bos = spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id
    for b, row in enumerate(rows):
        start = 0
        for number, (tokens, labels) in enumerate(row, start=1):
            expected = [bos] * wanted + tokens
            part = slice(start, start := start + len(expected))
            assert noisy.targets[b, part].tolist() == expected
            assert noisy.maskable[b, part].tolist() == [False] * wanted + [label != -100 for label in labels]
            assert noisy.segment_ids[b, part].tolist() == [number] * len(expected)
            assert noisy.position_ids[b, part].tolist() == list(range(len(expected)))
        assert not noisy.segment_ids[b, start:].any()
        assert not noisy.maskable[b, start:].any()


@given(rows=packed_rows(), shift=st.booleans())
@settings(max_examples=20)
def test_each_sample_has_its_own_time_and_the_same_on_any_number_of_workers(make_lm, rows, shift):
    objective, batch = MDLM(make_lm("llama").spec, shift_logits=shift), pack(rows)
    whole = objective.corrupt(batch, torch.Generator().manual_seed(1))
    for b, row in enumerate(rows):
        times = [set(whole.t[b][whole.segment_ids[b] == number].tolist()) for number in range(1, len(row) + 1)]
        assert [len(found) for found in times] == [1] * len(row)
        assert len(set.union(*times)) == len(row)
        own = {name: tensor[b : b + 1] for name, tensor in batch.items()}
        part = objective.corrupt(own, torch.Generator().manual_seed(1), part=Part(b, len(rows), needs_bos(batch)))
        width = part.masked.shape[1]
        assert torch.equal(part.masked[0], whole.masked[b, :width])
        assert not whole.masked[b, width:].any()
