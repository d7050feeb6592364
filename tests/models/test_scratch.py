"""Models from scratch: the sizes asked for, repeatable weights, and clear refusals."""

import pytest
import torch

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.config import ModelConfig, ScratchConfig
from dllm_ray.models.load import open_model


def weights(lm) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in lm.model.parameters()])


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "llama"])
def test_the_same_seed_gives_the_same_weights_and_another_one_others(make_lm, architecture):
    first = weights(make_lm(architecture, seed=3))
    torch.rand(5)
    assert torch.equal(first, weights(make_lm(architecture, seed=3)))
    assert not torch.equal(first, weights(make_lm(architecture, seed=4)))


def test_the_global_generator_is_left_alone(make_lm):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    make_lm("bert", seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("architecture", ["bert", "modernbert", "roberta", "llama", "qwen3", "gpt2", "opt"])
def test_a_model_has_the_sizes_asked_for(make_lm, tokenizer, architecture):
    lm = make_lm(architecture, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=40)
    config = lm.model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 3)
    assert (config.vocab_size, lm.max_length) == (len(tokenizer), 40)
    assert lm.model.get_input_embeddings().num_embeddings == len(tokenizer)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "gpt2", "opt", "llama"])
def test_a_model_in_training_has_no_dropout(make_lm, architecture):
    lm = make_lm(architecture)
    ids = torch.arange(10).unsqueeze(0)
    plain = lm.logits(ids)
    lm.model.train()
    dropping = lm.logits(ids)
    lm.model.eval()
    assert torch.equal(plain, dropping)


def test_the_spec_is_that_of_the_tokenizer(make_lm, tokenizer):
    spec = make_lm("llama").spec
    assert (spec.family, spec.mask_token_id, spec.eos_token_id, spec.pad_token_id) == (
        *("llama", tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id),
    )
    assert spec.stop_token_ids == (tokenizer.eos_token_id,)
    assert not spec.shift_logits


def test_further_fields_of_the_architecture_may_be_set(make_lm):
    config = make_lm("llama", extra={"num_key_value_heads": 1, "tie_word_embeddings": True}).model.config
    assert (config.num_key_value_heads, config.tie_word_embeddings) == (1, True)


@pytest.mark.parametrize(
    ("architecture", "extra", "said"),
    [
        ("nonsense", {}, "architecture 'nonsense' is not a masked or causal language model"),
        ("vit", {}, "architecture 'vit' is not a masked or causal language model"),
        ("t5", {}, "architecture 't5' is not"),
        ("bart", {}, "architecture 'bart' is not"),
        ("llama", {"heads": 3}, "model.scratch.extra: heads is not a field of the llama config"),
        ("llama", {"num_key_value_heads": 3}, "these sizes and extra don't make a llama"),
        ("llama", {"rms_norm_eps": "small"}, "these sizes and extra don't make a llama"),
        ("mamba", {}, "mamba has layers of the kind linear_attention"),
        ("rwkv", {}, "attention stays causal"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(make_lm, architecture, extra, said):
    with pytest.raises(ModelError, match=said) as refused:
        make_lm(architecture, extra=extra)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"max_position_embeddings": -1}, "max_position_embeddings"),
        ({"vocab_size": 256}, "vocab_size"),
    ],
)
def test_sizes_that_cannot_be_are_refused_by_name(sizes, field):
    with pytest.raises(ConfigError) as refused:
        ScratchConfig(**sizes)
    assert refused.value.field == field


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("auto", torch.float32)])
def test_settings_without_a_path_open_a_new_model(tokenizer, name, dtype):
    scratch = ScratchConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    lm = open_model(ModelConfig(dtype=name, scratch=scratch), tokenizer, seed=1)
    assert (lm.model.dtype, lm.device.type, lm.model.training) == (dtype, "cpu", False)


def test_settings_with_a_path_open_that_model(make_lm, tmp_path):
    lm = make_lm("bert", seed=5)
    lm.save(tmp_path)
    assert torch.equal(weights(open_model(ModelConfig(path=str(tmp_path)))), weights(lm))


def test_a_decoder_whose_window_is_narrower_than_its_context_is_refused(make_lm):
    with pytest.raises(ModelError, match="sliding-window attention"):
        make_lm("mistral", extra={"sliding_window": 8})
    assert make_lm("mistral", extra={"sliding_window": None}).spec.family == "mistral"
