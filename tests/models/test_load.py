"""`load`: what it accepts, what it adds, and what it refuses with which words."""

import json
from pathlib import Path

import pytest
import torch

import dllm_ray
from dllm_ray.errors import ModelError
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.load import check_path, load, open_tokenizer

IDS = torch.arange(24).reshape(3, 8)
ARCHITECTURES = ["bert", "modernbert", "roberta", "llama", "qwen3", "gpt2", "opt"]


@pytest.fixture
def saved(make_lm, tmp_path):
    """A directory with a llama in it."""
    folder = tmp_path / "model"
    make_lm("llama", seed=2).save(folder)
    return folder


def configure(folder: Path, **changes) -> None:
    """Changes fields of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    config = {name: value for name, value in (config | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def without_tensor(folder: Path, name: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# --- what comes back


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_saved_model_loads_with_the_same_logits_spec_and_tokenizer(make_lm, tmp_path, architecture):
    lm = make_lm(architecture, seed=2)
    lm.save(tmp_path)
    loaded = dllm_ray.load(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.logits(IDS), lm.logits(IDS))
    assert loaded.spec == lm.spec
    assert loaded.max_length == lm.max_length
    assert loaded.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    assert loaded.tokenizer.chat_template == lm.tokenizer.chat_template
    assert not loaded.model.training


def test_a_stored_spec_wins_over_what_the_tokenizer_says(saved):
    stored = json.loads((saved / "config.json").read_text())["diffusion"]
    configure(saved, diffusion=stored | {"family": "special", "mask_token_id": 99, "shift_logits": True})
    spec = load(saved).spec
    assert (spec.family, spec.mask_token_id, spec.shift_logits) == ("special", 99, True)


def test_a_checkpoint_without_a_spec_gets_one_from_its_tokenizer(saved, make_lm):
    configure(saved, diffusion=None)
    assert load(saved).spec == make_lm("llama").spec


def test_the_spec_can_be_had_without_the_weights(saved):
    _, spec, blueprint = open_tokenizer(str(saved))
    assert spec == load(saved).spec
    assert blueprint.max_length == 64


def test_an_ordinary_causal_checkpoint_becomes_bidirectional(saved):
    configure(saved, is_causal=None, diffusion=None)
    lm = load(saved)
    other = IDS.clone()
    other[:, -1] = 99
    with torch.no_grad():
        assert not torch.allclose(lm.logits(IDS)[:, 0], lm.logits(other)[:, 0], atol=1e-6)


def test_a_checkpoint_saved_as_a_causal_model_stays_one_where_its_family_knows_both(tmp_path, tokenizer):
    from transformers import BertConfig, BertLMHeadModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), is_decoder=True, **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert type(load(tmp_path).model) is BertLMHeadModel


@pytest.mark.parametrize(
    ("dtype", "held"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("auto", torch.float32)]
)
def test_weights_are_held_in_the_type_asked_for(saved, dtype, held):
    assert load(saved, dtype=dtype).model.dtype == held


def test_a_checkpoint_keeps_its_own_type_with_auto(make_lm, tmp_path):
    lm = make_lm("bert")
    load_from = tmp_path / "half"
    lm.save(tmp_path / "whole")
    half = load(tmp_path / "whole", dtype="bfloat16")
    half.save(load_from)
    assert load(load_from, dtype="auto").model.dtype == torch.bfloat16


def test_a_trunk_without_a_head_loads_with_a_warning(make_lm, tmp_path, caplog):
    lm = make_lm("bert")
    lm.save(tmp_path)
    lm.model.bert.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        load(tmp_path)
    assert "has no language-model head" in caplog.text


def test_a_home_directory_may_be_written_as_a_tilde(saved, monkeypatch):
    monkeypatch.setenv("HOME", str(saved.parent))
    assert load("~/model").spec == load(saved).spec
    assert ModelConfig(path="~/model", adapter="~/lora").path == str(saved)


# --- a mask token for those without


def causal_directory(folder: Path, spare_rows: int, tied: bool) -> int:
    """An ordinary causal llama whose tokenizer has no mask token; returns how many tokens it has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    rows = len(tokenizer) + spare_rows
    LlamaForCausalLM(LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spare_rows", [0, 16], ids=["full table", "spare rows"])
def test_a_missing_mask_token_is_added_with_the_mean_of_all_embeddings(tmp_path, spare_rows, tied):
    known = causal_directory(tmp_path, spare_rows, tied)
    lm = load(tmp_path)
    assert lm.spec.mask_token_id == lm.tokenizer.mask_token_id == known
    tables = [lm.model.get_input_embeddings().weight, lm.model.get_output_embeddings().weight]
    assert (tables[0] is tables[1]) is tied
    for table in tables:
        assert table.shape[0] == known + max(spare_rows, 1)
        torch.testing.assert_close(table[known], table[:known].mean(dim=0))


def test_the_bias_of_an_added_mask_token_is_the_mean_of_all(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    known = causal_directory(tmp_path, 0, tied=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=known, **sizes))
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path)
    bias = load(tmp_path).model.get_output_embeddings().bias
    torch.testing.assert_close(bias[known], bias[:known].mean())


def test_an_added_mask_token_stays_where_it_is_when_saved(tmp_path):
    causal_directory(tmp_path / "before", 0, tied=True)
    lm = load(tmp_path / "before")
    with torch.no_grad():
        lm.model.get_input_embeddings().weight[lm.spec.mask_token_id] = 3.0
    lm.save(tmp_path / "after")
    again = load(tmp_path / "after")
    assert again.spec == lm.spec
    assert again.model.get_input_embeddings().weight[lm.spec.mask_token_id].eq(3.0).all()


# --- what is refused


def refused(path, **options) -> str:
    with pytest.raises(ModelError) as error:
        load(path, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_directory_is_refused(tmp_path):
    assert refused(tmp_path / "none") == f"no such model directory: {tmp_path / 'none'}"


def test_a_hub_id_that_is_not_at_hand_is_refused():
    assert "nobody/nothing: no config.json can be read or downloaded" in refused("nobody/nothing")


@pytest.mark.parametrize("path", ["./none", "../none", "/no/such/model", "a/b/c"])
def test_what_reads_like_a_path_is_not_looked_up_on_the_hub(path):
    assert refused(path) == f"no such model directory: {path}"


def test_a_file_is_refused(saved):
    assert "is a file; expected a Hugging Face model directory" in refused(saved / "config.json")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", "no config.json in it"),
        ("model.safetensors", "no weights in it; expected model.safetensors"),
        ("tokenizer.json", "no tokenizer in it; expected tokenizer.json"),
    ],
)
def test_a_directory_that_lacks_a_part_is_refused(saved, name, said):
    (saved / name).unlink()
    assert said in refused(saved)
    with pytest.raises(ModelError, match=said):
        check_path(str(saved))


@pytest.mark.parametrize("text", ["{", "[]", "3"])
def test_a_broken_config_is_refused(saved, text):
    (saved / "config.json").write_text(text)
    refused(saved)
    with pytest.raises(ModelError, match=r"config\.json"):
        open_tokenizer(str(saved))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model_type": "t5", "is_encoder_decoder": True},
            "t5 is an encoder-decoder; expected an encoder or a decoder",
        ),
        ({"model_type": "nonsense"}, "model_type 'nonsense' is neither a published diffusion family"),
        ({"model_type": "vit"}, "model_type 'vit' is neither a published diffusion family"),
        ({"model_type": None}, "model_type None is neither a published diffusion family"),
        ({"diffusion": {"mask_token_id": 2}}, "the 'diffusion' section doesn't describe a diffusion model: missing"),
        ({"diffusion": 3}, "the 'diffusion' section is a int"),
    ],
)
def test_a_config_that_cannot_be_used_is_refused_with_and_without_weights(saved, changes, said):
    configure(saved, **changes)
    assert said in refused(saved)
    with pytest.raises(ModelError, match=said):
        open_tokenizer(str(saved))


def test_a_spec_with_a_token_outside_the_vocabulary_is_refused(saved):
    stored = json.loads((saved / "config.json").read_text())["diffusion"]
    configure(saved, diffusion=stored | {"mask_token_id": 5000})
    assert "mask_token_id 5000 is outside the vocabulary" in refused(saved)


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_truncated_weights_are_refused(saved, kept):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[: int(len(whole) * kept)])
    assert "it is cut off or broken" in refused(saved)


def test_a_missing_tensor_is_refused_by_name(saved):
    without_tensor(saved, "model.layers.1.mlp.up_proj.weight")
    said = refused(saved)
    assert (
        "1 tensors of LlamaForCausalLM are missing from the weights, first 'model.layers.1.mlp.up_proj.weight'" in said
    )


def test_tensors_of_another_shape_are_refused(saved):
    configure(saved, intermediate_size=64)
    said = "first 'model.layers.0.mlp.down_proj.weight': found [32, 128], expected [32, 64]"
    assert said in refused(saved)


def test_an_architecture_that_stays_causal_is_refused(tmp_path, tokenizer):
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    StableLmForCausalLM(StableLmConfig(vocab_size=len(tokenizer), intermediate_size=16, **sizes)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    assert "attention stays causal" in refused(tmp_path)


def test_a_state_space_model_is_refused(tmp_path, tokenizer):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "mamba has layers of the kind linear_attention" in refused(tmp_path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "float99"}, "dtype 'float99' is unknown"),
        ({"quantization": "3bit"}, "quantization '3bit' is unknown; expected 4bit or 8bit"),
        ({"adapter": "no/such/adapter"}, "no/such/adapter: no adapter_config.json in it"),
    ],
)
def test_options_that_cannot_be_met_are_refused(saved, options, said):
    assert said in refused(saved, **options)


# --- adapters and quantization


def adapter_for(lm, folder: Path) -> None:
    """A LoRA adapter that changes something."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(lm.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)


def test_an_adapter_changes_the_logits_and_chosen_positions_agree(saved, tmp_path):
    adapter_for(load(saved), tmp_path / "adapter")
    lm, plain = load(saved, adapter=tmp_path / "adapter"), load(saved)
    positions = torch.tensor([1, 9, 20])
    with torch.no_grad():
        whole = lm.logits(IDS)
        assert not torch.allclose(whole, plain.logits(IDS), atol=1e-4)
        chosen = lm.logits(IDS, positions=positions)
    torch.testing.assert_close(chosen, whole.flatten(0, 1)[positions], rtol=0, atol=1e-6)
    assert lm.max_length == plain.max_length


def test_an_adapter_of_another_model_is_refused(saved, make_lm, tmp_path):
    make_lm("llama", hidden_size=64).save(tmp_path / "wider")
    adapter_for(load(tmp_path / "wider"), tmp_path / "adapter")
    said = refused(saved, adapter=tmp_path / "adapter")
    assert f"made for {tmp_path / 'wider'}, doesn't fit {saved} (LlamaForCausalLM): size mismatch" in said


@pytest.mark.parametrize(("kind", "layer", "error"), [("4bit", "Linear4bit", 0.3), ("8bit", "Linear8bitLt", 0.05)])
def test_a_quantized_model_computes_nearly_the_same(make_lm, tmp_path, kind, layer, error):
    lm = make_lm("llama", hidden_size=64)
    lm.save(tmp_path)
    small = load(tmp_path, quantization=kind)
    assert layer in {type(module).__name__ for module in small.model.modules()}
    positions = torch.tensor([1, 9, 20])
    with torch.no_grad():
        exact, rough, chosen = lm.logits(IDS), small.logits(IDS), small.logits(IDS, positions=positions)
    assert 0 < (rough - exact).norm() / exact.norm() < error
    torch.testing.assert_close(chosen, rough.flatten(0, 1)[positions], rtol=0, atol=1e-4)
