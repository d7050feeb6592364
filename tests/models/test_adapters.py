"""Adapters and quantized weights: what trains, what is saved, what belongs together, for every published family."""

import json
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.adapters import add_adapter, add_lora, base_of, has_adapter, merge, restore
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.defaults import sampler_settings
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import check_path, load, open_tokenizer

MODELS = ["llada", "llada_moe", "dream", "a2d_qwen3", "a2d_qwen2", "llada2", "llada21", "modernbert"]
IDS = torch.randint(19, 256, (2, 24), generator=torch.Generator().manual_seed(0))
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj"}

every_model = pytest.mark.parametrize("model", MODELS)


@pytest.fixture(scope="module")
def path(golden):
    """`path("dream")`: where a reference checkpoint lies."""
    return lambda model: golden / model / "checkpoint"


@pytest.fixture
def adapted(path):
    """`adapted("dream")`: a reference model with a fresh adapter."""

    def make(model: str, seed: int = 0, **settings) -> DiffusionLM:
        return add_lora(load(path(model)), LoRAConfig(**{"rank": 4, **settings}), seed)

    return make


def logits_of(lm: DiffusionLM) -> torch.Tensor:
    with torch.no_grad():
        return lm.logits(IDS).float()


def train(lm: DiffusionLM, seed: int = 5, scale: float = 0.1) -> DiffusionLM:
    """Gives the adapter an effect, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in lm.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return lm


def adapter_weights(lm: DiffusionLM) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in lm.model.state_dict().items() if "lora_" in name}


def targets_of(lm: DiffusionLM) -> set[str]:
    """Names of the modules that carry an update."""
    return {name for name, module in lm.model.get_base_model().named_modules() if getattr(module, "lora_A", None)}


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return F.cosine_similarity(left.flatten(), right.flatten(), dim=0).item()


# --- which weights an adapter updates

RECIPES = {
    **{model: {f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in ATTENTION} for model in MODELS[:5]},
    **{
        model: {f"model.layers.{i}.self_attn.{part}" for i in range(3) for part in ATTENTION}
        | {f"model.layers.0.mlp.{part}" for part in MLP}
        | {f"model.layers.{i}.mlp.shared_experts.{part}" for i in (1, 2) for part in MLP}
        for model in ("llada2", "llada21")
    },
}
for dense in ("llada", "dream", "a2d_qwen3", "a2d_qwen2"):
    RECIPES[dense] |= {f"model.layers.{i}.mlp.{part}" for i in range(2) for part in MLP}


@pytest.mark.parametrize("model", RECIPES)
def test_a_familys_own_recipe_is_the_default(adapted, model):
    """LLaDA-MoE: attention only; LLaDA2: attention, dense and shared MLPs, but neither router nor routed experts."""
    assert targets_of(adapted(model)) == RECIPES[model]


def test_llada_moe_adapts_attention_only_though_it_may_have_a_dense_mlp(make_lm):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
    lm = make_lm("qwen3_moe", extra=experts)
    assert type(lm.model.model.layers[0].mlp.up_proj) is nn.Linear
    adapted = add_lora(DiffusionLM(lm.model, lm.tokenizer, replace(lm.spec, family="llada_moe")), LoRAConfig(rank=2), 0)
    assert targets_of(adapted) == {f"model.layers.{i}.self_attn.{part}" for i in range(2) for part in ATTENTION}


def test_an_encoder_adapts_every_linear_layer_of_its_trunk(adapted):
    lm = adapted("modernbert")
    base = lm.model.get_base_model()
    trunk = {name for name, module in base.named_modules() if name.startswith("model.") and hasattr(module, "lora_A")}
    plain = {name for name, module in base.named_modules() if type(module) is nn.Linear and "lora" not in name}
    assert len(trunk) == 16  # four in each of four layers
    assert not {name for name in plain if name.startswith("model.") and not name.endswith("base_layer")}


@pytest.mark.parametrize("targets", [None, ["all-linear"]], ids=["default", "all-linear"])
@every_model
def test_the_head_and_the_embeddings_are_never_adapted(adapted, model, targets):
    lm = adapted(model, targets=targets)
    assert type(lm.model.get_output_embeddings()) is nn.Linear
    assert type(lm.model.get_input_embeddings()) is nn.Embedding
    assert targets_of(lm)


def test_the_targets_may_be_named(adapted):
    lm = adapted("dream", targets=["q_proj", "1.mlp.up_proj"])
    assert targets_of(lm) == {
        *("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up_proj"),
    }


@pytest.mark.parametrize(
    ("model", "targets", "expected"),
    [
        ("llada2", ["all-linear"], RECIPES["llada2"]),
        ("llada_moe", ["all-linear"], RECIPES["llada_moe"]),
        ("llada2", ["q_proj", "up_proj"], {name for name in RECIPES["llada2"] if name.endswith(("q_proj", "up_proj"))}),
        (
            "llada2",
            ["o_proj", "down_proj"],
            {name for name in RECIPES["llada2"] if name.endswith(("o_proj", "down_proj"))},
        ),
    ],
)
def test_targets_of_a_mixture_are_linear_modules_not_routed_experts_or_router(adapted, model, targets, expected):
    """The routed experts of a layer are one parameter, and no module has the name of one of their projections."""
    assert targets_of(adapted(model, targets=targets)) == expected


def test_rank_alpha_and_dropout_are_those_asked_for(adapted):
    lm = adapted("dream", rank=3, alpha=6.0, dropout=0.25)
    layer = lm.model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 64)
    assert layer.scaling["default"] == 2.0
    assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize("targets", [["nothing"], ["lm_head.weight"], ["q"]])
def test_targets_that_fit_no_module_are_refused(path, targets):
    with pytest.raises(ModelError, match=r"lora\.targets \[.*\] fit no module of Qwen2ForCausalLM") as refused:
        add_lora(load(path("dream")), LoRAConfig(rank=2, targets=targets), 0)
    assert repr(targets) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": -4}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": -1.0}, "alpha"),
        ({"alpha": float("nan")}, "alpha"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"dropout": float("nan")}, "dropout"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, field):
    with pytest.raises(ConfigError) as refused:
        LoRAConfig(**settings)
    assert refused.value.field == field


def test_no_rank_means_no_adapter():
    assert LoRAConfig().rank is None
    assert LoRAConfig(rank=1, dropout=0.0).rank == 1


# --- training


@every_model
def test_a_fresh_adapter_changes_nothing(adapted, golden_lm, model):
    lm = adapted(model)
    torch.testing.assert_close(logits_of(lm), logits_of(golden_lm(model)), rtol=0, atol=1e-5)
    assert has_adapter(lm.model)
    assert not has_adapter(golden_lm(model).model)
    assert lm.spec == golden_lm(model).spec
    assert (lm.architecture, lm.max_length) == (golden_lm(model).architecture, golden_lm(model).max_length)


@every_model
def test_the_adapter_alone_trains(adapted, golden_lm, model):
    lm = train(adapted(model))
    before = adapter_weights(lm)
    trainable = {name: parameter for name, parameter in lm.model.named_parameters() if parameter.requires_grad}
    assert trainable.keys() == before.keys()
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    lm.logits(IDS, positions=torch.tensor([3, 30])).square().mean().backward()
    optimizer.step()
    assert all(not torch.equal(before[name], value) for name, value in adapter_weights(lm).items())
    bare = {name.replace(".base_layer", ""): value for name, value in lm.model.get_base_model().state_dict().items()}
    for name, value in golden_lm(model).model.state_dict().items():
        assert torch.equal(bare[name], value), name


@pytest.mark.parametrize("model", ["dream", "llada2"])
def test_the_same_seed_gives_the_same_adapter_and_another_one_another(adapted, model):
    first = adapter_weights(adapted(model, seed=3))
    torch.rand(5)
    again, other = adapter_weights(adapted(model, seed=3)), adapter_weights(adapted(model, seed=4))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    assert not any(torch.equal(value, other[name]) for name, value in first.items() if "lora_A" in name)


def test_the_global_generator_is_left_alone(path):
    lm = load(path("dream"))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    add_lora(lm, LoRAConfig(rank=2), seed=1)
    assert torch.equal(torch.rand(3), expected)


# --- saved, loaded, merged


@every_model
def test_a_saved_adapter_finds_its_base(adapted, golden_lm, tmp_path, model):
    lm = train(adapted(model))
    lm.save(tmp_path)
    assert not (tmp_path / "config.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(adapter_weights(lm))
    again = load(tmp_path)
    assert torch.equal(logits_of(again), logits_of(lm))
    assert not torch.allclose(logits_of(again), logits_of(golden_lm(model)), atol=0.1)
    assert again.spec == lm.spec
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert not again.model.training


@every_model
def test_a_saved_adapter_may_be_put_on_its_base(adapted, path, tmp_path, model):
    lm = train(adapted(model))
    lm.save(tmp_path)
    assert torch.equal(logits_of(load(path(model), adapter=tmp_path)), logits_of(lm))
    assert torch.equal(logits_of(add_adapter(load(path(model)), str(tmp_path))), logits_of(lm))


def test_an_adapter_names_its_base_from_the_root(adapted, path, tmp_path, monkeypatch):
    monkeypatch.chdir(path("dream").parent)
    lm = train(add_lora(load("checkpoint"), LoRAConfig(rank=2), 0))
    lm.save(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert base_of(str(tmp_path)) == str(path("dream").resolve())
    assert torch.equal(logits_of(load(".")), logits_of(lm))


@every_model
def test_an_adapters_settings_are_those_of_its_base(adapted, path, tmp_path, model):
    lm = adapted(model)
    lm.save(tmp_path)
    check_path(str(tmp_path))
    tokenizer, spec, _ = open_tokenizer(str(tmp_path))
    assert spec == lm.spec
    assert tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert sampler_settings(str(tmp_path)) == dict(lm.spec.sampler)


def test_an_adapter_of_a_model_that_says_by_its_name_that_it_sees_blocks_sees_them_too(path, tmp_path):
    shutil.copytree(path("a2d_qwen3"), tmp_path / "qwen-bd3lm")
    lm = add_lora(load(tmp_path / "qwen-bd3lm"), LoRAConfig(rank=2), 0)
    lm.save(tmp_path / "adapter")
    assert load(tmp_path / "adapter").spec == lm.spec
    assert open_tokenizer(str(tmp_path / "adapter"))[1] == lm.spec
    assert sampler_settings(str(tmp_path / "adapter")) == dict(lm.spec.sampler) == {"block_size": 32, "cache": "block"}


@every_model
def test_a_merged_model_computes_what_the_adapter_did(adapted, tmp_path, model):
    lm = train(adapted(model))
    expected = logits_of(lm)
    merged = merge(lm)
    assert not has_adapter(merged.model)
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5 * expected.std().item())
    merged.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits_of(again), logits_of(merged))
    assert again.spec == lm.spec


@every_model
def test_an_adapter_is_restored_in_place(adapted, tmp_path, model):
    lm = train(adapted(model))
    lm.save(tmp_path)
    other = train(adapted(model, seed=9), seed=10)
    assert not torch.allclose(logits_of(other), logits_of(lm), atol=0.1)
    restore(other, tmp_path)
    assert torch.equal(logits_of(other), logits_of(lm))


@every_model
def test_a_whole_model_is_restored_in_place(golden_lm, path, tmp_path, model):
    golden_lm(model).save(tmp_path)
    lm = load(path(model))
    held = [parameter.data_ptr() for parameter in lm.model.parameters()]
    with torch.no_grad():
        for value in lm.model.state_dict().values():
            value.add_(1.0)
    restore(lm, tmp_path)
    assert torch.equal(logits_of(lm), logits_of(golden_lm(model)))
    assert [parameter.data_ptr() for parameter in lm.model.parameters()] == held


def test_an_adapter_on_a_bfloat16_model_is_off_by_rounding_only(adapted, path, tmp_path):
    lm = train(adapted("dream"))
    lm.save(tmp_path)
    half = load(path("dream"), dtype="bfloat16", adapter=tmp_path)
    assert half.model.get_input_embeddings().weight.dtype == torch.bfloat16
    error = (logits_of(half) - logits_of(lm)).abs() / logits_of(lm).std()
    assert 0 < error.median() < 8 * 2**-8


# --- DoRA, and modules trained whole

TIED_AND_UNTIED = {"bert": ["decoder"], "modernbert": ["tok_embeddings"], "qwen3": ["embed_tokens", "lm_head"]}
"""Architectures, and how the modules to train are named: one of two that are tied, or both of two that aren't."""
tied_and_untied = pytest.mark.parametrize("architecture", TIED_AND_UNTIED)


@pytest.fixture(scope="module")
def base_of_kind(make_lm, tmp_path_factory):
    """`base_of_kind("bert")`: the directory of a small model."""

    @cache
    def make(architecture: str) -> Path:
        folder = tmp_path_factory.mktemp("base") / architecture
        make_lm(architecture).save(folder)
        return folder

    return make


def with_tables(base: Path, seed: int = 0, **settings) -> DiffusionLM:
    """A model with a DoRA adapter whose embeddings and head train too."""
    names = TIED_AND_UNTIED[base.name]
    return add_lora(load(base), LoRAConfig(**{"rank": 4, "dora": True, "trained_modules": names} | settings), seed)


def tables_of(lm: DiffusionLM) -> tuple[nn.Module, nn.Module]:
    base = lm.model.get_base_model() if has_adapter(lm.model) else lm.model
    return base.get_input_embeddings(), base.get_output_embeddings()


def steps_of_training(lm: DiffusionLM, steps: int = 3) -> DiffusionLM:
    optimizer = torch.optim.AdamW([weight for weight in lm.model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(steps):
        F.cross_entropy(lm.logits(IDS, positions=torch.arange(12)), torch.arange(12) + 50).backward()
        optimizer.step()
        optimizer.zero_grad()
    return lm


@tied_and_untied
def test_a_fresh_dora_adapter_with_trained_tables_changes_nothing(base_of_kind, architecture):
    base = base_of_kind(architecture)
    lm = with_tables(base)
    torch.testing.assert_close(logits_of(lm), logits_of(load(base)), rtol=0, atol=1e-5)
    embeddings, head = tables_of(lm)
    assert (embeddings.weight is head.weight) == (architecture != "qwen3")
    assert (head.bias is None) == (architecture == "qwen3")


@tied_and_untied
def test_a_dora_adapter_and_trained_tables_are_saved_reloaded_restored_and_merged(base_of_kind, tmp_path, architecture):
    base = base_of_kind(architecture)
    lm = steps_of_training(with_tables(base))
    expected, tied = logits_of(lm), architecture != "qwen3"
    assert not torch.allclose(expected, logits_of(load(base)), atol=0.1)
    lm.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        base
    )

    again = load(tmp_path / "adapter")
    assert torch.equal(logits_of(again), expected)
    other = steps_of_training(with_tables(base, seed=9), steps=1)
    restore(other, tmp_path / "adapter")
    assert torch.equal(logits_of(other), expected)

    merged = merge(again)
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=1e-5)
    merged.save(tmp_path / "merged")
    plain = load(tmp_path / "merged")
    assert torch.equal(logits_of(plain), logits_of(merged))
    for held in (again, other, merged, plain):
        embeddings, head = tables_of(held)
        assert (embeddings.weight is head.weight) == tied


@tied_and_untied
def test_plain_peft_opens_a_saved_adapter(base_of_kind, tmp_path, architecture):
    from peft import PeftModel

    lm = steps_of_training(with_tables(base_of_kind(architecture)))
    lm.save(tmp_path)
    plain = load(base_of_kind(architecture))
    opened = DiffusionLM(PeftModel.from_pretrained(plain.model, str(tmp_path)), plain.tokenizer, plain.spec)
    assert torch.equal(logits_of(opened), logits_of(lm))


@tied_and_untied
def test_the_adapter_and_the_trained_modules_alone_train(base_of_kind, architecture):
    lm = with_tables(base_of_kind(architecture))
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    steps_of_training(lm, steps=2)
    moved = {name for name, value in lm.model.state_dict().items() if not torch.equal(before[name], value)}
    trained = {name for name in before if "lora_" in name or "modules_to_save" in name}
    assert moved <= trained
    assert {name for name in trained - moved if "position" not in name} == set()


def test_a_trained_module_is_not_adapted_too(base_of_kind):
    lm = with_tables(base_of_kind("qwen3"), targets=["all-linear"], trained_modules=["1.mlp", "norm"])
    assert not {name for name in targets_of(lm) if "layers.1.mlp" in name}
    assert {name for name in targets_of(lm) if "layers.0.mlp" in name}
    trained = {name for name, parameter in lm.model.named_parameters() if parameter.requires_grad}
    assert sum("layers.1.mlp.modules_to_save" in name for name in trained) == 3
    assert sum(name.endswith("model.norm.modules_to_save.default.weight") for name in trained) == 1


def test_a_tied_table_is_saved_once_for_each_of_its_names_as_peft_does(base_of_kind, tmp_path):
    with_tables(base_of_kind("bert")).save(tmp_path)
    names = [name for name in load_file(tmp_path / "adapter_model.safetensors") if "lora_" not in name]
    assert sorted(name.rsplit(".", 2)[1] for name in names) == ["decoder", "decoder", "word_embeddings"]


@pytest.mark.parametrize(
    ("architecture", "names", "said"),
    [
        ("qwen3", ["head"], r"Qwen3ForCausalLM has no module 'head'; .*model\.embed_tokens or lm_head"),
        ("bert", ["cls"], r"cls holds weights tied to those of another module; name cls\.predictions\.decoder itself"),
        ("bert", ["bert.embeddings"], r"name bert\.embeddings\.word_embeddings itself"),
    ],
)
def test_modules_that_cannot_be_trained_whole_are_refused(base_of_kind, architecture, names, said):
    with pytest.raises(ModelError, match=r"^lora\.trained_modules: .*" + said):
        with_tables(base_of_kind(architecture), trained_modules=names)


# --- what doesn't belong together


def refused(path: Path, adapter: Path) -> str:
    with pytest.raises(ModelError) as error:
        load(path, adapter=adapter)
    assert "\n" not in str(error.value)
    assert str(adapter) in str(error.value)
    return str(error.value)


@pytest.fixture
def of_dream(adapted, tmp_path):
    """The directory of an adapter made for the reference's Dream."""
    train(adapted("dream")).save(tmp_path / "of_dream")
    return tmp_path / "of_dream"


def test_an_adapter_of_another_family_is_refused_though_the_shapes_are_the_same(of_dream, path):
    said = refused(path("a2d_qwen2"), of_dream)
    assert f"was made for another base model, {path('dream')}" in said
    assert f"{path('a2d_qwen2')} has family 'a2d-qwen2', expected 'dream'" in said


def test_an_adapter_of_another_family_is_refused_though_the_weights_are_the_same(of_dream, path, tmp_path):
    """They are read in another way: Dream's logits predict the token to their right."""
    other = Path(shutil.copytree(path("dream"), tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    config |= {"model_type": "a2d-qwen2", "architectures": ["A2DQwen2LMHeadModel"]}
    (other / "config.json").write_text(json.dumps(config))
    assert f"{other} has family 'a2d-qwen2', expected 'dream'" in refused(other, of_dream)


def test_an_adapter_of_another_architecture_is_refused(of_dream, path):
    said = refused(path("llada2"), of_dream)
    assert "architecture 'Glm4MoeForCausalLM', expected 'Qwen2ForCausalLM'" in said
    assert "num_hidden_layers 3, expected 2" in said


def test_an_adapter_of_other_weights_is_refused_though_everything_else_is_the_same(of_dream, path, tmp_path):
    other = Path(shutil.copytree(path("dream"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert f"{other} has other weights" in refused(other, of_dream)


def test_an_adapter_of_other_sizes_is_refused(make_lm, tmp_path):
    for name, sizes in {"narrow": {}, "wide": {"hidden_size": 64}, "deep": {"num_hidden_layers": 3}}.items():
        make_lm("llama", **sizes).save(tmp_path / name)
    train(add_lora(load(tmp_path / "narrow"), LoRAConfig(rank=2), 0)).save(tmp_path / "adapter")
    assert "has hidden_size 64, expected 32" in refused(tmp_path / "wide", tmp_path / "adapter")
    assert "has num_hidden_layers 3, expected 2" in refused(tmp_path / "deep", tmp_path / "adapter")


def test_an_adapter_fits_its_base_in_another_place_type_and_layout(of_dream, path, golden_lm, tmp_path):
    expected = logits_of(load(of_dream))
    golden_lm("dream").save(tmp_path / "native")
    shutil.copytree(path("dream"), tmp_path / "copy")
    for place in ("native", "copy"):
        assert torch.equal(logits_of(load(tmp_path / place, adapter=of_dream)), expected)
    assert cosine(logits_of(load(path("dream"), dtype="float16", adapter=of_dream)), expected) > 0.999


def test_an_adapter_that_others_made_is_held_to_its_shapes(path, tmp_path):
    """Without a note of what its base looks like, PEFT's own check is all there is."""
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(load(path("dream")).model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"]))
    made.save_pretrained(tmp_path)
    load(path("a2d_qwen2"), adapter=tmp_path)  # the very same shapes
    said = refused(path("a2d_qwen3"), tmp_path)
    assert f"made for {path('dream')}, doesn't fit {path('a2d_qwen3')} (Qwen3ForCausalLM): size mismatch" in said


def test_an_adapter_without_the_name_of_its_base_goes_on_the_one_it_is_put_on(of_dream, path):
    expected = logits_of(load(of_dream))
    settings = json.loads((of_dream / "adapter_config.json").read_text())
    (of_dream / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": None}))
    with pytest.raises(ModelError, match=r"names no base model; name it yourself: --model\.path BASE --model\.adapter"):
        load(of_dream)
    assert torch.equal(logits_of(load(path("dream"), adapter=of_dream)), expected)


def test_an_adapter_whose_base_is_gone_is_refused_with_its_name(of_dream, tmp_path):
    settings = json.loads((of_dream / "adapter_config.json").read_text())
    gone = str(tmp_path / "gone")
    (of_dream / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": gone}))
    for use in (load, check_path, open_tokenizer):
        with pytest.raises(ModelError, match=gone):
            use(str(of_dream))


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "is not valid JSON"), ("[]", "holds a list; expected a mapping"), ("{}", "doesn't fit")],
)
def test_a_broken_adapter_config_is_refused(of_dream, path, text, said):
    (of_dream / "adapter_config.json").write_text(text)
    assert said in refused(path("dream"), of_dream)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_broken_note_of_the_base_is_refused(of_dream, path, text):
    (of_dream / "diffusion_base.json").write_text(text)
    refused(path("dream"), of_dream)


def test_an_adapter_without_weights_is_refused(of_dream, path):
    (of_dream / "adapter_model.safetensors").unlink()
    assert "the adapter, made for" in refused(path("dream"), of_dream)


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_adapter_weights_are_refused(of_dream, path, kept):
    file = of_dream / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * kept)])
    refused(path("dream"), of_dream)


def test_an_adapter_that_lacks_some_of_its_weights_is_refused(of_dream, path):
    weights = load_file(of_dream / "adapter_model.safetensors")
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, of_dream / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(path("dream"), of_dream)


def test_a_directory_without_an_adapter_is_refused(path, tmp_path):
    assert f"{tmp_path}: no adapter_config.json in it; expected a PEFT adapter directory" == refused(
        path("dream"), tmp_path
    )


# --- 4 and 8 bits

KINDS = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}
NARROW = ["llada2", "llada21", "modernbert"]
"""Reference models with matrices 32 or 96 wide, where the 4-bit kernels of some CPUs take multiples of 64 only."""

both_kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def base(path, make_lm, tmp_path_factory):
    """`base("dream", "4bit")`: a reference checkpoint, or a wider model of the same family where that is too narrow."""

    @cache
    def wider(model: str) -> Path:
        sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128}
        # every expert is used, so that rounding can't send a token to another one
        experts = {"moe_intermediate_size": 64, "n_routed_experts": 4, "num_experts_per_tok": 4}
        groups = {"n_group": 2, "topk_group": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
        if model == "modernbert":
            lm = make_lm("modernbert", **sizes)
        else:
            lm = make_lm("glm4_moe", **sizes, extra=experts | groups | {"use_qk_norm": True})
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in lm.model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        folder = tmp_path_factory.mktemp("wider") / model
        blocks = {} if model == "modernbert" else {"attention": "block_causal", "block_size": 32}
        DiffusionLM(lm.model, lm.tokenizer, replace(lm.spec, family=model, **blocks)).save(folder)
        return folder

    return lambda model, kind: wider(model) if kind == "4bit" and model in NARROW else path(model)


@pytest.fixture(scope="module")
def quantized(base):
    """`quantized("dream", "4bit")`."""
    return cache(lambda model, kind: load(base(model, kind), quantization=kind))


@pytest.fixture(scope="module")
def exact(base):
    """The same model as `quantized`, in float32."""
    return cache(lambda model, kind: load(base(model, kind)))


@both_kinds
@every_model
def test_a_quantized_model_computes_nearly_the_same(quantized, exact, model, kind):
    rough, expected = quantized(model, kind), exact(model, kind)
    assert not torch.equal(logits_of(rough), logits_of(expected))
    assert cosine(logits_of(rough), logits_of(expected)) > 0.9
    assert rough.spec == expected.spec
    assert rough.spec.family == model.replace("a2d_", "a2d-")


@both_kinds
@every_model
def test_head_and_embeddings_are_not_quantized(quantized, exact, model, kind):
    for table in ("get_input_embeddings", "get_output_embeddings"):
        held, expected = (getattr(lm(model, kind).model, table)() for lm in (quantized, exact))
        assert type(held) is type(expected)
        assert torch.equal(held.weight.float(), expected.weight)
    assert KINDS[kind] in {type(module).__name__ for module in quantized(model, kind).model.modules()}


@both_kinds
@pytest.mark.parametrize("model", ["llada", "dream", "a2d_qwen3", "modernbert"])
def test_every_linear_layer_of_the_trunk_is_quantized(quantized, model, kind):
    layers = quantized(model, kind).model.base_model.layers
    kinds = [type(module).__name__ for module in layers.modules() if isinstance(module, nn.Linear)]
    assert kinds
    assert set(kinds) == {KINDS[kind]}


@both_kinds
@every_model
def test_chosen_positions_of_a_quantized_model_agree(quantized, model, kind):
    lm, chosen = quantized(model, kind), torch.tensor([1, 20, 40])
    with torch.no_grad():
        whole, some = lm.logits(IDS, shift=False), lm.logits(IDS, positions=chosen, shift=False)
    torch.testing.assert_close(some, whole.flatten(0, 1)[chosen], rtol=0, atol=1e-4)


@both_kinds
@every_model
def test_an_adapter_goes_on_a_quantized_base(base, quantized, tmp_path, model, kind):
    lm = train(add_lora(load(base(model, kind)), LoRAConfig(rank=4), seed=0))
    lm.save(tmp_path)
    rough = load(base(model, kind), quantization=kind, adapter=tmp_path)
    assert cosine(logits_of(rough), logits_of(lm)) > 0.9
    assert not torch.allclose(logits_of(rough), logits_of(quantized(model, kind)), atol=0.1)
    assert targets_of(rough) == targets_of(lm)


@both_kinds
@every_model
def test_an_adapter_is_trained_on_a_quantized_base_and_saved(base, tmp_path, model, kind):
    lm = train(add_lora(load(base(model, kind), quantization=kind), LoRAConfig(rank=4), seed=0))
    lm.model.train()
    lm.logits(IDS, positions=torch.tensor([3, 30])).float().square().mean().backward()
    lm.model.eval()
    trainable = {name: value for name, value in lm.model.named_parameters() if value.requires_grad}
    assert trainable.keys() == adapter_weights(lm).keys()
    assert all(value.grad.abs().max() > 0 for value in trainable.values())
    lm.save(tmp_path)
    again = load(base(model, kind), quantization=kind, adapter=tmp_path)
    assert cosine(logits_of(again), logits_of(lm)) > 0.999
    assert cosine(logits_of(load(tmp_path)), logits_of(lm)) > 0.9  # on the base in full precision


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("model", ["llada", "dream", "a2d_qwen3", "modernbert"])
def test_gradients_through_a_quantized_base_are_those_of_its_loss(base, model, kind):
    """Along any direction, the loss changes as they say; before it is trained, the model has been evaluated."""
    lm = train(add_lora(load(base(model, kind or "4bit"), quantization=kind), LoRAConfig(rank=4), seed=0))
    logits_of(lm)
    lm.model.train()

    def loss() -> torch.Tensor:
        return lm.logits(IDS, positions=torch.arange(0, 48, 5)).float().square().mean()

    loss().backward()
    weights = [parameter for parameter in lm.model.parameters() if parameter.requires_grad]
    generator, step = torch.Generator().manual_seed(1), 1e-3
    predicted, measured = [], []
    with torch.no_grad():
        for _ in range(6):
            ways = [torch.randn(weight.shape, generator=generator) for weight in weights]
            predicted.append(sum((weight.grad * way).sum().item() for weight, way in zip(weights, ways, strict=True)))
            losses = []
            for sign in (1, -1):
                for weight, way in zip(weights, ways, strict=True):
                    weight.add_(way, alpha=sign * step)
                losses.append(loss().item())
                for weight, way in zip(weights, ways, strict=True):
                    weight.sub_(way, alpha=sign * step)
            measured.append((losses[0] - losses[1]) / (2 * step))
    predicted, measured = torch.tensor(predicted), torch.tensor(measured)
    assert (predicted - measured).norm() < 0.05 * measured.norm()


@pytest.mark.parametrize("model", NARROW)
def test_a_width_that_this_machines_4_bit_kernels_cannot_take_is_refused(path, golden_lm, model):
    """On other machines it works."""
    try:
        lm = load(path(model), quantization="4bit")
    except ModelError as error:
        assert "4bit" in str(error)
    else:
        assert cosine(logits_of(lm), logits_of(golden_lm(model))) > 0.8


# --- places


@pytest.mark.parametrize("place", ["cpu", "auto", {"": "cpu"}], ids=str)
@every_model
def test_a_device_map_changes_nothing(path, golden_lm, model, place):
    lm = load(path(model), device_map=place)
    assert torch.equal(logits_of(lm), logits_of(golden_lm(model)))
    assert lm.device.type == "cpu"
    assert lm.spec == golden_lm(model).spec


def test_a_spread_model_takes_an_adapter(adapted, path, tmp_path):
    lm = train(adapted("dream"))
    lm.save(tmp_path)
    assert torch.equal(logits_of(load(path("dream"), device_map="auto", adapter=tmp_path)), logits_of(lm))


# --- what a review found


def test_an_adapter_on_top_of_an_adapter_is_refused(adapted):
    with pytest.raises(ModelError, match="has an adapter already; merge it"):
        add_lora(adapted("dream"), LoRAConfig(rank=2), seed=0)


@pytest.mark.parametrize("part", ["mlp", "layernorm", "lm_head"])
def test_a_base_of_the_same_sizes_and_other_weights_is_refused(path, adapted, tmp_path, part):
    adapted("dream").save(tmp_path / "adapter")
    other = load(path("dream"))
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if part in name:
                parameter.mul_(1.01)
    with pytest.raises(ModelError, match="made for another base model"):
        add_adapter(other, str(tmp_path / "adapter"))


def test_an_adapter_whose_base_is_an_adapter_is_refused(adapted, tmp_path):
    adapted("dream").save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "adapter")}))
    with pytest.raises(ModelError, match="is an adapter itself"):
        load(tmp_path / "adapter")


def test_an_adapter_whose_base_is_gone_says_what_to_do(adapted, tmp_path):
    adapted("dream").save(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "/gone/model"}))
    with pytest.raises(ModelError, match=r"base model is not there: /gone/model; .*--model.path BASE"):
        load(tmp_path / "adapter")
