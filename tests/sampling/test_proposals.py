"""Which token a position would get, and how sure the model is of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_ray.sampling.proposals import guide, probability, propose, suppress

LAST = 1 - 2**-24
"""The largest random number there is."""


def test_guidance_is_unguided_plus_scale_plus_one_times_the_difference():
    guided, unguided = torch.randn(3, 5), torch.randn(3, 5)
    for scale in (0.0, 0.5, 2.0):
        expected = unguided + (scale + 1) * (guided - unguided)
        torch.testing.assert_close(guide(guided, unguided, torch.full((3,), scale)), expected)


def test_every_position_has_its_own_guidance():
    guided, unguided = torch.tensor([[1.0], [1.0]]), torch.zeros(2, 1)
    assert guide(guided, unguided, torch.tensor([0.0, 3.0])).tolist() == [[1], [4]]


def test_suppressed_tokens_are_impossible_and_others_untouched():
    logits = torch.zeros(2, 4)
    suppress(logits, (1, 3))
    assert logits.tolist() == [[0, -torch.inf, 0, -torch.inf]] * 2
    suppress(logits, ())
    assert logits.isinf().sum() == 4


def test_the_likeliest_token_is_taken_at_temperature_0():
    logits = torch.tensor([[0.0, 2.0, 1.0], [5.0, -1.0, 0.0]])
    assert propose(logits, torch.zeros(2), None).tolist() == [1, 0]
    # cold and warm positions in one batch: a random number next to 1 moves the warm one only
    assert propose(logits, torch.tensor([0.0, 9.0]), torch.tensor([LAST, LAST])).tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_softmax_of_logits_over_temperature(temperature):
    logits = torch.tensor([1.0, -torch.inf, 0.0, 2.0])
    count = 10_000
    numbers = (torch.arange(count) + 0.5) / count
    tokens = propose(logits.expand(count, 4).clone(), torch.full((count,), temperature), numbers)
    shares = torch.bincount(tokens, minlength=4) / count
    torch.testing.assert_close(shares, torch.softmax(logits / temperature, 0), atol=2e-4, rtol=0)


@given(
    width=st.integers(3, 400),
    kept=st.sets(st.integers(0, 400), min_size=1, max_size=5),
    number=st.sampled_from([0.0, 2**-24, 0.5, LAST]),
    temperature=st.sampled_from([0.0, 0.01, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None)
def test_an_impossible_token_is_never_drawn(width, kept, number, temperature, seed):
    possible = {1 + token % (width - 2) for token in kept}  # neither the first nor the last
    logits = torch.randn(1, width, generator=torch.Generator().manual_seed(seed))
    suppress(logits, tuple(set(range(width)) - possible))
    assert propose(logits, torch.tensor([temperature]), torch.tensor([number])).item() in possible


def test_probability_is_that_of_softmax():
    logits = torch.randn(6, 9)
    tokens = torch.arange(6)
    expected = torch.softmax(logits.double(), 1)[tokens, tokens].float()
    torch.testing.assert_close(probability(logits, tokens), expected)


def test_an_impossible_token_has_probability_0():
    assert probability(torch.tensor([[1.0, -torch.inf]]), torch.tensor([1])).item() == 0


def test_half_precision_logits_give_float32_probabilities():
    logits = torch.randn(4, 50)
    tokens = logits.argmax(1)
    halves = probability(logits.bfloat16(), tokens)
    assert halves.dtype == torch.float32
    assert torch.equal(halves, probability(logits.bfloat16().float(), tokens))


@pytest.mark.parametrize("temperature", [1e-3, 1e-40])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature):
    logits = torch.tensor([[1.0, 5.0, 2.0], [-800.0, -900.0, -1000.0]])
    drawn = propose(logits, torch.full((2,), temperature), torch.tensor([0.999, 0.001]))
    assert drawn.tolist() == [1, 0]
