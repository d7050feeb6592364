"""Logits of published formats equal those that the reference implementation recorded."""

from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from dllm_ray.models.attention import block_causal
from dllm_ray.models.load import load

DENSE = ["llada", "dream", "a2d_qwen3", "a2d_qwen2", "modernbert"]
ROUTED = ["llada_moe", "llada2", "llada21"]  # mixtures of experts, whose outputs are added up in another order
BLOCK_CAUSAL = ["llada2", "llada21"]
MODELS = DENSE + ROUTED

FULL = [name for name in MODELS if name not in BLOCK_CAUSAL]
LEFT_PADDED = [name for name in FULL if name != "llada"]  # LLaDA's original takes no position ids
BLOCK_MASKED = ["dream", "a2d_qwen3", "a2d_qwen2", *BLOCK_CAUSAL]

STEP = 2.0**-8
"""Relative spacing of bfloat16, which keeps 8 bits."""


@pytest.fixture(scope="module")
def recorded(golden):
    """`recorded("dream")["logits"]`: what the reference computed."""

    @cache
    def read(model: str) -> dict[str, torch.Tensor]:
        with np.load(golden / model / "forward.npz") as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}

    return read


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def as_trained(lm, *arguments) -> torch.Tensor:
    """Logits as they leave the network, which is how the reference recorded them."""
    return lm.logits(*arguments, shift=False)


def check(model: str, logits: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    if model in DENSE:
        assert (logits - expected).norm() <= 2e-6 * expected.norm()


# --- what the reference computes


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_unpadded_rows(golden_lm, recorded, model):
    """A block of 32 holds all 24 tokens, so block-causal attention sees every one of them too."""
    arrays = recorded(model)
    check(model, as_trained(golden_lm(model), arrays["ids"]), arrays["logits"])


@pytest.mark.parametrize("model", FULL)
def test_logits_of_right_padded_rows_where_they_are_valid(golden_lm, recorded, model):
    arrays = recorded(model)
    mask = arrays["attn_rpad"]
    logits = as_trained(golden_lm(model), arrays["ids_rpad"], mask)
    check(model, logits[mask.bool()], arrays["logits_rpad"][mask.bool()])


@pytest.mark.parametrize("model", LEFT_PADDED)
def test_logits_of_left_padded_rows_where_they_are_valid(golden_lm, recorded, model):
    arrays = recorded(model)
    mask = arrays["attn_lpad"]
    logits = as_trained(golden_lm(model), arrays["ids_lpad"], mask, arrays["pos_lpad"])
    check(model, logits[mask.bool()], arrays["logits_lpad"][mask.bool()])


@pytest.mark.parametrize("model", MODELS)
def test_logits_of_a_row_by_itself(golden_lm, recorded, model):
    arrays = recorded(model)
    check(model, as_trained(golden_lm(model), arrays["solo1_ids"]), arrays["solo1_logits"])


@pytest.mark.parametrize("blocks", ["bd4", "bd8"])
@pytest.mark.parametrize("model", BLOCK_MASKED)
def test_logits_of_noisy_and_clean_text_side_by_side_under_the_training_mask(golden_lm, recorded, model, blocks):
    ids, mask, positions, expected = (recorded(model)[f"{blocks}_{part}"] for part in ("ids", "mask", "pos", "logits"))
    check(model, as_trained(golden_lm(model), ids, mask, positions), expected)


def test_dreams_logits_predict_the_token_at_their_position(golden_lm, recorded):
    arrays = recorded("dream")
    logits = golden_lm("dream").logits(arrays["ids"])
    check("dream", logits[:, 1:], arrays["logits"][:, :-1])
    check("dream", logits[:, 0], arrays["logits"][:, 0])


@pytest.mark.parametrize("model", MODELS)
def test_logits_at_chosen_positions_only(golden_lm, recorded, model):
    ids, chosen = recorded(model)["ids"], torch.tensor([0, 5, 23, 24, 40, 47])
    logits = golden_lm(model).logits(ids, positions=chosen, shift=False)
    check(model, logits, recorded(model)["logits"].flatten(0, 1)[chosen])


# --- block-causal attention


@pytest.mark.parametrize("model", BLOCK_CAUSAL)
def test_padding_on_the_right_leaves_block_causal_rows_unchanged(golden_lm, recorded, model):
    ids, short = recorded(model)["ids"].clone(), recorded(model)["solo1_ids"].shape[1]
    ids[1, :short], ids[1, short:] = recorded(model)["solo1_ids"][0], 0
    mask = torch.ones_like(ids)
    mask[1, short:] = 0
    logits = as_trained(golden_lm(model), ids, mask)
    expected = torch.cat([recorded(model)["logits"][0], recorded(model)["solo1_logits"][0]])
    # tokens that share an expert with padding are summed in another order than those of the row by itself
    torch.testing.assert_close(torch.cat([logits[0], logits[1, :short]]), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("model", BLOCK_CAUSAL)
def test_a_block_sees_itself_and_those_before_it_and_none_after_it(golden_lm, recorded, model):
    ids = recorded(model)["ids"].flatten().unsqueeze(0)  # 48 tokens: a block of 32, and half of one
    lm = golden_lm(model)
    logits = lm.logits(ids)
    torch.testing.assert_close(logits[:, :32], lm.logits(ids[:, :32]), rtol=0, atol=1e-5)
    assert torch.equal(logits, lm.logits(ids, block_causal(torch.arange(48).unsqueeze(0), 32)))
    for changed, seen_from in ((0, 0), (31, 0), (32, 32), (47, 32)):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 512
        moved = (lm.logits(other) - logits).abs().amax(dim=-1)[0] > 1e-4
        assert moved[seen_from:].all(), f"the change at {changed} is not seen everywhere"
        assert not moved[:seen_from].any(), f"the change at {changed} is seen by an earlier block"


@pytest.mark.parametrize("model", BLOCK_CAUSAL)
def test_blocks_are_counted_from_position_0_whatever_the_padding(golden_lm, recorded, model):
    row, short = recorded(model)["ids"].flatten()[:40].unsqueeze(0), 8
    padded = torch.cat([torch.zeros(1, short, dtype=torch.long), row], dim=1)
    mask = torch.cat([torch.zeros(1, short, dtype=torch.long), torch.ones_like(row)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    lm = golden_lm(model)
    torch.testing.assert_close(lm.logits(padded, mask, positions)[:, short:], lm.logits(row), rtol=0, atol=1e-5)


# --- types


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_off_by_its_rounding_only(golden, golden_lm, recorded, model):
    """Every layer rounds to 8 bits some ten times, and the errors of four layers add up like a random walk: a few
    steps of the logits' own scale. A token that goes to another expert because two scores round to a tie is off by
    more; such tokens are few, so the middle of the errors is held to the same bound, and only their tail isn't.
    """
    ids, exact = recorded(model)["ids"], recorded(model)["logits"]
    half = load(golden / model / "checkpoint", dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    error = (as_trained(half, ids).float() - exact).abs() / exact.std()
    assert error.max() > 0
    assert error.median() < 8 * STEP
    if model in DENSE:
        assert error.quantile(0.99) < 16 * STEP
        assert error.max() < 32 * STEP
    else:
        assert error.quantile(0.9) < 32 * STEP


@pytest.mark.parametrize("model", BLOCK_CAUSAL)
def test_the_bias_that_chooses_experts_is_not_rounded(golden, golden_lm, model):
    """It is small beside the scores it is added to, and decides between near ties."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    half = load(golden / model / "checkpoint", dtype="bfloat16").model.state_dict()
    assert torch.equal(half[name], golden_lm(model).model.state_dict()[name])


@pytest.mark.parametrize("model", MODELS)
def test_auto_keeps_the_checkpoints_type(golden, model):
    assert load(golden / model / "checkpoint", dtype="auto").model.dtype == torch.float32


# --- saved again


@pytest.fixture(scope="module")
def saved(golden_lm, tmp_path_factory):
    """The native directory of a published checkpoint: `saved("dream")`."""

    @cache
    def save(model: str):
        folder = tmp_path_factory.mktemp("native") / model
        golden_lm(model).save(folder)
        return folder

    return save


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_checkpoint_loads_with_the_same_logits_to_the_bit(golden_lm, saved, recorded, model):
    lm, again, ids = golden_lm(model), load(saved(model)), recorded(model)["ids"]
    assert torch.equal(again.logits(ids), lm.logits(ids))
    assert again.spec == lm.spec
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert again.tokenizer.chat_template == lm.tokenizer.chat_template
    assert again.max_length == lm.max_length


@pytest.mark.parametrize("model", MODELS)
def test_a_saved_checkpoint_opens_with_plain_transformers(golden_lm, saved, recorded, model):
    auto = AutoModelForMaskedLM if model == "modernbert" else AutoModelForCausalLM
    plain, ids = auto.from_pretrained(saved(model)).eval(), recorded(model)["ids"]
    check(model, plain(input_ids=ids).logits, recorded(model)["logits"])
    pattern = block_causal(torch.arange(24).unsqueeze(0), 32) if model in BLOCK_CAUSAL else None
    logits = plain(input_ids=ids, attention_mask=pattern).logits
    if model in DENSE:
        assert torch.equal(logits, as_trained(golden_lm(model), ids))
    else:  # sums over experts depend on how the weights are aligned in memory
        torch.testing.assert_close(logits, as_trained(golden_lm(model), ids), rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(saved(model))
    assert tokenizer.get_vocab() == golden_lm(model).tokenizer.get_vocab()
    assert tokenizer.mask_token_id == golden_lm(model).spec.mask_token_id
