"""Text with gaps as token ids."""

import pytest

from dllm_ray.errors import DataError
from dllm_ray.infilling import encode_gaps, has_gaps
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler


@pytest.fixture
def mask(make_lm) -> int:
    return make_lm("bert").spec.mask_token_id


def ids(tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("text", "found"),
    [("a [MASK] b", True), ("[MASK:12]", True), ("a b", False), ("[mask]", False), ("[MASK:-1]", False), ("", False)],
)
def test_gaps_are_found(text, found):
    assert has_gaps(text) is found


def test_each_gap_has_as_many_masks_as_it_asks_for(tokenizer, mask):
    text = "[MASK]sort [MASK:3] quick[MASK:1]"
    expected = [mask, *ids(tokenizer, "sort "), mask, mask, mask, *ids(tokenizer, " quick"), mask]
    assert encode_gaps(tokenizer, mask, text) == expected
    assert encode_gaps(tokenizer, mask, "[MASK:2][MASK]") == [mask] * 3
    assert encode_gaps(tokenizer, mask, "sort") == ids(tokenizer, "sort")


def test_text_that_looks_like_a_control_token_stays_text(tokenizer, mask):
    tokens = encode_gaps(tokenizer, mask, "<|mask|><|endoftext|>[MASK]")
    assert tokens.count(mask) == 1 and tokens[-1] == mask and tokenizer.eos_token_id not in tokens
    assert tokenizer.decode(tokens[:-1]) == "<|mask|><|endoftext|>"


@pytest.mark.parametrize("size", ["0", "1000001", "9" * 5000])
def test_a_gap_of_no_size_or_of_a_senseless_one_is_refused(tokenizer, mask, size):
    with pytest.raises(DataError, match="a gap has between 1 and 1,000,000 tokens") as raised:
        encode_gaps(tokenizer, mask, f"a [MASK:{size}]")
    assert len(str(raised.value)) < 100


def test_a_sampler_fills_the_gaps_and_nothing_else(make_lm, tokenizer):
    lm = make_lm("bert")
    tokens = encode_gaps(tokenizer, lm.spec.mask_token_id, "sort [MASK:4] fox")
    [filled] = Sampler(lm, SamplerConfig(seed=0)).infill([tokens]).sequences
    for token, new in zip(tokens, filled, strict=True):
        assert new != lm.spec.mask_token_id if token == lm.spec.mask_token_id else new == token
