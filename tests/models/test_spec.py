"""`DiffusionSpec`: stored and read back, or refused."""

import json

import pytest

from dllm_ray.errors import ModelError
from dllm_ray.models.spec import DiffusionSpec

REQUIRED = {"family": "bert", "mask_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


@pytest.mark.parametrize("more", [{}, {"bos_token_id": 3, "eot_token_id": 4, "shift_logits": True}])
def test_a_spec_survives_json(more):
    spec = DiffusionSpec(**REQUIRED, **more)
    assert DiffusionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (REQUIRED | {"masc_token_id": 3}, "unknown: masc_token_id"),
        ({"family": "bert", "eos_token_id": 1}, "missing: mask_token_id, pad_token_id"),
        (REQUIRED | {"eos_token_id": None}, "missing: eos_token_id"),
        (REQUIRED | {"attention": "causal"}, "attention: expected full or block_causal, got 'causal'"),
        (REQUIRED | {"attention": "block_causal"}, "block_size: block-causal attention needs a whole number above 0"),
        (REQUIRED | {"padding": "left"}, "padding: expected eos or ignore or block or eos_block, got 'left'"),
        (REQUIRED | {"mask_token_id": "<mask>"}, "not a token id: mask_token_id"),
        (REQUIRED | {"eot_token_id": 1.5}, "not a token id: eot_token_id"),
        ({}, "missing: eos_token_id, family, mask_token_id, pad_token_id"),
        (3, "is a int; expected a mapping"),
        ([], "is a list; expected a mapping"),
    ],
)
def test_a_section_that_describes_no_diffusion_model_is_refused(values, said):
    with pytest.raises(ModelError, match=said) as refused:
        DiffusionSpec.from_dict(values, "m/config.json")
    assert str(refused.value).startswith("m/config.json: the 'diffusion' section")


@pytest.mark.parametrize(("eot", "stops"), [(None, (1,)), (1, (1,)), (5, (1, 5))])
def test_a_completion_ends_at_end_of_text_or_end_of_turn(eot, stops):
    assert DiffusionSpec(**REQUIRED, eot_token_id=eot).stop_token_ids == stops
