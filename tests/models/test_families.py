"""The published families: told apart by config.json, mapped exactly or refused by name, each with its facts."""

import copy
import json
import shutil
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path

import pytest
import torch
from gemma_testing import make_gemma, save_gemma
from safetensors.torch import load_file, save_file
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models import families
from dllm_ray.models.attention import block_causal
from dllm_ray.models.blueprint import resolve
from dllm_ray.models.checkpoint import Checkpoint
from dllm_ray.models.defaults import sampler_settings
from dllm_ray.models.load import load, open_tokenizer
from dllm_ray.models.mapping import to_native
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.objectives import MDLM
from dllm_ray.sampling import Sampler, SamplerConfig

ABSENT = object()
IDS = torch.randint(6, 290, (2, 20), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def configure(folder: Path, **changes) -> None:
    """Changes fields of config.json; ABSENT takes one out, None makes it null."""
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ABSENT}
    (folder / "config.json").write_text(json.dumps(config))


def refused(path: Path) -> str:
    """What `load` says of a checkpoint; `open_tokenizer`, which reads no weights, says the same."""
    with pytest.raises(ModelError) as without_weights:
        open_tokenizer(str(path))
    with pytest.raises(ModelError) as error:
        load(path)
    assert str(error.value) == str(without_weights.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value)


# --- which family a config.json belongs to


@pytest.mark.parametrize(
    ("model_type", "architecture", "family"),
    [
        ("llada", "LLaDAModelLM", "llada"),
        ("llada", "LLaDAMoEModelLM", "llada_moe"),
        ("llada", "LLaDAMoEModel", "llada_moe"),
        ("lladamoe", "LLaDAMoEModelLM", "llada_moe"),
        ("lladamoe", None, "llada_moe"),
        ("llada2_moe", "LLaDA2MoeModelLM", "llada2"),
        ("llada21_moe", "LLaDA2MoeModelLM", "llada21"),
        (None, "LLaDA2MoeModelLM", "llada2"),
        ("Dream", "DreamModel", "dream"),
        ("dream", None, "dream"),
        (None, "DreamModel", "dream"),
        ("a2d-llama", "A2DLlamaLMHeadModel", "a2d-llama"),
        ("a2d-qwen2", "A2DQwen2LMHeadModel", "a2d-qwen2"),
        ("a2d-qwen3", "A2DQwen3LMHeadModel", "a2d-qwen3"),
        ("bert", "BertForMaskedLM", "bert"),
        ("roberta", "RobertaForMaskedLM", "roberta"),
        ("modernbert", "ModernBertForMaskedLM", "modernbert"),
        ("sdar", "SDARForCausalLM", "sdar"),
        ("sdar_moe", "SDARMoeForCausalLM", "sdar_moe"),
        ("Fast_dLLM_Qwen", "Fast_dLLM_QwenForCausalLM", "fast_dllm_v2"),
        ("qwen2", "Fast_dLLM_QwenForCausalLM", "fast_dllm_v2"),
        ("diffusion_gemma", "DiffusionGemmaForBlockDiffusion", "diffusion_gemma"),
        ("llama", "LlamaForCausalLM", None),
        ("qwen3", "Qwen3ForCausalLM", None),
        ("glm4_moe", "Glm4MoeForCausalLM", None),
        ("nonsense", "NonsenseModel", None),
        (None, None, None),
    ],
)
def test_a_family_is_found_by_type_and_class(model_type, architecture, family):
    config = {"model_type": model_type, "architectures": None if architecture is None else [architecture]}
    found = families.find(config, "here")
    assert (None if found is None else found.name) == family


@pytest.mark.parametrize("named", [{}, {"architectures": None}, {"architectures": []}, {"architectures": ["Other"]}])
def test_a_type_that_two_families_share_needs_the_class(named):
    expected = "here: several families have the model_type 'llada'; architectures is .*, expected one of LLaDAModelLM, "
    with pytest.raises(ModelError, match=expected + "LLaDAMoEModelLM"):
        families.find({"model_type": "llada"} | named, "here")


def test_a_checkpoint_of_a_shared_type_without_the_class_is_refused(golden_copy):
    configure(golden_copy("llada"), architectures=ABSENT)
    assert "architectures is [], expected one of LLaDAModelLM, LLaDAMoEModelLM" in refused(golden_copy("llada"))


def test_the_published_moe_type_loads_like_the_renamed_one(golden_copy, golden_lm):
    """The release says `llada`, the reference library's copies `lladamoe`."""
    configure(golden_copy("llada_moe"), model_type="llada")
    lm = load(golden_copy("llada_moe"))
    assert lm.spec == golden_lm("llada_moe").spec
    assert torch.equal(lm.logits(IDS), golden_lm("llada_moe").logits(IDS))


def test_nemotron_is_refused_with_the_reason(make_lm, tmp_path):
    make_lm("llama").save(tmp_path)
    changes = {"model_type": "nemotron_labs_diffusion", "architectures": ["NemotronLabsDiffusionModel"]}
    configure(tmp_path, **changes, diffusion=ABSENT)
    assert "NemotronLabsDiffusionModel is refused: its layers switch between causal" in refused(tmp_path)


def test_an_unknown_type_is_refused_with_those_that_are_known(make_lm, tmp_path):
    make_lm("llama").save(tmp_path)
    configure(tmp_path, model_type="nonsense", architectures=["NonsenseModel"], diffusion=ABSENT)
    said = refused(tmp_path)
    assert "model_type 'nonsense' is neither a published diffusion family (" in said
    for family in families.FAMILIES:
        assert all(name in said for name in family.model_types)


@pytest.mark.parametrize("family", families.FAMILIES, ids=lambda family: family.name)
def test_a_spec_names_its_family(family):
    assert families.by_name(family.name) is family
    assert families.by_name("llama") is None


# --- what can't be mapped exactly


QWEN_SHAPED = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
HAND_MADE = {
    "sdar": QWEN_SHAPED | {"model_type": "sdar", "architectures": ["SDARForCausalLM"]},
    "sdar_moe": QWEN_SHAPED | {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"]},
    "fast_dllm_v2": QWEN_SHAPED | {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]},
    "a2d_llama": QWEN_SHAPED | {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"]},
}
"""Configs of the families without reference numbers."""


@pytest.fixture
def golden_copy(request, tmp_path):
    """`golden_copy("dream")`: a copy of a reference checkpoint, the same within a test."""

    @cache
    def copied(name: str) -> Path:
        golden = request.getfixturevalue("golden")
        return Path(shutil.copytree(golden / name / "checkpoint", tmp_path / name))

    return copied


@pytest.fixture
def checkpoint(golden_copy, make_lm, tmp_path):
    """A checkpoint of any family; one made by hand has weights and a tokenizer that are never got to."""

    def make(family: str) -> Path:
        if family not in HAND_MADE:
            return golden_copy(family)
        make_lm("llama").save(tmp_path / family)
        (tmp_path / family / "config.json").write_text(json.dumps(HAND_MADE[family]))
        return tmp_path / family

    return make


LLADA2_REQUIREMENTS = [
    ("use_bias", True, "use_bias is True", "output projection has no bias"),
    ("use_bias", ABSENT, "use_bias is True", "output projection has no bias"),
    ("use_qk_norm", False, "use_qk_norm is False", "norms on queries and keys"),
    ("use_sliding_window", True, "use_sliding_window is True", "a window would cut the prompt off"),
    ("hidden_act", "gelu", "hidden_act is 'gelu'", "silu"),
    ("score_function", "softmax", "score_function is 'softmax'", "sigmoid"),
    ("num_shared_experts", 0, "num_shared_experts is 0", "always has a shared expert"),
    ("num_shared_experts", None, "num_shared_experts is 0 or null", "always has a shared expert"),
    ("num_experts_per_tok", 1, "num_experts_per_tok is 1", "doesn't normalise"),
]
REQUIREMENTS = [
    ("llada", "block_type", "sequential", "block_type is 'sequential'", "fuse the projections"),
    ("llada", "block_type", None, "block_type is 'sequential'", "fuse the projections"),
    ("llada", "block_type", ABSENT, "block_type is 'sequential'", "fuse the projections"),
    ("llada", "block_group_size", 4, "block_group_size is 4", "other tensor names"),
    ("llada", "activation_type", "gelu", "activation_type is 'gelu'", "gates with silu"),
    ("llada", "activation_type", "swiglu", "activation_type is 'swiglu'", "gates with silu"),
    ("llada", "activation_type", ABSENT, "activation_type is 'swiglu'", "gates with silu"),
    ("llada", "layer_norm_type", "default", "layer_norm_type is 'default'", "Llama has RMSNorm"),
    ("llada", "layer_norm_type", ABSENT, "layer_norm_type is 'default'", "Llama has RMSNorm"),
    ("llada", "layer_norm_with_affine", False, "layer_norm_with_affine is False", "norms have weights"),
    ("llada", "bias_for_layer_norm", True, "bias_for_layer_norm is True", "norms have no bias"),
    ("llada", "attention_layer_norm", True, "attention_layer_norm is True", "no norm on queries and keys"),
    ("llada", "rope", False, "rope is False", "rotary positions"),
    ("llada", "rope", ABSENT, "rope is False", "rotary positions"),
    ("llada", "alibi", True, "alibi is True", "rotary positions"),
    ("llada", "input_emb_norm", True, "input_emb_norm is True", "doesn't scale embeddings"),
    ("llada", "scale_logits", True, "scale_logits is True", "doesn't scale logits"),
    ("llada", "include_bias", True, "include_bias is True", "without biases"),
    ("llada", "include_qkv_bias", True, "include_qkv_bias is True", "without biases"),
    ("llada_moe", "qk_layernorm", False, "qk_layernorm is False", "always has norms on queries and keys"),
    ("llada_moe", "qk_layernorm", ABSENT, "qk_layernorm is False", "always has norms on queries and keys"),
    ("llada_moe", "shared_expert_intermediate_size", 64, "is 64", "no shared expert"),
    ("llada_moe", "moe_router_enable_expert_bias", True, "is True", "no expert bias"),
    ("llada_moe", "partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5", "rotates whole heads"),
    ("llada_moe", "clip_qkv", 8.0, "clip_qkv is 8.0", "doesn't clip"),
    ("llada_moe", "hidden_act", "gelu", "hidden_act is 'gelu'", "silu"),
    ("llada_moe", "moe_layer_freq", [1], "moe_layer_freq has 1 entries for 2 layers", "can't be mapped exactly"),
    *(("llada2", *row) for row in LLADA2_REQUIREMENTS),
    *(("llada21", *row) for row in LLADA2_REQUIREMENTS),
    ("dream", "use_sliding_window", True, "use_sliding_window is True", "cut the prompt off"),
    ("sdar", "use_sliding_window", True, "use_sliding_window is True", "cut the prompt off"),
    ("sdar_moe", "use_sliding_window", True, "use_sliding_window is True", "cut the prompt off"),
    ("fast_dllm_v2", "use_sliding_window", True, "use_sliding_window is True", "cut the prompt off"),
]


def requirement_id(value) -> str | None:
    return "absent" if value is ABSENT else None


@pytest.mark.parametrize(("family", "field", "value", "found", "why"), REQUIREMENTS, ids=requirement_id)
def test_a_field_that_cannot_be_mapped_is_refused_with_its_value_and_the_reason(
    checkpoint, family, field, value, found, why
):
    """An absent field means what the published class makes of it."""
    folder = checkpoint(family)
    configure(folder, **{field: value})
    said = refused(folder)
    assert field in said
    assert found in said
    assert why in said


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llada", "bias_for_layer_norm", False),
        ("llada", "block_group_size", ABSENT),
        ("llada", "rope_full_precision", False),
        ("llada_moe", "shared_expert_intermediate_size", 0),
        ("llada_moe", "partial_rotary_factor", 1.0),
        ("llada_moe", "partial_rotary_factor", ABSENT),
        ("llada_moe", "moe_layer_freq", 1),
        ("llada_moe", "moe_layer_freq", None),
        ("llada2", "score_function", "sigmoid"),
        ("llada2", "num_key_value_heads", 2),
        ("dream", "use_sliding_window", ABSENT),
        ("a2d_qwen3", "sliding_window", 4),
    ],
    ids=requirement_id,
)
def test_another_way_to_say_the_same_loads_the_same(golden_copy, golden_lm, family, field, value):
    configure(golden_copy(family), **{field: value})
    lm = load(golden_copy(family))
    assert torch.equal(lm.logits(IDS), golden_lm(family).logits(IDS))
    assert lm.spec == golden_lm(family).spec


NEEDED = {
    "llada": ["d_model", "n_heads", "n_layers", "vocab_size", "max_sequence_length"],
    "llada_moe": [
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("num_experts", "num_experts_per_tok", "expert_intermediate_size"),
    ],
    "llada2": [
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    ],
    **{family: list(QWEN_SHAPED) for family in ("dream", "a2d_qwen2", "a2d_qwen3", *HAND_MADE)},
}


@pytest.mark.parametrize("value", [ABSENT, None], ids=["absent", "null"])
@pytest.mark.parametrize(
    ("family", "field"), [(family, field) for family, fields in NEEDED.items() for field in fields]
)
def test_a_missing_field_is_named(checkpoint, family, field, value):
    folder = checkpoint(family)
    configure(folder, **{field: value})
    assert f"config.json has no {field}, which a {family.replace('a2d_', 'a2d-')} checkpoint needs" in refused(folder)


def test_either_way_to_say_the_width_of_lladas_mlp_is_needed(golden_copy):
    configure(golden_copy("llada"), mlp_hidden_size=None, mlp_ratio=None)
    assert "config.json has no mlp_ratio" in refused(golden_copy("llada"))


# --- facts


BLOCKS_OF_32 = {"policy": "low_confidence", "block_size": 32}
WHOLE = {"policy": "entropy", "block_size": None}
IDS_OF = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 1}
SPECS = {
    "llada": DiffusionSpec("llada", 5, **IDS_OF, eot_token_id=11, sampler=BLOCKS_OF_32),
    "llada_moe": DiffusionSpec("llada_moe", 4, **IDS_OF, eot_token_id=12, sampler=BLOCKS_OF_32),
    "dream": DiffusionSpec("dream", 4, **IDS_OF, eot_token_id=8, shift_logits=True, sampler=WHOLE),
    "a2d_qwen2": DiffusionSpec("a2d-qwen2", 4, **IDS_OF, eot_token_id=8),
    "a2d_qwen3": DiffusionSpec("a2d-qwen3", 4, **IDS_OF, eot_token_id=8),
    "modernbert": DiffusionSpec("modernbert", 6, **IDS_OF, eot_token_id=8, sampler=BLOCKS_OF_32),
    **{
        name: DiffusionSpec(
            name,
            4,
            **IDS_OF,
            eot_token_id=12,
            attention="block_causal",
            block_size=32,
            padding="eos_block",
            sampler={"policy": name, "block_size": 32, "cache": "block"},
        )
        for name in ("llada2", "llada21")
    },
}


@pytest.mark.parametrize("family", SPECS)
def test_a_reference_checkpoint_has_the_facts_of_its_family(golden, golden_lm, family):
    assert golden_lm(family).spec == SPECS[family]
    _, spec, _ = open_tokenizer(str(golden / family / "checkpoint"))
    assert spec == SPECS[family]


CONTEXT = {"llada": 1024, "modernbert": 1024}


@pytest.mark.parametrize("family", SPECS)
def test_a_reference_checkpoint_has_the_context_of_its_config(golden_lm, family):
    assert golden_lm(family).max_length == CONTEXT.get(family, 2048)


# --- checkpoints made on the spot: a native model in a family's published layout


@pytest.fixture(scope="module")
def bare_tokenizer(tokenizer):
    """A tokenizer that names no mask token, with the control tokens of the published families."""
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(
        tokenizer_object=copy.deepcopy(tokenizer.backend_tokenizer),
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        bos_token="<|system|>",
    )
    marks = ["<|MASK|>", "|<MASK>|", "<|im_end|>", "<|eot_id|>", "<|role_end|>", "<|mdm_mask|>"]
    made.add_special_tokens({"additional_special_tokens": marks})
    return made


@pytest.fixture
def publish(bare_tokenizer, tmp_path):
    """Writes config.json, tensors and a tokenizer that names a class of its own, as a release does."""

    def write(config: dict, tensors: dict[str, torch.Tensor]) -> Path:
        folder = tmp_path / "published"
        bare_tokenizer.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_own.Model"}}))
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
        return folder

    return write


SIZES = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 3,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 16}


def native(config) -> torch.nn.Module:
    """A bidirectional model whose every tensor matters: random norms and biases too."""
    from transformers import AutoModelForCausalLM

    config.is_causal = False
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        else:
            tensor.copy_(0.2 * noise + (1.0 if "norm" in name else 0.0))
    model.tie_weights()
    return model


def old_style(model, folder: Path, **fields) -> dict:
    """The config.json of a saved model as transformers 4 wrote it, with a family's own fields."""
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    theta = rope.pop("rope_theta")
    scaling = None if rope == {"rope_type": "default"} else rope
    for name in ("is_causal", "dtype", "layer_types"):
        config.pop(name, None)
    if "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    return config | {"rope_theta": theta, "rope_scaling": scaling, "torch_dtype": "float32"} | fields


def as_transformers_saves(model, tmp_path: Path, **fields) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and tensors in the layout that transformers writes, which keeps each expert's matrices apart."""
    folder = tmp_path / "as_saved"
    model.save_pretrained(folder)
    return old_style(model, folder, **fields), load_file(folder / "model.safetensors")


def logits_of(model, block_size: int | None = None) -> torch.Tensor:
    pattern = None if block_size is None else block_causal(torch.arange(IDS.shape[1]).unsqueeze(0), block_size)
    return model(input_ids=IDS, attention_mask=pattern).logits


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.3  # a model that says something
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


SDAR = {"model_type": "sdar", "architectures": ["SDARForCausalLM"], "mask_token_id": 263}


@pytest.mark.parametrize("block_size", [4, 8])
def test_sdar_is_qwen3_with_block_causal_attention(publish, tmp_path, block_size):
    model = native(Qwen3Config(**SIZES, head_dim=16))
    folder = publish(*as_transformers_saves(model, tmp_path, **SDAR, block_size=block_size))
    lm = load(folder)
    assert type(lm.model) is Qwen3ForCausalLM
    same(lm.logits(IDS), logits_of(model, block_size))
    assert not torch.allclose(lm.logits(IDS), logits_of(model), atol=0.1)
    assert (lm.spec.family, lm.spec.attention, lm.spec.block_size) == ("sdar", "block_causal", block_size)
    assert (lm.spec.mask_token_id, lm.spec.shift_logits) == (263, False)
    assert lm.tokenizer.convert_ids_to_tokens(lm.spec.eot_token_id) == "<|im_end|>"


@pytest.mark.parametrize("block_size", [4, 8, 32])
def test_a_block_takes_a_step_for_each_of_its_tokens_by_default(publish, tmp_path, block_size):
    model = native(Qwen3Config(**SIZES, head_dim=16))
    folder = publish(*as_transformers_saves(model, tmp_path, **SDAR, block_size=block_size))
    settings = SamplerConfig(**open_tokenizer(str(folder))[1].sampler)
    assert settings.policy == "low_confidence"
    assert settings.blocks() == (block_size, block_size)
    assert sampler_settings(str(folder)) == open_tokenizer(str(folder))[1].sampler


def test_an_sdar_config_without_a_block_size_means_4(publish, tmp_path):
    model = native(Qwen3Config(**SIZES, head_dim=16))
    lm = load(publish(*as_transformers_saves(model, tmp_path, **SDAR)))
    assert (lm.spec.block_size, lm.spec.sampler["block_size"]) == (4, 4)
    same(lm.logits(IDS), logits_of(model, 4))


@pytest.mark.parametrize("normalised", [True, False])
def test_sdar_moe_is_qwen3_moe(publish, tmp_path, normalised):
    model = native(Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=normalised))
    named = {"model_type": "sdar_moe", "architectures": ["SDARMoeForCausalLM"], "mask_token_id": 263, "block_size": 4}
    config, tensors = as_transformers_saves(model, tmp_path, **named)
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in tensors
    lm = load(publish(config, tensors))
    assert type(lm.model) is Qwen3MoeForCausalLM
    same(lm.logits(IDS), logits_of(model, 4))
    assert (lm.spec.family, lm.spec.block_size, lm.spec.mask_token_id) == ("sdar_moe", 4, 263)


def test_fast_dllm_v2_is_qwen2_with_block_causal_attention_and_shifted_logits(publish, tmp_path):
    model = native(Qwen2Config(**SIZES, tie_word_embeddings=True))
    named = {"model_type": "Fast_dLLM_Qwen", "architectures": ["Fast_dLLM_QwenForCausalLM"]}
    config, tensors = as_transformers_saves(model, tmp_path, **named, bd_size=8, mask_token_id=264)
    assert "lm_head.weight" not in tensors
    lm = load(publish(config, tensors))
    assert type(lm.model) is Qwen2ForCausalLM
    expected = logits_of(model, 8)
    same(lm.logits(IDS, shift=False), expected)
    same(lm.logits(IDS)[:, 1:], expected[:, :-1])
    assert (lm.spec.family, lm.spec.attention, lm.spec.block_size) == ("fast_dllm_v2", "block_causal", 8)
    assert (lm.spec.mask_token_id, lm.spec.shift_logits) == (264, True)
    assert lm.spec.sampler == {"policy": "low_confidence", "block_size": 8, "cache": "block"}


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a2d_llama_is_llama_with_its_rotary_scaling(publish, tmp_path, tied, kind):
    model = native(LlamaConfig(**SIZES, tie_word_embeddings=tied, rope_parameters=LLAMA3 | {"rope_theta": 500_000.0}))
    named = {"model_type": "a2d-llama", "architectures": ["A2DLlamaLMHeadModel"]}
    config, tensors = as_transformers_saves(model, tmp_path, **named)
    config["rope_scaling"][kind] = config["rope_scaling"].pop("rope_type")
    assert config["rope_theta"] == 500_000.0
    lm = load(publish(config, tensors))
    same(lm.logits(IDS), logits_of(model))
    assert (lm.spec.family, lm.spec.attention, lm.spec.shift_logits) == ("a2d-llama", "full", False)
    assert lm.tokenizer.convert_ids_to_tokens(lm.spec.eot_token_id) == "<|eot_id|>"
    configure(tmp_path / "published", rope_scaling=None)
    assert not torch.allclose(load(tmp_path / "published").logits(IDS), lm.logits(IDS), atol=1e-2)


def test_an_a2d_checkpoint_sees_the_whole_canvas_whatever_window_its_config_states(publish, tmp_path):
    model = native(Qwen3Config(**SIZES, head_dim=16))
    named = {"model_type": "a2d-qwen3", "architectures": ["A2DQwen3LMHeadModel"]}
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    layers = {"layer_types": ["sliding_attention"] * 2}
    lm = load(publish(*as_transformers_saves(model, tmp_path, **named, **window, **layers)))
    same(lm.logits(IDS), logits_of(model))


@pytest.mark.parametrize(
    ("name", "block_size"),
    [
        ("Qwen3-0.6B-diffusion-bd3lm-v0.1", 32),
        ("my-BD3LM-run", 32),
        ("Qwen3-0.6B-diffusion-mdlm-v0.1", None),
        ("bd3lm-runs/qwen", None),
    ],
)
def test_an_a2d_checkpoint_says_by_its_name_that_it_sees_blocks(golden, tmp_path, name, block_size):
    """Its config.json is the same either way."""
    folder = Path(shutil.copytree(golden / "a2d_qwen3" / "checkpoint", tmp_path / name))
    lm = load(folder)
    sampler = {"block_size": block_size, "cache": "block"}
    expected = ("full", None, {}, "eos") if block_size is None else ("block_causal", block_size, sampler, "block")
    assert (lm.spec.attention, lm.spec.block_size, lm.spec.sampler, lm.spec.padding) == expected
    assert sampler_settings(str(folder)) == lm.spec.sampler
    lm.save(tmp_path / "saved")
    assert load(tmp_path / "saved").spec == lm.spec


def test_the_name_counts_however_the_path_is_written(golden, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(golden / "a2d_qwen3" / "checkpoint", tmp_path / "my-bd3lm"))
    monkeypatch.chdir(folder)
    assert load(".").spec.attention == "block_causal"
    assert load("../my-bd3lm/").spec.attention == "block_causal"


LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "mlp_hidden_size": 48,
    "vocab_size": 320,
    "embedding_size": 320,
    "max_sequence_length": 64,
    "block_type": "llama",
    "block_group_size": 1,
    "activation_type": "silu",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "rope": True,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "mask_token_id": 268,
}
LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def in_lladas_layout(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    state, trunk = model.state_dict(), "model.transformer"
    tensors = {
        f"{trunk}.wte.weight": state["model.embed_tokens.weight"],
        f"{trunk}.ln_f.weight": state["model.norm.weight"],
    }
    for layer in range(model.config.num_hidden_layers):
        for theirs, ours in LLADA_BLOCK.items():
            tensors[f"{trunk}.blocks.{layer}.{theirs}.weight"] = state[f"model.layers.{layer}.{ours}.weight"]
    if not model.config.tie_word_embeddings:
        tensors[f"{trunk}.ff_out.weight"] = state["lm_head.weight"]
    return tensors


@pytest.mark.parametrize(
    ("llama", "fields"),
    [
        ({"num_key_value_heads": 2}, {"n_kv_heads": 2, "weight_tying": False}),
        ({"num_key_value_heads": 1}, {"multi_query_attention": True, "weight_tying": False}),
        ({"num_key_value_heads": 4}, {"n_kv_heads": None, "weight_tying": False}),
        ({"tie_word_embeddings": True}, {"n_kv_heads": 2, "weight_tying": True}),
        ({"tie_word_embeddings": True}, {"n_kv_heads": 2}),
        ({"intermediate_size": 96}, {"n_kv_heads": 2, "weight_tying": False, "mlp_hidden_size": None, "mlp_ratio": 3}),
        ({}, {"n_kv_heads": 2, "weight_tying": False, "vocab_size": 269}),
    ],
    ids=["grouped", "multi-query", "one for each", "tied", "tied by default", "mlp_ratio", "padded vocabulary"],
)
def test_llada_in_other_shapes_is_llama(publish, llama, fields):
    rope = {"rope_type": "default", "rope_theta": 500_000.0}
    model = native(
        LlamaConfig(**(SIZES | {"tie_word_embeddings": False} | llama), rms_norm_eps=1e-5, rope_parameters=rope)
    )
    lm = load(publish(LLADA | fields, in_lladas_layout(model)))
    assert type(lm.model) is LlamaForCausalLM
    same(lm.logits(IDS), logits_of(model))
    tied = lm.model.get_output_embeddings().weight is lm.model.get_input_embeddings().weight
    assert tied is model.config.tie_word_embeddings
    assert (lm.spec.family, lm.spec.mask_token_id, lm.max_length) == ("llada", 268, 64)


def test_a_tied_llada_may_state_its_head_all_the_same(publish):
    model = native(LlamaConfig(**SIZES, tie_word_embeddings=True, rms_norm_eps=1e-5))
    tensors = in_lladas_layout(model)
    tensors["model.transformer.ff_out.weight"] = tensors["model.transformer.wte.weight"]
    fields = {"n_kv_heads": 2, "weight_tying": True, "rope_theta": 10_000.0}
    same(load(publish(LLADA | fields, tensors)).logits(IDS), logits_of(model))


def test_llada_fields_that_are_absent_have_the_values_of_its_class(publish):
    rope = {"rope_type": "default", "rope_theta": 10_000.0}
    sizes = SIZES | {"num_key_value_heads": 4, "tie_word_embeddings": True}
    model = native(LlamaConfig(**sizes, rms_norm_eps=1e-5, rope_parameters=rope))
    folder = publish(LLADA, in_lladas_layout(model))
    configure(folder, rope_theta=ABSENT, rms_norm_eps=ABSENT, embedding_size=ABSENT)
    same(load(folder).logits(IDS), logits_of(model))


def test_an_untied_llada_without_its_head_is_refused(publish):
    model = native(LlamaConfig(**SIZES, tie_word_embeddings=True))
    folder = publish(LLADA | {"n_kv_heads": 2, "weight_tying": False}, in_lladas_layout(model))
    with pytest.raises(ModelError, match=r"1 tensors are missing .*, first 'model\.transformer\.ff_out\.weight'"):
        load(folder)


LLADA_MOE = {
    "model_type": "llada",
    "architectures": ["LLaDAMoEModelLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "dense_intermediate_size": 48,
    "expert_intermediate_size": 16,
    "shared_expert_intermediate_size": None,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_layer_freq": [0, 1, 1],
    "qk_layernorm": True,
    "rope_theta": 50_000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "norm_topk_prob": None,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("biased", [False, True], ids=["no biases", "attention biases"])
@pytest.mark.parametrize("dense", [[0], [2], [0, 1, 2], []], ids=str)
def test_llada_moe_may_have_dense_layers(publish, tmp_path, dense, biased):
    sizes = (
        SIZES | EXPERTS | {"num_hidden_layers": 3, "head_dim": 8, "mlp_only_layers": dense, "attention_bias": biased}
    )
    rope = {"rope_type": "default", "rope_theta": 50_000}
    model = native(Qwen3MoeConfig(**sizes, norm_topk_prob=False, rms_norm_eps=1e-5, rope_parameters=rope))
    _, tensors = as_transformers_saves(model, tmp_path)
    routed = [int(layer not in dense) for layer in range(3)]
    assert ("model.layers.0.mlp.up_proj.weight" in tensors) is (0 in dense)
    lm = load(publish(LLADA_MOE | {"moe_layer_freq": routed, "attention_bias": biased}, tensors))
    assert type(lm.model) is Qwen3MoeForCausalLM
    same(lm.logits(IDS), logits_of(model))
    assert lm.spec.family == "llada_moe"


LLADA2 = {
    "model_type": "llada2_moe",
    "architectures": ["LLaDA2MoeModelLM"],
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600_000.0,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "tie_word_embeddings": False,
    "mask_token_id": 263,
}


def glm4_moe(**changes) -> Glm4MoeConfig:
    shared = (
        *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts_per_tok", "n_group", "topk_group"),
        *("routed_scaling_factor", "first_k_dense_replace", "rms_norm_eps", "max_position_embeddings"),
        "tie_word_embeddings",
    )
    fields = {name: LLADA2[name] for name in shared} | {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "use_qk_norm": True,
        "norm_topk_prob": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 600_000.0, "partial_rotary_factor": 0.5},
    }
    return Glm4MoeConfig(**(fields | changes))


def in_llada2s_layout(model: Glm4MoeForCausalLM) -> dict[str, torch.Tensor]:
    renamed = {
        "model.embed_tokens.weight": "model.word_embeddings.weight",
        "self_attn.o_proj": "attention.dense",
        "self_attn.q_norm": "attention.query_layernorm",
        "self_attn.k_norm": "attention.key_layernorm",
        "gate.e_score_correction_bias": "gate.expert_bias",
    }
    tensors: dict[str, torch.Tensor] = {}
    fused: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in renamed.items():
            name = name.replace(ours, theirs)
        place, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for expert, both in enumerate(tensor):
                half = len(both) // 2
                tensors[f"{place}.{expert}.gate_proj.weight"] = both[:half]
                tensors[f"{place}.{expert}.up_proj.weight"] = both[half:]
        elif last == "down_proj":
            tensors |= {f"{place}.{expert}.down_proj.weight": one for expert, one in enumerate(tensor)}
        elif "self_attn" in name:
            attention, part = place.rsplit(".", 1)
            target = f"{attention.replace('self_attn', 'attention')}.query_key_value.{last}"
            fused.setdefault(target, {})[part] = tensor
        else:
            tensors[name] = tensor
    for name, parts in fused.items():
        tensors[name] = torch.cat([parts["q_proj"], parts["k_proj"], parts["v_proj"]])
    return tensors


@pytest.mark.parametrize(
    ("glm", "fields"),
    [
        ({}, {}),
        ({"attention_bias": True}, {"use_qkv_bias": True}),
        ({"head_dim": 8}, {"head_dim": None}),
        ({"num_key_value_heads": 4}, {"num_key_value_heads": 0}),
        ({"first_k_dense_replace": 0}, {"first_k_dense_replace": ABSENT}),
        ({"n_shared_experts": 2}, {"num_shared_experts": 2}),
        ({"n_group": 1, "topk_group": 1}, {"n_group": 1, "topk_group": 1}),
    ],
    ids=[
        "plain",
        "qkv bias",
        "head size left open",
        "a key head for each",
        "no dense layer",
        "two shared",
        "one group",
    ],
)
def test_llada2_in_other_shapes_is_glm4_moe(publish, glm, fields):
    model = native(glm4_moe(**glm))
    tensors = in_llada2s_layout(model)
    assert ("model.layers.2.attention.query_key_value.bias" in tensors) is ("use_qkv_bias" in fields)
    folder = publish(LLADA2, tensors)
    configure(folder, block_size=8, **fields)
    lm = load(folder)
    assert type(lm.model) is Glm4MoeForCausalLM
    same(lm.logits(IDS), logits_of(model, 8))
    assert (lm.spec.family, lm.spec.block_size, lm.spec.mask_token_id) == ("llada2", 8, 263)
    assert lm.tokenizer.convert_ids_to_tokens(lm.spec.eot_token_id) == "<|role_end|>"


def test_llada2_fields_that_are_absent_have_the_values_of_its_class(publish):
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
    defaults = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0}
    experts = {"n_routed_experts": 16}
    model = native(glm4_moe(**defaults, **experts, rms_norm_eps=1e-5, rope_parameters=rope))
    folder = publish(LLADA2 | {"num_experts": 16}, in_llada2s_layout(model))
    absent = (*defaults, "rms_norm_eps", "rope_theta", "partial_rotary_factor", "use_qkv_bias", "tie_word_embeddings")
    configure(folder, **dict.fromkeys(absent, ABSENT))
    lm = load(folder)
    same(lm.logits(IDS), logits_of(model, 32))
    assert lm.spec.block_size == 32


def test_a_bias_that_the_config_does_not_speak_of_is_refused(publish):
    tensors = in_llada2s_layout(native(glm4_moe(attention_bias=True)))
    with pytest.raises(ModelError, match=r"3 tensors have no place in the model, first 'model\.layers\.0\.attention"):
        load(publish(LLADA2, tensors))


def test_llada2_rotates_the_share_of_a_head_that_its_config_says(publish):
    """The original's class rotates a half where the config doesn't say; so does the mapped model."""
    whole = {"rope_type": "default", "rope_theta": 600_000.0, "partial_rotary_factor": 1.0}
    model = native(glm4_moe(rope_parameters=whole))
    folder = publish(LLADA2 | {"partial_rotary_factor": 1.0, "block_size": 8}, in_llada2s_layout(model))
    same(load(folder).logits(IDS), logits_of(model, 8))
    configure(folder, partial_rotary_factor=ABSENT)
    assert not torch.allclose(load(folder).logits(IDS), logits_of(model, 8), atol=1e-2)


# --- DiffusionGemma: through transformers' own class, without a mask token


@pytest.fixture(scope="module")
def gemma(tokenizer, tmp_path_factory):
    """(model, directory) of a DiffusionGemma."""
    model, folder = make_gemma(context=128), tmp_path_factory.mktemp("gemma")
    save_gemma(model, tokenizer, folder)
    return model, folder


def test_diffusion_gemma_loads_with_the_same_tensors_and_no_mask_token(gemma):
    model, folder = gemma
    lm = load(folder)
    assert type(lm.model) is type(model)
    loaded = lm.model.state_dict()
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    assert (lm.spec.family, lm.spec.mask_token_id) == ("diffusion_gemma", None)
    assert (lm.spec.eos_token_id, lm.spec.pad_token_id, lm.spec.bos_token_id) == (1, 0, 3)
    assert lm.tokenizer.mask_token is None
    assert lm.max_length == 128


def test_diffusion_gemma_keeps_its_generation_settings(gemma, tmp_path):
    folder = Path(shutil.copytree(gemma[1], tmp_path / "gemma"))
    stored = folder / "generation_config.json"
    settings = json.loads(stored.read_text()) if stored.is_file() else {}
    stored.write_text(json.dumps(settings | {"t_max": 0.75}))
    lm = load(folder)
    assert lm.model.generation_config.t_max == 0.75
    lm.save(tmp_path / "saved")
    assert load(tmp_path / "saved").model.generation_config.t_max == 0.75


def test_diffusion_gemma_computes_the_same(gemma):
    model, folder = gemma
    prompt, canvas = IDS[:, :6], IDS[:, 6:14]
    expected = model(input_ids=prompt, decoder_input_ids=canvas).logits
    assert torch.equal(load(folder).model(input_ids=prompt, decoder_input_ids=canvas).logits, expected)


def test_diffusion_gemma_is_saved_and_loaded_again(gemma, tmp_path):
    model, folder = gemma
    lm = load(folder)
    lm.save(tmp_path)
    again = load(tmp_path)
    assert again.spec == lm.spec
    loaded = again.model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_diffusion_gemmas_spec_can_be_had_without_the_weights(gemma):
    tokenizer, spec, blueprint = open_tokenizer(str(gemma[1]))
    assert (spec.family, spec.mask_token_id, tokenizer.mask_token) == ("diffusion_gemma", None, None)
    assert not blueprint.is_decoder


def test_what_needs_a_mask_token_refuses_diffusion_gemma(gemma):
    lm = load(gemma[1])
    with pytest.raises(ModelError, match="diffusion_gemma has no mask token"):
        Sampler(lm).infill([[3, 8]])
    with pytest.raises(ConfigError, match="diffusion_gemma has no mask token"):
        MDLM(lm.spec)


# --- rehearsal with the published sizes, on the meta device


@dataclass(frozen=True)
class Described:
    """A tensor of which nothing but shape and type is known."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def read_into(self, target: torch.Tensor, start: int = 0) -> None:
        raise AssertionError("a rehearsal reads nothing")


Shapes = dict[str, tuple[int, ...]]
NORMS = ("input_layernorm", "post_attention_layernorm")


def llada_8b() -> tuple[str, Shapes]:
    config = """{
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "torch_dtype": "bfloat16", "use_cache": false,
        "auto_map": {"AutoConfig": "configuration_llada.LLaDAConfig", "AutoModel": "modeling_llada.LLaDAModelLM"},
        "d_model": 4096, "n_heads": 32, "n_kv_heads": 32, "n_layers": 32, "mlp_ratio": 4, "mlp_hidden_size": 12288,
        "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096, "weight_tying": false,
        "block_type": "llama", "block_group_size": 1, "activation_type": "silu", "layer_norm_type": "rms",
        "layer_norm_with_affine": true, "bias_for_layer_norm": false, "rms_norm_eps": 1e-05,
        "attention_layer_norm": false, "include_bias": false, "include_qkv_bias": false,
        "rope": true, "rope_theta": 500000.0, "rope_full_precision": true, "alibi": false,
        "input_emb_norm": false, "scale_logits": false,
        "eos_token_id": 126081, "pad_token_id": 126081, "mask_token_id": 126336
    }"""
    trunk, width, inner, vocabulary = "model.transformer", 4096, 12288, 126464
    shapes: Shapes = {f"{trunk}.{name}.weight": (vocabulary, width) for name in ("wte", "ff_out")}
    shapes[f"{trunk}.ln_f.weight"] = (width,)
    for layer in range(32):
        block = f"{trunk}.blocks.{layer}"
        shapes |= {f"{block}.{name}.weight": (width, width) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"{block}.{name}.weight": (inner, width) for name in ("ff_proj", "up_proj")}
        shapes |= {f"{block}.{name}.weight": (width,) for name in ("attn_norm", "ff_norm")}
        shapes[f"{block}.ff_out.weight"] = (width, inner)
    return config, shapes


def dream_7b() -> tuple[str, Shapes]:
    config = """{
        "model_type": "Dream", "architectures": ["DreamModel"], "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": false, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "rope_scaling": null,
        "use_sliding_window": false, "sliding_window": null, "max_window_layers": 28,
        "mask_token_id": 151666, "pad_token_id": 151643
    }"""
    width, inner, keys = 3584, 18944, 4 * 128
    shapes: Shapes = {f"{name}.weight": (152064, width) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (width,)
    for layer in range(28):
        block = f"model.layers.{layer}"
        for part, rows in (("q", width), ("k", keys), ("v", keys)):
            shapes[f"{block}.self_attn.{part}_proj.weight"] = (rows, width)
            shapes[f"{block}.self_attn.{part}_proj.bias"] = (rows,)
        shapes[f"{block}.self_attn.o_proj.weight"] = (width, width)
        shapes |= {f"{block}.mlp.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
        shapes[f"{block}.mlp.down_proj.weight"] = (width, inner)
        shapes |= {f"{block}.{name}.weight": (width,) for name in NORMS}
    return config, shapes


def llada_moe_7b() -> tuple[str, Shapes]:
    config = """{
        "model_type": "llada", "architectures": ["LLaDAMoEModelLM"], "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_lladamoe.LLaDAConfig", "AutoModel": "modeling_lladamoe.Model"},
        "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16, "num_key_value_heads": 16,
        "head_dim": 128, "vocab_size": 157184, "qk_layernorm": true, "tie_word_embeddings": false,
        "dense_intermediate_size": 8192, "expert_intermediate_size": 1024, "shared_expert_intermediate_size": null,
        "num_experts": 64, "num_experts_per_tok": 8, "moe_layer_freq": [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        "moe_router_enable_expert_bias": null, "router_aux_loss_coef": 0.01, "partial_rotary_factor": 1,
        "hidden_act": "silu", "rope_theta": 50000, "rope_scaling": null, "max_position_embeddings": 8192
    }"""
    width, inner = 2048, 1024
    shapes: Shapes = {f"{name}.weight": (157184, width) for name in ("model.embed_tokens", "lm_head")}
    shapes["model.norm.weight"] = (width,)
    for layer in range(16):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{part}_proj.weight": (width, width) for part in "qkvo"}
        shapes |= {f"{block}.self_attn.{part}_norm.weight": (128,) for part in "qk"}
        shapes |= {f"{block}.{name}.weight": (width,) for name in NORMS}
        shapes[f"{block}.mlp.gate.weight"] = (64, width)
        for expert in range(64):
            shapes |= {f"{block}.mlp.experts.{expert}.{name}_proj.weight": (inner, width) for name in ("gate", "up")}
            shapes[f"{block}.mlp.experts.{expert}.down_proj.weight"] = (width, inner)
    return config, shapes


def llada2_mini() -> tuple[str, Shapes]:
    config = """{
        "model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"], "torch_dtype": "bfloat16",
        "auto_map": {"AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig", "AutoModel": "modeling.Model"},
        "hidden_size": 2048, "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 5120, "moe_intermediate_size": 512, "vocab_size": 157184,
        "num_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "num_shared_experts": 1,
        "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "score_function": "sigmoid",
        "use_bias": false, "use_qkv_bias": false, "use_qk_norm": true, "tie_word_embeddings": false,
        "rope_theta": 600000, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-06, "hidden_act": "silu",
        "use_sliding_window": false, "max_position_embeddings": 32768
    }"""
    width, dense, inner, heads, keys, size = 2048, 5120, 512, 16, 4, 128
    shapes: Shapes = {f"{name}.weight": (157184, width) for name in ("model.word_embeddings", "lm_head")}
    shapes["model.norm.weight"] = (width,)
    for layer in range(20):
        block = f"model.layers.{layer}"
        shapes[f"{block}.attention.query_key_value.weight"] = ((heads + 2 * keys) * size, width)
        shapes[f"{block}.attention.dense.weight"] = (width, heads * size)
        shapes |= {f"{block}.attention.{part}_layernorm.weight": (size,) for part in ("query", "key")}
        shapes |= {f"{block}.{name}.weight": (width,) for name in NORMS}
        if layer:
            shapes[f"{block}.mlp.gate.weight"] = (256, width)
            shapes[f"{block}.mlp.gate.expert_bias"] = (256,)
        parts = [f"experts.{expert}." for expert in range(256)] + ["shared_experts."] if layer else [""]
        for part in parts:
            rows = inner if layer else dense
            shapes |= {f"{block}.mlp.{part}{name}_proj.weight": (rows, width) for name in ("gate", "up")}
            shapes[f"{block}.mlp.{part}down_proj.weight"] = (width, rows)
    return config, shapes


@dataclass(frozen=True)
class Rehearsal:
    """A published checkpoint, and the native architecture it is to fill."""

    published: dict[str, Described]
    rules: tuple
    parameters: dict[str, tuple[int, ...]]
    shapes: dict[str, tuple[int, ...]]

    def map(self, tensors: dict[str, Described]):
        return to_native(self.rules, tensors, self.shapes, "there")


@pytest.fixture(scope="module")
def rehearse(tmp_path_factory):
    """`rehearse(llada_8b)`: everything up to the point where tensors would be read."""

    @cache
    def prepare(describe) -> Rehearsal:
        config, shapes = describe()
        folder = tmp_path_factory.mktemp("published")
        (folder / "config.json").write_text(config)
        blueprint = resolve(Checkpoint(str(folder)))
        assert blueprint.is_published
        model = blueprint.skeleton()
        assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
        return Rehearsal(
            {name: Described(shape) for name, shape in shapes.items()},
            blueprint.family.rules,
            {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
            {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        )

    return prepare


every_release = pytest.mark.parametrize("release", [llada_8b, dream_7b, llada_moe_7b, llada2_mini])


@pytest.mark.parametrize(
    ("release", "parameters", "tolerance"),
    [(llada_8b, 8.02e9, 0.001), (dream_7b, 7.62e9, 0.001), (llada_moe_7b, 7.36e9, 0.01), (llada2_mini, 16.26e9, 0.01)],
)
def test_a_release_has_as_many_parameters_as_published(rehearse, release, parameters, tolerance):
    rehearsal = rehearse(release)
    assert sum(map(prod, rehearsal.parameters.values())) == pytest.approx(parameters, rel=tolerance)
    buffers = sum(prod(rehearsal.shapes[name]) for name in rehearsal.shapes.keys() - rehearsal.parameters.keys())
    found = sum(prod(tensor.shape) for tensor in rehearsal.published.values())
    assert found == sum(map(prod, rehearsal.parameters.values())) + buffers


@every_release
def test_every_tensor_of_a_release_has_its_place(rehearse, release):
    rehearsal = rehearse(release)
    made = rehearsal.map(rehearsal.published)
    assert {name: tensor.shape for name, tensor in made.items()} == rehearsal.shapes
    read = {id(piece.source) for tensor in made.values() for piece in tensor.pieces}
    assert read == {id(tensor) for tensor in rehearsal.published.values()}


TOUCHED = [
    (llada_8b, "model.transformer.blocks.31.ff_proj.weight"),
    (llada_8b, "model.transformer.ff_out.weight"),
    (llada_8b, "model.transformer.wte.weight"),
    (dream_7b, "model.layers.27.self_attn.k_proj.bias"),
    (dream_7b, "lm_head.weight"),
    (llada_moe_7b, "model.layers.15.mlp.experts.63.down_proj.weight"),
    (llada_moe_7b, "model.layers.0.mlp.experts.0.up_proj.weight"),
    (llada_moe_7b, "model.layers.3.self_attn.q_norm.weight"),
    (llada2_mini, "model.layers.19.attention.query_key_value.weight"),
    (llada2_mini, "model.layers.7.mlp.experts.255.gate_proj.weight"),
    (llada2_mini, "model.layers.1.mlp.gate.expert_bias"),
    (llada2_mini, "model.layers.5.mlp.shared_experts.up_proj.weight"),
    (llada2_mini, "model.layers.0.mlp.down_proj.weight"),
]


@pytest.mark.parametrize(("release", "name"), TOUCHED)
def test_a_tensor_that_is_missing_from_a_release_is_named(rehearse, release, name):
    rehearsal = rehearse(release)
    rest = {other: tensor for other, tensor in rehearsal.published.items() if other != name}
    with pytest.raises(ModelError) as error:
        rehearsal.map(rest)
    assert f"1 tensors are missing from the weights, first {name!r}" in str(error.value)


@pytest.mark.parametrize(("release", "name"), TOUCHED)
def test_a_tensor_of_another_shape_is_named_with_both(rehearse, release, name):
    rehearsal = rehearse(release)
    first, *others = rehearsal.published[name].shape
    with pytest.raises(ModelError) as error:
        rehearsal.map(rehearsal.published | {name: Described((first + 8, *others))})
    assert f"tensor {name!r} has the shape {[first + 8, *others]}" in str(error.value)
    assert f"config.json asks for {[first, *others]}" in str(error.value)


@pytest.mark.parametrize(
    ("release", "name"),
    [
        (llada_8b, "model.transformer.blocks.0.q_proj.bias"),
        (llada_8b, "model.transformer.blocks.32.q_proj.weight"),
        (llada_8b, "model.transformer.wpe.weight"),
        (llada_8b, "lm_head.weight"),
        (dream_7b, "model.layers.0.self_attn.o_proj.bias"),
        (dream_7b, "model.layers.28.mlp.up_proj.weight"),
        (llada_moe_7b, "model.layers.0.mlp.experts.64.up_proj.weight"),
        (llada_moe_7b, "model.layers.0.shared_expert.up_proj.weight"),
        (llada_moe_7b, "model.layers.0.mlp.expert_bias"),
        (llada2_mini, "model.layers.0.attention.dense.bias"),
        (llada2_mini, "model.layers.0.attention.query_key_value.bias"),
        (llada2_mini, "model.layers.3.mlp.experts.256.gate_proj.weight"),
        (llada2_mini, "model.layers.0.mlp.gate.weight"),
    ],
)
def test_a_tensor_too_many_is_named(rehearse, release, name):
    rehearsal = rehearse(release)
    with pytest.raises(ModelError) as error:
        rehearsal.map(rehearsal.published | {name: Described((7,))})
    assert f"1 tensors have no place in the model, first {name!r} [7]" in str(error.value)
