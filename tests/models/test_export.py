"""A saved directory is an ordinary Hugging Face directory: plain transformers opens it, with the same logits."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load
from dllm_ray.models.spec import DiffusionSpec

IDS = torch.arange(24).reshape(3, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 7 + [0]])


@pytest.mark.parametrize(
    ("architecture", "auto"),
    [(name, AutoModelForMaskedLM) for name in ("bert", "modernbert")]
    + [(name, AutoModelForCausalLM) for name in ("llama", "qwen3", "gpt2")],
)
def test_plain_transformers_gives_the_same_logits_to_the_bit(make_lm, tmp_path, architecture, auto):
    lm = make_lm(architecture, seed=4)
    lm.save(tmp_path)
    plain = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=IDS).logits, lm.logits(IDS))
        padded = plain(input_ids=IDS, attention_mask=MASK).logits
        assert torch.equal(padded[MASK.bool()], lm.logits(IDS, MASK)[MASK.bool()])


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
def test_a_decoder_stays_bidirectional_in_its_config(make_lm, tmp_path, architecture):
    make_lm(architecture).save(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["is_causal"] is False
    assert AutoConfig.from_pretrained(tmp_path).is_causal is False


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_the_spec_is_in_the_config(make_lm, tmp_path, architecture):
    lm = make_lm(architecture)
    lm.save(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["diffusion"]
    assert DiffusionSpec.from_dict(stored) == lm.spec
    assert AutoConfig.from_pretrained(tmp_path).diffusion == lm.spec.to_dict()


def test_the_spec_that_is_saved_is_the_one_in_use(make_lm, tmp_path):
    lm = make_lm("bert")
    changed = replace(lm.spec, shift_logits=True)
    DiffusionLM(lm.model, lm.tokenizer, changed).save(tmp_path)
    assert load(tmp_path).spec == changed


def test_a_loaded_models_own_config_carries_the_spec(make_lm, tmp_path):
    """So that whoever saves just the model keeps it."""
    make_lm("bert").save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["diffusion"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    lm = load(tmp_path)
    assert lm.model.config.diffusion == lm.spec.to_dict()


def test_the_tokenizer_and_its_template_open_with_plain_transformers(make_lm, tmp_path):
    lm = make_lm("bert")
    lm.save(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "sort 21 🙂"}]
    assert plain.apply_chat_template(messages, tokenize=False) == "<|user|>sort 21 🙂<|endoftext|>"
    assert plain("sort 21 🙂")["input_ids"] == lm.tokenizer("sort 21 🙂")["input_ids"]


def test_no_code_travels_with_the_weights(make_lm, tmp_path):
    make_lm("llama").save(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not list(tmp_path.glob("*.py")) + list(tmp_path.glob("*.bin"))
