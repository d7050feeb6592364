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
