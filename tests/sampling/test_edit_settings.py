"""Which sampler settings fit which models: those of edits, and those of masks."""

from dataclasses import replace

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling.config import EDIT_FIELDS, SamplerConfig
from dllm_ray.sampling.plan import Plan, check
from dllm_ray.sampling.sampler import Sampler

MASKED = DiffusionSpec(family="bert", mask_token_id=4, eos_token_id=2, pad_token_id=0)
EDITS = replace(MASKED, edit_heads={"time": False, "reads": None})
CHANGED = {"kappa": "cubic", "start_tokens": 4, "edit_prompt": True, "edit_probability": 0.5}


@pytest.mark.parametrize("name", EDIT_FIELDS)
def test_a_masked_model_refuses_settings_of_edits_by_name(make_lm, name):
    config = SamplerConfig(max_new_tokens=8, **{name: CHANGED[name]})
    for use in (
        lambda: Plan(config, MASKED),
        lambda: check(config, MASKED),
        lambda: Sampler(make_lm(), config).sample([[5]]),
    ):
        with pytest.raises(ConfigError, match="is for models with edit heads") as caught:
            use()
        assert caught.value.field == name
    check(config, EDITS)


def test_all_settings_of_edits_are_known():
    assert set(CHANGED) == set(EDIT_FIELDS)
    Plan(SamplerConfig(), MASKED)  # at their defaults they say nothing


def test_only_a_model_with_blocks_needs_a_step_for_each():
    few = SamplerConfig(max_new_tokens=512, steps=8)
    check(few, EDITS)
    check(few, MASKED, infill=True)  # whose blocks are counted over the texts
    with pytest.raises(ConfigError, match="8 steps are fewer than the 16 blocks"):
        check(few, MASKED)


@pytest.mark.parametrize("changes", [{"cache": "dual"}, {"policy": "entropy"}, {"block_size": 8}, {"cfg_scale": 1.0}])
def test_a_model_that_edits_refuses_settings_of_masks_by_name(changes):
    with pytest.raises(ConfigError, match="has no meaning for a model that edits") as caught:
        check(SamplerConfig(**changes), EDITS)
    assert caught.value.field == next(iter(changes))
    check(SamplerConfig(**{"max_new_tokens": 8, "block_size": 8, **changes}), MASKED)
