"""Logits: only where they are asked for, in both directions, unmoved by padding, for encoders and decoders alike."""

import pytest
import torch

from dllm_ray.models.lm import is_decoder

ENCODERS = ["bert", "modernbert", "roberta"]
DECODERS = ["llama", "qwen3", "gpt2", "opt"]
POSITIONS = torch.tensor([0, 3, 7, 8, 13, 16, 23])  # of a grid of 3 rows of 8, first and last columns among them

every_architecture = pytest.mark.parametrize("architecture", ENCODERS + DECODERS)


@pytest.fixture
def lm(make_lm, architecture):
    return make_lm(architecture, seed=1)


@pytest.fixture
def ids():
    return torch.randint(0, 260, (3, 8), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=[False, True], ids=["unpadded", "padded"])
def mask(request):
    if not request.param:
        return None
    return torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 7 + [0]])


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@every_architecture
@pytest.mark.parametrize("shift", [False, True])
def test_logits_at_chosen_positions_are_those_of_the_whole_grid(lm, ids, mask, shift):
    whole = lm.logits(ids, mask, shift=shift)
    chosen = lm.logits(ids, mask, positions=POSITIONS, shift=shift)
    assert whole.shape[:2] == ids.shape
    torch.testing.assert_close(chosen, whole.flatten(0, 1)[POSITIONS], rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", [*ENCODERS, "llama", "qwen3", "gpt2"])
def test_the_vocabulary_head_sees_the_chosen_positions_only(lm, ids):
    seen = []
    hook = lm.model.get_output_embeddings().register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0].shape))
    lm.logits(ids, positions=POSITIONS)
    hook.remove()
    assert [shape[:-1].numel() for shape in seen] == [len(POSITIONS)]


@every_architecture
def test_no_chosen_position_gives_no_logits(lm, ids):
    whole = lm.logits(ids)
    assert lm.logits(ids, positions=torch.tensor([], dtype=torch.long)).shape == (0, whole.shape[-1])


@every_architecture
def test_shifted_logits_are_read_one_position_to_the_left(lm, ids):
    plain, shifted = lm.logits(ids, shift=False), lm.logits(ids, shift=True)
    assert torch.equal(shifted[:, 1:], plain[:, :-1])
    assert torch.equal(shifted[:, 0], plain[:, 0])


@pytest.mark.parametrize("architecture", ["bert"])
def test_the_spec_says_whether_to_shift_where_the_caller_does_not(lm, ids):
    from dataclasses import replace

    from dllm_ray.models.lm import DiffusionLM

    shifting = DiffusionLM(lm.model, lm.tokenizer, replace(lm.spec, shift_logits=True))
    assert torch.equal(lm.logits(ids), lm.logits(ids, shift=False))
    assert torch.equal(shifting.logits(ids), lm.logits(ids, shift=True))


@every_architecture
def test_every_position_sees_every_other(lm, ids):
    row = ids[:1]
    plain = lm.logits(row)
    for changed in range(row.shape[1]):
        other = row.clone()
        other[0, changed] = (other[0, changed] + 1) % 260
        moved = (lm.logits(other) - plain).abs().amax(dim=-1)[0] > 0
        assert moved.all(), f"a change at {changed} is not seen at {(~moved).nonzero().flatten().tolist()}"


@every_architecture
@pytest.mark.parametrize("filler", ["pad", "eos", "other"])
def test_padding_that_is_masked_is_never_seen(lm, ids, filler):
    token = {"pad": lm.spec.pad_token_id, "eos": lm.spec.eos_token_id, "other": 77}[filler]
    padded = ids[:2].clone()
    padded[1, 5:] = token
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    together = lm.logits(padded, mask)
    torch.testing.assert_close(together[1, :5], lm.logits(ids[1:2, :5])[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(together[0], lm.logits(ids[:1])[0], rtol=0, atol=1e-5)


@every_architecture
def test_padding_tokens_that_are_not_masked_count_as_text(lm, ids):
    """No mask is made up from the token ids: end-of-text filler is attended."""
    filled = ids[:1].clone()
    filled[0, 5:] = lm.spec.pad_token_id
    assert not torch.allclose(lm.logits(filled)[0, :5], lm.logits(filled[:, :5])[0], atol=1e-4)
    everywhere = torch.ones_like(filled)
    torch.testing.assert_close(lm.logits(filled), lm.logits(filled, everywhere), rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "llama", "qwen3", "gpt2"])
def test_positions_count_from_0_and_may_be_given(lm, ids):
    counted = torch.arange(8).expand_as(ids)
    assert torch.equal(lm.logits(ids), lm.logits(ids, position_ids=counted))
    assert not torch.allclose(lm.logits(ids), lm.logits(ids, position_ids=counted.flip(1)), atol=1e-4)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "roberta", "llama", "qwen3", "gpt2"])
def test_a_pattern_of_attention_may_be_given(lm, ids):
    """Two blocks that don't see each other give what each gives alone at the same positions."""
    blocks = torch.arange(8) // 4
    pattern = (blocks[:, None] == blocks[None, :])[None, None]
    apart = lm.logits(ids[:1], pattern.expand(1, 1, 8, 8))
    torch.testing.assert_close(apart[0, :4], lm.logits(ids[:1, :4])[0], rtol=0, atol=1e-5)


@every_architecture
def test_a_row_may_be_as_long_as_max_length_says(lm):
    assert lm.max_length == 64
    assert lm.logits(torch.full((1, 64), lm.spec.pad_token_id)).shape[:2] == (1, 64)


@pytest.mark.parametrize("architecture", ["llama"])
def test_a_failed_call_leaves_no_trace(lm, ids):
    before = lm.logits(ids)
    with pytest.raises((IndexError, RuntimeError)):
        lm.logits(ids, positions=torch.tensor([24]))
    assert torch.equal(lm.logits(ids), before)


@pytest.mark.parametrize("architecture", ["bert"])
def test_strategies_may_put_their_own_module_in(lm, ids):
    from dllm_ray.models.lm import DiffusionLM

    wrapped = DiffusionLM(lm.model, lm.tokenizer, lm.spec, module=lambda ids, mask, positions, chosen: "theirs")
    assert wrapped.logits(ids) == "theirs"


@every_architecture
def test_gradients_flow_through_chosen_positions(lm, ids):
    with torch.enable_grad():
        lm.logits(ids, positions=POSITIONS).square().sum().backward()
    gradient = lm.model.get_input_embeddings().weight.grad
    assert gradient[ids.unique()].abs().sum(dim=1).gt(0).all()


@pytest.mark.parametrize(("architecture", "decodes"), [(a, False) for a in ENCODERS] + [(a, True) for a in DECODERS])
def test_encoders_and_decoders_are_told_apart(lm, decodes):
    assert is_decoder(lm.model) is decodes
