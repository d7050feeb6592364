"""Block diffusion: the loss over cut copies is that of two whole ones under a mask written as a double loop."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.objectives import BD3LM, NoisyBatch, Part
from dllm_ray.objectives.schedules import alpha_schedule, elbo_weight

ROWS, WIDTH = 3, 14


@st.composite
def batches(draw) -> dict[str, torch.Tensor]:
    """Rows of samples, some with padding behind them; unpacked, packed, or with an attention mask."""
    seed, kind = draw(st.integers(0, 2**31)), draw(st.sampled_from(["plain", "masked", "packed"]))
    source = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(10, 250, (ROWS, WIDTH), generator=source)
    labels = torch.where(torch.rand(ROWS, WIDTH, generator=source) < draw(st.floats(0, 1)), input_ids, -100)
    batch = {"input_ids": input_ids, "labels": labels}
    if kind == "masked":
        lengths = torch.tensor(draw(st.lists(st.integers(1, WIDTH), min_size=ROWS, max_size=ROWS)))
        batch["attention_mask"] = (torch.arange(WIDTH) < lengths.unsqueeze(1)).long()
        labels[batch["attention_mask"] == 0] = -100
    if kind == "packed":
        batch |= {name: torch.zeros_like(input_ids) for name in ("segment_ids", "position_ids")}
        for row in range(ROWS):
            cuts = sorted(draw(st.sets(st.integers(1, WIDTH), min_size=1, max_size=3)))
            for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts]), start=1):
                batch["segment_ids"][row, start:stop] = number
                batch["position_ids"][row, start:stop] = torch.arange(stop - start)
        labels[batch["segment_ids"] == 0] = -100
    return batch


def slow_nll(lm: DiffusionLM, noisy: NoisyBatch, size: int, shift: bool) -> torch.Tensor:
    """The weighted cross-entropy, summed: both copies whole, a mask out of loops."""
    rows, width = noisy.input_ids.shape
    places = torch.arange(width).expand(rows, width) if noisy.position_ids is None else noisy.position_ids
    samples = noisy.segment_ids
    if samples is None:
        samples = torch.ones_like(places) if noisy.attention_mask is None else noisy.attention_mask
    mask = torch.zeros(rows, 1, 2 * width, 2 * width, dtype=torch.bool)
    for row, q, k in itertools.product(range(rows), range(2 * width), range(2 * width)):
        i, j = q % width, k % width
        block_i, block_j = (int(places[row, at]) // size for at in (i, j))
        noisy_i, noisy_j = q < width, k < width
        same_sample = samples[row, i] == samples[row, j] > 0
        if noisy_j:
            sees = noisy_i and block_i == block_j
        else:
            sees = block_j < block_i if noisy_i else block_j <= block_i
        mask[row, 0, q, k] = (sees and same_sample) or q == k
    both = torch.cat([noisy.input_ids, noisy.targets], dim=1)
    log_p = lm.logits(both, mask, torch.cat([places, places], dim=1), shift=False).log_softmax(-1)
    total = torch.zeros(())
    for row, column in noisy.masked.nonzero().tolist():
        t = noisy.t[row] if noisy.t.dim() == 1 else noisy.t[row, column]
        source = column - 1 if shift and places[row, column] > 0 else column
        weight = elbo_weight(alpha_schedule("linear"), t)
        total = total - weight * log_p[row, source, noisy.targets[row, column]]
    return total


@pytest.mark.parametrize("architecture", ["bert", "llama", "modernbert"])
@given(
    batch=batches(),
    size=st.integers(1, 8),
    shift=st.booleans(),
    block_times=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
def test_cutting_the_copies_changes_nothing(make_lm, architecture, batch, size, shift, block_times, seed):
    extra = {"local_attention": 8, "layer_types": ["sliding_attention", "full_attention"]}
    lm = make_lm(architecture, extra=extra if architecture == "modernbert" else {})
    objective = BD3LM(lm.spec, block_size=size, shift_logits=shift, block_times=block_times)
    noisy = objective.corrupt(batch, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found, expected = objective.loss(lm, noisy).nll_sum, slow_nll(lm, noisy, size, shift)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def texts(rows: int = ROWS, width: int = 16, prompt: int = 0) -> dict[str, torch.Tensor]:
    input_ids = torch.randint(10, 250, (rows, width), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": input_ids, "labels": labels}


def widths(lm: DiffusionLM, objective: BD3LM, noisy: NoisyBatch) -> list[int]:
    seen = []
    handle = lm.module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].shape[1]))
    objective.loss(lm, noisy)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("masked", "expected"),
    [
        ([[]], 1),  # nothing to ask: one position, so that every worker runs the model
        ([[0]], 4),  # the first block sees no other
        ([[9, 10]], 4 + 8),  # the third block, and two clean ones before it
        ([[0, 15]], 8 + 12),
        ([[5], [15]], 4 + 12),  # as wide as the fullest row
    ],
)
def test_only_what_the_loss_depends_on_is_computed(make_lm, masked, expected):
    lm, objective = make_lm("bert"), BD3LM(make_lm("bert").spec, block_size=4)
    chosen = torch.zeros(len(masked), 16, dtype=torch.bool)
    for row, columns in enumerate(masked):
        chosen[row, columns] = True
    noisy = objective.corrupt(texts(len(masked)), t=torch.full((len(masked),), 0.5), masked=chosen)
    assert widths(lm, objective, noisy) == [expected]


def test_with_shifted_logits_a_block_s_first_token_is_read_from_the_noisy_block_before(make_lm):
    lm = make_lm("llama")
    objective = BD3LM(lm.spec, block_size=4, shift_logits=True)
    for column, expected in ((8, 4 + 4), (9, 4 + 8)):
        chosen = torch.zeros(1, 16, dtype=torch.bool)
        chosen[0, column] = True
        noisy = objective.corrupt(texts(1, prompt=2), t=torch.tensor([0.5]), masked=chosen)
        assert widths(lm, objective, noisy) == [expected]


def test_a_block_s_loss_depends_on_clean_blocks_before_it_and_on_nothing_after(make_lm):
    lm = make_lm("llama")
    objective = BD3LM(lm.spec, block_size=4, weight="uniform")
    chosen = torch.zeros(1, 16, dtype=torch.bool)
    chosen[0, [5, 6]] = True

    def loss(changed: int | None) -> float:
        batch = texts(1)
        if changed is not None:
            batch = {name: tensor.clone() for name, tensor in batch.items()}
            batch["input_ids"][0, changed] = batch["labels"][0, changed] = 251
        noisy = objective.corrupt(batch, t=torch.tensor([0.5]), masked=chosen)
        return objective.loss(lm, noisy).loss.item()

    before = loss(None)
    assert all(loss(column) != before for column in (0, 3, 4, 7))
    assert all(loss(column) == before for column in range(8, 16))


def test_one_block_as_wide_as_the_row_is_mdlm(make_lm):
    from dllm_ray.objectives import MDLM

    lm, batch = make_lm("bert"), texts()
    noisy = MDLM(lm.spec).corrupt(batch, torch.Generator().manual_seed(0))
    assert BD3LM(lm.spec, block_size=16).loss(lm, noisy).loss.item() == pytest.approx(
        MDLM(lm.spec).loss(lm, noisy).loss.item(), rel=1e-5
    )


# --- times


def test_blocks_may_have_times_of_their_own(make_lm):
    objective = BD3LM(make_lm("bert").spec, block_size=4, block_times=True)
    t = objective.corrupt(texts(2), torch.Generator().manual_seed(0)).t
    assert t.shape == (2, 16)
    blocks = t.view(2, 4, 4)
    assert (blocks == blocks[:, :, :1]).all()
    assert all(len(set(row.tolist())) == 4 for row in blocks[:, :, 0])


def test_block_times_are_uniform_and_well_spread(make_lm):
    objective = BD3LM(make_lm("bert").spec, block_size=4, block_times=True, time_epsilon=0)
    t = objective.corrupt(texts(200, 64), torch.Generator().manual_seed(0)).t[:, ::4]  # [200, 16]
    assert t.mean(dim=0).sub(0.5).abs().max() < 0.01  # each block over the rows
    within_row = t.sort(dim=1).values.diff(dim=1)
    assert within_row.max() < 3 / 16  # each row over its blocks
    assert ((t >= 0) & (t <= 1)).all()


@pytest.mark.parametrize("block_times", [False, True])
def test_a_row_gets_the_same_noise_on_any_number_of_workers(make_lm, block_times):
    objective, batch = BD3LM(make_lm("bert").spec, block_size=4, block_times=block_times), texts(4)
    whole = objective.corrupt(batch, torch.Generator().manual_seed(3))
    for start, stop in ((0, 1), (1, 4)):
        rows = {name: tensor[start:stop] for name, tensor in batch.items()}
        part = objective.corrupt(rows, torch.Generator().manual_seed(3), part=Part(start, 4))
        assert torch.equal(part.t, whole.t[start:stop])
        assert torch.equal(part.masked, whole.masked[start:stop])


@pytest.mark.parametrize(("setting", "field"), [({"block_size": 0}, "block_size"), ({"weight": "cart"}, "weight")])
def test_what_makes_no_sense_is_refused(make_lm, setting, field):
    with pytest.raises(ConfigError) as caught:
        BD3LM(make_lm("bert").spec, **setting)
    assert caught.value.field == field
