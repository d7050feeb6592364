"""Search spaces for models that edit: what can't be on the model is told as impossible."""

from functools import partial

import pytest

from dllm_ray.errors import ConfigError
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.plan import check
from dllm_ray.tuning.space import Space

SPEC = DiffusionSpec(
    family="bert", mask_token_id=4, eos_token_id=2, pad_token_id=0, edit_heads={"time": False, "reads": None}
)
BASE = SamplerConfig(max_new_tokens=64, steps=64)


def space(**tree) -> Space:
    return Space(tree, BASE, partial(check, spec=SPEC))


def test_settings_of_edits_are_swept():
    found = space(steps=[1, 8], temperature=[0.0, 1.0], kappa=["linear", "cubic"], start_tokens=[0, 4])
    assert len(found.grid()) == 16 and found.impossible == []
    drawn = space(start_tokens={"integer": [0, 8]}, edit_probability={"uniform": [0.1, 0.9]}).sample(5, 0)
    assert len(drawn) == 5 and all(0 <= one.sampler.start_tokens <= 8 for one in drawn)


def test_settings_of_masks_are_impossible():
    found = space(steps=[1, 8], cache=["none", "dual"])
    assert [one.name for one in found.grid()] == ["steps=1,cache=none", "steps=8,cache=none"]
    assert [reason for _, reason in found.impossible] == [
        "cache: 'dual' has no meaning for a model that edits: leave it out"
    ] * 2
    with pytest.raises(ConfigError, match="no combination is possible; the first, cache=dual: "):
        space(cache=["dual", "prefix"]).grid()
