"""What a config.json is refused for, and what it makes of a checkpoint, without reading any weights."""

import json

import pytest
import torch

from dllm_ray.errors import ModelError
from dllm_ray.models.blueprint import resolve
from dllm_ray.models.checkpoint import Checkpoint
from dllm_ray.models.load import load, open_tokenizer


@pytest.fixture
def saved(make_lm, tmp_path):
    make_lm("llama").save(tmp_path)
    return tmp_path


def configure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("names", ["LlamaForCausalLM", [1, {}], {"a": 1}, 3])
def test_architectures_that_are_no_list_of_names_are_refused(saved, names):
    configure(saved, architectures=names)
    with pytest.raises(ModelError, match="expected a list of class names"):
        resolve(Checkpoint(str(saved)))


@pytest.mark.parametrize("mask", [-1, "5", 1.5, [3]])
def test_a_mask_token_that_is_no_number_of_a_token_is_refused(saved, mask):
    configure(saved, mask_token_id=mask)
    with pytest.raises(ModelError, match="expected the number of a token"):
        open_tokenizer(str(saved))


@pytest.mark.parametrize("changes", [{"hidden_act": "evil"}, {"rope_parameters": {"rope_type": "weird"}}])
def test_a_config_that_no_model_can_be_built_with_is_refused(saved, changes):
    configure(saved, **changes)
    with pytest.raises(ModelError, match=r"config\.json can't be used"):
        resolve(Checkpoint(str(saved))).skeleton()


def test_a_dtype_may_be_given_as_torch_names_it(saved):
    assert load(saved, dtype=torch.bfloat16).model.dtype == torch.bfloat16
