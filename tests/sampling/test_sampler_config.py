"""Settings of the sampler are checked when they are made."""

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.sampling import SamplerConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("max_length", 0),
        ("steps", 0),
        ("steps_per_block", -1),
        ("block_size", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("cfg_scale", -1.0),
        ("policy", "bravest"),
        ("seed", -1),
        ("seed", 2**63),
        ("schedule", "quadratic"),
    ],
)
def test_an_impossible_value_names_its_field(field, value):
    with pytest.raises(ConfigError) as caught:
        SamplerConfig(**{field: value})
    assert caught.value.field == field
    assert str(value) in str(caught.value)


def test_some_length_is_needed():
    with pytest.raises(ConfigError, match="max_new_tokens or max_length"):
        SamplerConfig(max_new_tokens=None)


def test_token_lists_become_tuples():
    config = SamplerConfig(suppress_tokens=[1], begin_suppress_tokens=[2, 3], cfg_keep_tokens=[])
    assert (config.suppress_tokens, config.begin_suppress_tokens, config.cfg_keep_tokens) == ((1,), (2, 3), ())


def test_blocks_and_their_steps_follow_from_the_length_of_the_answer():
    assert SamplerConfig(max_new_tokens=20, block_size=8, steps=7).blocks() == (8, 3)
    assert SamplerConfig(max_new_tokens=20, block_size=None, steps=7).blocks() == (20, 7)
    assert SamplerConfig(max_new_tokens=20, block_size=32, steps=7).blocks() == (20, 7)
    assert SamplerConfig(max_new_tokens=20, block_size=8, steps_per_block=2, steps=1).blocks() == (8, 2)


def test_fewer_steps_than_blocks_are_refused():
    with pytest.raises(ConfigError, match="2 steps are fewer than the 3 blocks"):
        SamplerConfig(max_new_tokens=20, block_size=8, steps=2).blocks()
