"""`convert`: there and back without losing a bit, what a converted model is, and what is refused with which words."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_load import adapter_for, causal_directory, configure, without_tensor

from dllm_ray.errors import ModelError, OutputError
from dllm_ray.models import mapping
from dllm_ray.models.adapters import add_lora
from dllm_ray.models.blueprint import resolve
from dllm_ray.models.checkpoint import INDEX, Checkpoint, FileTensor, HeldTensor
from dllm_ray.models.config import LoRAConfig
from dllm_ray.models.convert import Target, description, merge_adapter, to_native, to_original
from dllm_ray.models.families import by_name
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import load
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.output import new_directory

PUBLISHED = ["llada", "llada_moe", "dream", "a2d_qwen3", "a2d_qwen2", "llada2", "llada21"]
ROUTED = ["llada_moe", "llada2", "llada21"]
IDS = torch.arange(20, 44).reshape(3, 8)
MIB = 1 << 20
NATIVE = Target()


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of all weight files, as the library reads them."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def check_same_tensors(made: Path, expected: Path) -> None:
    """The same names, types, shapes and bytes."""
    ours, theirs = stored(made), stored(expected)
    assert sorted(ours) == sorted(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


def check_same_logits(made: DiffusionLM, expected: DiffusionLM) -> None:
    with torch.no_grad():
        assert torch.equal(made.logits(IDS), expected.logits(IDS))


def folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


def native(source: Path, directory: Path, target: Target = NATIVE, **options) -> Path:
    """Converts `source` to a native directory."""
    to_native(str(source), folder(directory), target, **options)
    return directory


def original(source: Path, directory: Path, **options) -> Path:
    """Converts a native directory back."""
    to_original(str(source), folder(directory), **options)
    return directory


def resave(source: Path, directory: Path) -> Path:
    """What someone gets who opens a native directory with plain transformers and saves it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(source).save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


def retyped(source: Path, directory: Path, dtype: str = "bfloat16", kept: str = "no such tensor") -> Path:
    """A copy of a checkpoint in another type; tensors with `kept` in their names stay as they are."""
    shutil.copytree(source, directory)
    directory.chmod(0o755)
    for file in directory.iterdir():
        file.chmod(0o644)
    tensors = {
        name: tensor if kept in name else tensor.to(getattr(torch, dtype)) for name, tensor in stored(source).items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    configure(directory, dtype=dtype)
    return directory


def writable_copy(source: Path, directory: Path) -> Path:
    return retyped(source, directory, "float32")


@pytest.fixture(params=PUBLISHED)
def published(request, golden) -> Path:
    """Each published checkpoint in turn."""
    return golden / request.param / "checkpoint"


@pytest.fixture
def llada(golden) -> Path:
    return golden / "llada" / "checkpoint"


# --- there and back


def test_there_and_back_gives_the_same_bytes_and_config(published, tmp_path):
    back = original(native(published, tmp_path / "native"), tmp_path / "back")
    check_same_tensors(back, published)
    assert config_of(back) == config_of(published)


def test_the_native_directory_has_the_logits_and_spec_of_the_published_one(published, tmp_path):
    made, expected = load(native(published, tmp_path / "native")), load(published)
    check_same_logits(made, expected)
    assert made.spec == expected.spec
    assert made.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    assert made.tokenizer.chat_template == expected.tokenizer.chat_template


def test_converting_writes_what_loading_and_saving_writes(published, tmp_path):
    made = native(published, tmp_path / "native")
    load(published).save(tmp_path / "saved")
    check_same_tensors(made, tmp_path / "saved")
    assert config_of(made) == config_of(tmp_path / "saved")


def test_a_loaded_and_saved_model_goes_back_to_the_same_bytes(published, tmp_path):
    load(published).save(tmp_path / "saved")
    back = original(tmp_path / "saved", tmp_path / "back")
    check_same_tensors(back, published)
    assert config_of(back) == config_of(published)


def test_a_directory_that_plain_transformers_saved_again_goes_back_to_the_same_bytes(published, tmp_path):
    again = resave(native(published, tmp_path / "native"), tmp_path / "again")
    back = original(again, tmp_path / "back")
    check_same_tensors(back, published)
    assert config_of(back) == config_of(published)


def test_the_model_of_a_loaded_checkpoint_saved_by_itself_goes_back_to_the_same_bytes(published, tmp_path):
    lm = load(published)
    lm.model.save_pretrained(tmp_path / "saved")
    lm.tokenizer.save_pretrained(tmp_path / "saved")
    check_same_tensors(original(tmp_path / "saved", tmp_path / "back"), published)


def test_several_shards_have_an_index_that_transformers_reads(published, tmp_path):
    from transformers import AutoModelForCausalLM

    limit = 200_000
    made = native(published, tmp_path / "native", shard_bytes=limit)
    index = json.loads((made / INDEX).read_text())
    held = {file.name: load_file(file) for file in made.glob("*.safetensors")}
    assert len(held) > 1 and "model.safetensors" not in held
    assert index["weight_map"] == {name: file for file, tensors in held.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in stored(made).values())
    assert all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit for tensors in held.values())
    plain = AutoModelForCausalLM.from_pretrained(made).eval().state_dict()
    expected = load(published).model.state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in expected.items())


def test_several_shards_go_back_to_several_shards_with_the_same_bytes(published, tmp_path):
    made = native(published, tmp_path / "native", shard_bytes=200_000)
    back = original(made, tmp_path / "back", shard_bytes=100_000)
    assert len(list(back.glob("*.safetensors"))) > len(list(made.glob("*.safetensors"))) > 1
    check_same_tensors(back, published)
    check_same_logits(load(back), load(published))


def test_weights_in_a_pickle_file_are_converted_alike(llada, tmp_path):
    pickled = writable_copy(llada, tmp_path / "pickled")
    torch.save(stored(llada), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    check_same_tensors(native(pickled, tmp_path / "a"), native(llada, tmp_path / "b"))


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": 500},  # fewer tokens than rows
        {"embedding_size": None},
        {
            "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
            "mlp_ratio": 4.5,
            "note": "日本語 🙂",
            "nested": [{}],
        },
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_field_of_the_published_config_comes_back_as_it_was(llada, tmp_path, changes):
    source = writable_copy(llada, tmp_path / "source")
    config = config_of(llada) | changes
    (source / "config.json").write_text(json.dumps(config))
    assert config_of(original(native(source, tmp_path / "native"), tmp_path / "back")) == config


@pytest.mark.parametrize("name", ["llada", *ROUTED])
def test_going_back_reads_every_byte_once(golden, tmp_path, monkeypatch, name):
    """Whatever the number of experts."""
    made = native(golden / name / "checkpoint", tmp_path / "native")
    read = 0
    read_into = FileTensor.read_into

    def counted(self, target, start=0):
        nonlocal read
        read += target.nbytes
        read_into(self, target, start)

    monkeypatch.setattr(FileTensor, "read_into", counted)
    original(made, tmp_path / "back")
    assert read == sum(tensor.nbytes for tensor in stored(made).values())


def test_progress_ends_at_all_the_bytes(llada, tmp_path):
    seen = []
    native(llada, tmp_path / "native", on_progress=lambda *done_total: seen.append(done_total))
    total = sum(tensor.nbytes for tensor in stored(llada).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})


# --- types


def test_a_bfloat16_checkpoint_stays_one_both_ways(published, tmp_path):
    half = retyped(published, tmp_path / "half")
    made = native(half, tmp_path / "native")
    assert {tensor.dtype for tensor in stored(made).values()} == {torch.bfloat16}
    assert config_of(made)["dtype"] == "bfloat16"
    back = original(made, tmp_path / "back")
    check_same_tensors(back, half)
    assert config_of(back) == config_of(half)


def test_a_bfloat16_checkpoint_that_was_loaded_and_saved_goes_back_to_the_same_bytes(published, tmp_path):
    half = retyped(published, tmp_path / "half", kept="expert_bias")  # transformers holds this in float32
    load(half, dtype="auto").save(tmp_path / "saved")
    check_same_tensors(original(tmp_path / "saved", tmp_path / "back"), half)


@pytest.mark.parametrize("name", ["llada2", "llada21"])
def test_tensors_of_several_types_each_keep_their_own(golden, tmp_path, name):
    mixed = retyped(golden / name / "checkpoint", tmp_path / "mixed", kept="expert_bias")
    back = original(native(mixed, tmp_path / "native"), tmp_path / "back")
    assert {tensor.dtype for tensor in stored(back).values()} == {torch.bfloat16, torch.float32}
    check_same_tensors(back, mixed)
    assert config_of(back) == config_of(mixed)


def test_casting_while_converting_equals_casting_while_loading(published, tmp_path):
    made = native(published, tmp_path / "native", dtype="bfloat16")
    assert config_of(made)["dtype"] == "bfloat16"
    check_same_logits(load(made, dtype="auto"), load(published, dtype="bfloat16"))


def test_what_was_cast_goes_back_in_its_new_type(llada, tmp_path):
    back = original(native(llada, tmp_path / "native", dtype="bfloat16"), tmp_path / "back")
    assert config_of(back) == config_of(llada) | {"dtype": "bfloat16"}
    whole = stored(llada)
    assert all(torch.equal(tensor, whole[name].bfloat16()) for name, tensor in stored(back).items())


# --- a vocabulary that grows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spare_rows", [0, 16], ids=["full table", "spare rows"])
def test_a_missing_mask_token_gets_the_mean_of_all_embeddings(tmp_path, spare_rows, tied, dtype):
    known = causal_directory(tmp_path / "whole", spare_rows, tied)
    source = retyped(tmp_path / "whole", tmp_path / "causal", dtype)
    made = native(source, tmp_path / "native")
    before, after = stored(source), stored(made)
    tables = ["model.embed_tokens.weight"] + ["lm_head.weight"] * (not tied)
    assert sorted(before) == sorted(after)
    for name in tables:
        assert after[name].shape[0] == known + max(spare_rows, 1)
        assert torch.equal(after[name][:known], before[name][:known])
        mean = before[name][:known].float().mean(dim=0).to(before[name].dtype)
        assert torch.equal(after[name][known], mean)
    assert config_of(made)["vocab_size"] == known + max(spare_rows, 1)
    assert config_of(made)["diffusion"]["mask_token_id"] == known


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spare_rows", [0, 16], ids=["full table", "spare rows"])
def test_a_grown_model_equals_what_loading_the_same_checkpoint_gives(tmp_path, spare_rows, tied):
    causal_directory(tmp_path / "causal", spare_rows, tied)
    made, expected = load(native(tmp_path / "causal", tmp_path / "native")), load(tmp_path / "causal")
    assert made.spec == expected.spec
    assert made.model.state_dict().keys() == expected.model.state_dict().keys()
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(made.model.state_dict()[name], tensor), name
    check_same_logits(made, expected)


def test_the_bias_of_a_head_grows_along(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    known = causal_directory(tmp_path / "bert", 0, tied=True)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForMaskedLM(BertConfig(vocab_size=known, **sizes))
    torch.nn.init.normal_(model.cls.predictions.bias)
    model.save_pretrained(tmp_path / "bert")
    made, expected = load(native(tmp_path / "bert", tmp_path / "native")), load(tmp_path / "bert")
    assert made.model.get_output_embeddings().bias.shape == (known + 1,)
    check_same_logits(made, expected)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llada", ("embedding_size", "vocab_size")),
        ("a2d_qwen2", ("vocab_size",)),
        ("llada2", ("vocab_size",)),
    ],
)
def test_a_published_model_whose_vocabulary_grew_goes_back_with_its_new_size(golden, tmp_path, name, fields):
    source = golden / name / "checkpoint"
    lm = load(source)
    lm.tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>", "<|search|>"]})
    lm.model.resize_token_embeddings(len(lm.tokenizer))
    lm.save(tmp_path / "grown")
    back = original(tmp_path / "grown", tmp_path / "back")
    rows = len(lm.tokenizer)
    assert config_of(back) == config_of(source) | dict.fromkeys(fields, rows)
    assert {tensor.shape[0] for name, tensor in stored(back).items() if "embed" in name or "wte" in name} == {rows}
    check_same_logits(load(back), lm)


# --- what the result is to be

FULL = DiffusionSpec("llama", mask_token_id=4, eos_token_id=2, pad_token_id=0, sampler={"policy": "low_confidence"})
BLOCKS = replace(
    FULL,
    attention="block_causal",
    block_size=8,
    shift_logits=True,
    sampler={"policy": "low_confidence", "block_size": 8},
)


@pytest.mark.parametrize("spec", [FULL, BLOCKS], ids=["full", "block causal"])
def test_native_keeps_the_spec(spec):
    assert Target().spec(spec) == spec


@pytest.mark.parametrize("spec", [FULL, BLOCKS], ids=["full", "block causal"])
def test_mdlm_means_full_attention_and_no_blocks_of_its_own(spec):
    assert Target("mdlm").spec(spec) == replace(FULL, shift_logits=spec.shift_logits)


def test_mdlm_keeps_the_blocks_that_a_full_model_is_sampled_in():
    spec = replace(FULL, sampler={"block_size": 32})
    assert Target("mdlm").spec(spec) == spec


@pytest.mark.parametrize("spec", [FULL, BLOCKS], ids=["full", "block causal"])
def test_bd3lm_means_block_causal_attention_sampled_in_its_blocks(spec):
    made = Target("bd3lm", block_size=16).spec(spec)
    assert (made.attention, made.block_size) == ("block_causal", 16)
    assert made.sampler == {"policy": "low_confidence", "block_size": 16}
    assert replace(made, attention="full", block_size=None, sampler=spec.sampler) == replace(
        spec, attention="full", block_size=None
    )


@pytest.mark.parametrize("objective", ["native", "mdlm", "bd3lm"])
@pytest.mark.parametrize("spec", [FULL, BLOCKS], ids=["unshifted", "shifted"])
@pytest.mark.parametrize("shift", [None, False, True])
def test_shifted_logits_are_as_the_checkpoint_has_them_unless_told(objective, spec, shift):
    made = Target(objective, shift_logits=shift).spec(spec)
    assert made.shift_logits is (spec.shift_logits if shift is None else shift)


def sees(lm: DiffusionLM, position: int, other: int) -> bool:
    """Whether the logits at a position change with the token at another."""
    changed = IDS.clone()
    changed[:, other] = 99
    with torch.no_grad():
        return not torch.allclose(lm.logits(IDS)[:, position], lm.logits(changed)[:, position], atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "bert", "modernbert"])
def test_a_model_made_for_bd3lm_sees_its_block_and_those_before(make_lm, tmp_path, architecture):
    make_lm(architecture, seed=3).save(tmp_path / "model")
    lm = load(native(tmp_path / "model", tmp_path / "native", Target("bd3lm", block_size=4)))
    assert sees(lm, 0, 3) and sees(lm, 7, 0)
    assert not sees(lm, 3, 4)


def test_a_block_causal_model_made_for_mdlm_sees_everything(golden, tmp_path):
    source = golden / "llada2" / "checkpoint"
    lm = load(native(source, tmp_path / "native", Target("mdlm")))
    assert (lm.spec.attention, lm.spec.block_size) == ("full", None)
    assert sees(lm, 0, 7)
    said = refused(original, tmp_path / "native", tmp_path / "back")
    assert "was converted to attention full, which the published layout of llada2 can't say" in said
    blocks = native(tmp_path / "native", tmp_path / "blocks", Target("bd3lm", block_size=32))
    check_same_tensors(original(blocks, tmp_path / "again"), source)


def test_a_native_directory_can_be_made_into_another_kind(llada, tmp_path):
    first = native(llada, tmp_path / "native")
    second = native(first, tmp_path / "blocks", Target("bd3lm", block_size=4))
    assert config_of(second)["diffusion"]["block_size"] == 4
    check_same_tensors(second, first)
    said = refused(original, second, tmp_path / "back")
    assert "attention block_causal with blocks of 4, which the published layout of llada can't say" in said
    third = native(second, tmp_path / "again", Target("mdlm"))
    check_same_tensors(original(third, tmp_path / "published"), llada)


# --- encoders, and checkpoints that only transformers can sort out


@pytest.mark.parametrize("architecture", ["bert", "roberta", "modernbert"])
def test_an_encoder_is_written_as_it_is(make_lm, tmp_path, architecture):
    lm = make_lm(architecture, seed=2)
    lm.save(tmp_path / "model")
    made = native(tmp_path / "model", tmp_path / "native")
    check_same_tensors(made, tmp_path / "model")
    assert config_of(made)["diffusion"] == lm.spec.to_dict()
    check_same_logits(load(made), lm)


def test_a_trunk_without_a_head_gets_one(make_lm, tmp_path, caplog):
    lm = make_lm("bert", seed=2)
    lm.save(tmp_path / "model")
    lm.model.bert.save_pretrained(tmp_path / "model")
    with caplog.at_level("WARNING"):
        made = native(tmp_path / "model", tmp_path / "native")
    assert "has no language-model head" in caplog.text
    assert config_of(made)["architectures"] == ["BertForMaskedLM"]
    assert config_of(made)["diffusion"] == lm.spec.to_dict()
    after = stored(made)
    for name, tensor in lm.model.bert.state_dict().items():
        assert torch.equal(after[f"bert.{name}"], tensor)
    assert "cls.predictions.transform.dense.weight" in after


def test_tensors_under_names_of_older_days_are_sorted_out(make_lm, tmp_path):
    lm = make_lm("bert", seed=2)
    lm.save(tmp_path / "model")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in stored(tmp_path / "model").items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(64).unsqueeze(0)
    save_file(old, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    made = native(tmp_path / "model", tmp_path / "native")
    check_same_logits(load(made), lm)


def test_a_config_with_names_of_older_days_keeps_its_meaning(make_lm, tmp_path):
    lm = make_lm("llama", seed=2, extra={"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}})
    lm.save(tmp_path / "model")
    configure(
        tmp_path / "model", rope_parameters=None, rope_theta=777.0, dtype=None, torch_dtype="float32", diffusion=None
    )
    made = native(tmp_path / "model", tmp_path / "native")
    assert config_of(made)["rope_parameters"]["rope_theta"] == 777.0
    check_same_logits(load(made), lm)


# --- what is refused


def refused(action, *arguments, error: type[Exception] = ModelError) -> str:
    with pytest.raises(error) as caught:
        action(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_a_model_that_was_never_published_has_no_other_layout(make_lm, tmp_path, architecture):
    make_lm(architecture).save(tmp_path / "model")
    said = refused(original, tmp_path / "model", tmp_path / "back")
    assert "is no converted checkpoint of a published family" in said
    assert f"that of transformers' {architecture}" in said
    assert not list((tmp_path / "back").iterdir())


def test_a_checkpoint_in_its_published_layout_need_not_go_back(llada, tmp_path):
    """It is not in the layout of transformers' llama."""
    said = refused(original, llada, tmp_path / "back")
    assert "transformers' llama" not in said
    assert "published layout" in said


def test_going_back_without_a_tensor_is_refused_by_name(llada, tmp_path):
    made = native(llada, tmp_path / "native")
    without_tensor(made, "model.layers.1.mlp.up_proj.weight")
    said = refused(original, made, tmp_path / "back")
    assert "model.layers.1.mlp.up_proj.weight" in said
    assert not list((tmp_path / "back").glob("*.safetensors"))


def test_a_missing_tensor_is_refused_by_its_published_name(llada, tmp_path):
    source = writable_copy(llada, tmp_path / "source")
    without_tensor(source, "model.transformer.blocks.1.ff_proj.weight")
    said = refused(native, source, tmp_path / "native")
    assert "1 tensors are missing from the weights, first 'model.transformer.blocks.1.ff_proj.weight'" in said
    assert "found 20, expected 21" in said


def test_a_mask_token_outside_the_embeddings_is_refused(llada, tmp_path):
    """As `load` does: better now than after the training."""
    source = writable_copy(llada, tmp_path / "source")
    configure(source, mask_token_id=5000)
    said = refused(load, source)
    assert "mask_token_id 5000 is outside the vocabulary of 512 tokens" in said
    assert refused(native, source, tmp_path / "native") == said


def test_a_decoder_that_stays_causal_is_refused(tmp_path, tokenizer):
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = StableLmConfig(vocab_size=len(tokenizer), intermediate_size=16, **sizes)
    StableLmForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "attention stays causal" in refused(native, tmp_path / "model", tmp_path / "native")


# --- checkpoints of several workers


def write_pieces(rank: int, model: Path, directory: Path, rendezvous: Path) -> None:
    """One of two workers that hold a model in pieces (FSDP2), take a step of no size, and write a checkpoint."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    lm = load(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in lm.model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(lm.model, mesh=mesh)
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=0.0)
    lm.model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    state = {"model": get_model_state_dict(lm.model), "optim": get_optimizer_state_dict(lm.model, optimizer)}
    dcp.save(state, checkpoint_id=directory)
    if rank == 0:
        lm.model.config.save_pretrained(directory)
        lm.tokenizer.save_pretrained(directory)
    dist.barrier()
    dist.destroy_process_group()


def in_pieces(model: Path, directory: Path) -> Path:
    """A checkpoint of two workers that trained `model`."""
    torch.multiprocessing.spawn(write_pieces, (model, directory, directory.with_suffix(".rendezvous")), nprocs=2)
    assert len(list(directory.glob("*.distcp"))) == 2
    return directory


@pytest.fixture(scope="module")
def llama_in_pieces(make_lm, tmp_path_factory) -> tuple[Path, Path]:
    """A model, and a checkpoint of two workers that trained it."""
    made = tmp_path_factory.mktemp("pieces")
    make_lm("llama", seed=5).save(made / "model")
    return made / "model", in_pieces(made / "model", made / "checkpoint")


@pytest.mark.slow
class TestPieces:
    def test_a_checkpoint_in_pieces_becomes_one_model(self, llama_in_pieces, tmp_path):
        model, pieces = llama_in_pieces
        made = native(pieces, tmp_path / "native")
        check_same_tensors(made, model)
        assert config_of(made)["diffusion"] == config_of(model)["diffusion"]
        check_same_logits(load(made), load(model))

    def test_it_opens_as_it_is(self, llama_in_pieces):
        model, pieces = llama_in_pieces
        check_same_logits(load(pieces), load(model))
        assert "native layout" in description(str(pieces))

    def test_it_may_be_cast(self, llama_in_pieces, tmp_path):
        _, pieces = llama_in_pieces
        made = native(pieces, tmp_path / "native", dtype="bfloat16", shard_bytes=50_000)
        assert {tensor.dtype for tensor in stored(made).values()} == {torch.bfloat16}

    def test_a_published_model_in_pieces_goes_back_to_its_own_bytes(self, golden, tmp_path):
        source = golden / "llada2" / "checkpoint"
        pieces = in_pieces(native(source, tmp_path / "native"), tmp_path / "checkpoint")
        check_same_tensors(original(pieces, tmp_path / "directly"), source)
        check_same_tensors(original(native(pieces, tmp_path / "whole"), tmp_path / "back"), source)

    @pytest.mark.parametrize("action", [native, original], ids=["native", "original"])
    def test_a_lost_piece_is_refused_by_name(self, llama_in_pieces, tmp_path, action):
        shutil.copytree(llama_in_pieces[1], tmp_path / "checkpoint")
        if action is original:
            configure(tmp_path / "checkpoint", **published_llama(tmp_path / "checkpoint"))
        (tmp_path / "checkpoint" / "__1_0.distcp").unlink()
        assert "__1_0.distcp" in refused(action, tmp_path / "checkpoint", tmp_path / "made")

    def test_a_lost_piece_is_refused_while_loading(self, llama_in_pieces, tmp_path):
        shutil.copytree(llama_in_pieces[1], tmp_path / "checkpoint")
        (tmp_path / "checkpoint" / "__0_0.distcp").unlink()
        assert "__0_0.distcp" in refused(load, tmp_path / "checkpoint")

    @pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata"])
    def test_a_piece_that_is_cut_off_is_refused(self, llama_in_pieces, tmp_path, name):
        shutil.copytree(llama_in_pieces[1], tmp_path / "checkpoint")
        piece = tmp_path / "checkpoint" / name
        piece.write_bytes(piece.read_bytes()[:100])
        assert str(tmp_path / "checkpoint") in refused(native, tmp_path / "checkpoint", tmp_path / "made")


def published_llama(folder: Path) -> dict:
    """Fields that make a native llama one that began as an A2D model."""
    config = config_of(folder)
    return {
        "diffusion": config["diffusion"] | {"family": "a2d-llama"},
        "original_config": config | {"model_type": "a2d-llama", "diffusion": None},
    }


# --- adapters


@pytest.fixture
def adapted(make_lm, tmp_path) -> tuple[Path, Path]:
    """A llama and an adapter that changes it."""
    make_lm("llama", seed=2).save(tmp_path / "model")
    adapter_for(load(tmp_path / "model"), tmp_path / "adapter")
    return tmp_path / "model", tmp_path / "adapter"


def test_a_merged_adapter_gives_the_adapted_logits(adapted, tmp_path):
    model, adapter = adapted
    merge_adapter(str(model), str(adapter), tmp_path / "merged", Target())
    with torch.no_grad():
        merged, plain = load(tmp_path / "merged").logits(IDS), load(model).logits(IDS)
        torch.testing.assert_close(merged, load(model, adapter=adapter).logits(IDS), rtol=0, atol=1e-5)
    assert not torch.allclose(merged, plain, atol=1e-4)
    assert sorted(stored(tmp_path / "merged")) == sorted(stored(model))
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_a_merged_model_may_be_of_another_kind_and_type(adapted, tmp_path):
    model, adapter = adapted
    merge_adapter(str(model), str(adapter), tmp_path / "merged", Target("bd3lm", block_size=4), "bfloat16")
    assert config_of(tmp_path / "merged")["diffusion"]["block_size"] == 4
    assert {tensor.dtype for tensor in stored(tmp_path / "merged").values()} == {torch.bfloat16}


def test_an_adapter_of_a_wider_base_is_refused(adapted, make_lm, tmp_path):
    make_lm("llama", hidden_size=64).save(tmp_path / "wider")
    said = refused(merge_adapter, str(tmp_path / "wider"), str(adapted[1]), tmp_path / "merged", Target())
    assert str(adapted[1]) in said and str(adapted[0]) in said and "size mismatch" in said
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_base_with_other_weights_is_refused(make_lm, tmp_path):
    for seed in (1, 2):
        make_lm("llama", seed=seed).save(tmp_path / f"model{seed}")
    add_lora(load(tmp_path / "model1"), LoRAConfig(rank=2), 0).save(tmp_path / "adapter")
    said = refused(merge_adapter, str(tmp_path / "model2"), str(tmp_path / "adapter"), tmp_path / "merged", Target())
    assert "was made for another base model" in said and "has other weights" in said


def test_an_adapter_of_a_published_model_is_merged_into_its_own_layout(llada, tmp_path):
    adapter_for(load(llada), tmp_path / "adapter")
    merge_adapter(str(llada), str(tmp_path / "adapter"), tmp_path / "merged", Target())
    back = original(tmp_path / "merged", tmp_path / "back")
    before, after = stored(llada), stored(back)
    assert config_of(back) == config_of(llada)
    assert sorted(after) == sorted(before)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {f"model.transformer.blocks.{layer}.q_proj.weight" for layer in range(2)}
    with torch.no_grad():
        expected = load(llada, adapter=tmp_path / "adapter").logits(IDS)
        torch.testing.assert_close(load(back).logits(IDS), expected, rtol=0, atol=1e-4)


# --- a new directory, whole or not there


def write_whole(directory: Path, text: str = "new") -> None:
    for name in "abc":
        (directory / name).write_text(text)


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def partial_of(target: Path, process: int, host: str | None = None) -> Path:
    """The folder that a process, on its way to `target`, left behind."""
    partial = folder(target.with_name(f".{target.name}.{host or socket.gethostname()}.{process}.partial"))
    write_whole(partial, "half")
    return partial


@pytest.fixture
def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("name", ["out", "o [1] *?", "[ab]", "日本語 🙂", ".hidden"])
def test_a_new_directory_appears_whole(tmp_path, dead_process, name):
    target = tmp_path / "deep" / "er" / name
    with new_directory(target, overwrite=False) as directory:
        write_whole(directory)
        assert not target.exists()
    assert contents(target) == dict.fromkeys("abc", "new")
    partial_of(target, dead_process)
    with new_directory(target, overwrite=True) as directory:
        write_whole(directory, "newer")
        assert contents(target) == dict.fromkeys("abc", "new")
    assert contents(target) == dict.fromkeys("abc", "newer")
    assert [path.name for path in target.parent.iterdir()] == [name]


def refused_directory(target: Path, overwrite: bool) -> str:
    """The message with which a new directory is refused before anything is written."""

    def make():
        with new_directory(target, overwrite):
            pytest.fail("the work was begun")

    return refused(make, error=OutputError)


def test_an_existing_directory_is_refused_and_left_alone(tmp_path):
    write_whole(folder(tmp_path / "out"), "old")
    said = refused_directory(tmp_path / "out", overwrite=False)
    assert said == f"{tmp_path / 'out'} exists; name another --output_dir, or replace it with --overwrite"
    assert contents(tmp_path / "out") == dict.fromkeys("abc", "old")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_refused_and_left_alone(tmp_path, overwrite):
    (tmp_path / "out").write_text("old")
    assert str(tmp_path / "out") in refused_directory(tmp_path / "out", overwrite)
    assert contents(tmp_path) == {"out": "old"}


@pytest.mark.parametrize("name", ["file/out", "file/deeper/out", "x" * 300], ids=["below a file", "deeper", "long"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_place_that_can_not_be_written_is_refused(tmp_path, overwrite, name):
    (tmp_path / "file").write_text("old")
    assert f"{tmp_path / name} can't be written: " in refused_directory(tmp_path / name, overwrite)
    assert contents(tmp_path) == {"file": "old"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_root_directory_is_refused(overwrite):
    refused_directory(Path("/"), overwrite)


@pytest.mark.parametrize("error", [ModelError("broken"), KeyboardInterrupt(), SystemExit(1)], ids=repr)
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_the_old_one_as_it_was_and_nothing_new(tmp_path, error, exists):
    target = tmp_path / "out"
    if exists:
        write_whole(folder(target), "old")
    with pytest.raises(type(error)), new_directory(target, overwrite=True) as directory:
        write_whole(directory)
        raise error
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * exists
    assert not exists or contents(target) == dict.fromkeys("abc", "old")


def test_an_error_of_the_disk_is_an_error_of_the_output(tmp_path):
    def fill_up():
        with new_directory(tmp_path / "out", overwrite=False):
            raise OSError(28, "No space left on device")

    assert refused(fill_up, error=OutputError) == f"{tmp_path / 'out'} can't be written: No space left on device"


@pytest.mark.parametrize("name", ["out.old", "out.tmp", "outer", ".out.partial", ".out.HOST.notes.partial"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_of_the_users_beside_it_is_left_alone(tmp_path, exists, name):
    neighbour = folder(tmp_path / name.replace("HOST", socket.gethostname()))
    write_whole(neighbour, "precious")
    if exists:
        write_whole(folder(tmp_path / "out"), "old")
    with new_directory(tmp_path / "out", overwrite=True) as directory:
        write_whole(directory)
    assert contents(neighbour) == dict.fromkeys("abc", "precious")
    assert contents(tmp_path / "out") == dict.fromkeys("abc", "new")


def test_what_dead_processes_left_behind_goes_and_what_others_write_stays(tmp_path, dead_process):
    target = tmp_path / "out"
    dead = partial_of(target, dead_process)
    living = partial_of(target, os.getppid())
    elsewhere = partial_of(target, dead_process, host="another-host")
    other_target = partial_of(tmp_path / "other", dead_process)
    with new_directory(target, overwrite=False) as directory:
        write_whole(directory)
    assert not dead.exists()
    assert living.exists() and elsewhere.exists() and other_target.exists()
    assert contents(target) == dict.fromkeys("abc", "new")


def test_what_a_dead_process_of_the_same_number_left_behind_is_no_hindrance(tmp_path):
    """In a container the number is the same every time."""
    partial_of(tmp_path / "out", os.getpid())
    with new_directory(tmp_path / "out", overwrite=False) as directory:
        write_whole(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_new_directory_that_can_not_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    target = tmp_path / "out"
    write_whole(folder(target), "old")
    rename = Path.rename

    def fails(self, to):
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, to)

    def make():
        with new_directory(target, overwrite=True) as directory:
            write_whole(directory)

    monkeypatch.setattr(Path, "rename", fails)
    assert "Input/output error" in refused(make, error=OutputError)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(target) == dict.fromkeys("abc", "old")


def test_another_process_that_comes_first_leaves_no_debris(tmp_path, monkeypatch):
    """One whole directory wins; the other process may say that it could not."""
    target = tmp_path / "out"
    write_whole(folder(target), "old")
    rename = Path.rename

    def interrupted(self, to):
        done = rename(self, to)
        if self == target:
            write_whole(folder(target), "theirs")
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with suppress(OutputError), new_directory(target, overwrite=True) as directory:
        write_whole(directory, "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(target) in (dict.fromkeys("abc", "ours"), dict.fromkeys("abc", "theirs"))


def write_again_and_again(target: Path, worker: int, start, outcomes) -> None:
    start.wait()
    for turn in range(50):
        try:
            with new_directory(target, overwrite=True) as directory:
                write_whole(directory, f"{worker} {turn}")
            outcomes.put(None)
        except OutputError:
            outcomes.put("refused")
        except BaseException as error:
            outcomes.put(repr(error))


def test_several_at_once_leave_one_whole_directory_and_nothing_else(tmp_path):
    context = multiprocessing.get_context("fork")
    start, outcomes = context.Barrier(3), context.SimpleQueue()
    workers = [
        context.Process(target=write_again_and_again, args=(tmp_path / "out", worker, start, outcomes))
        for worker in range(3)
    ]
    for worker in workers:
        worker.start()
    seen = [outcomes.get() for _ in range(150)]
    for worker in workers:
        worker.join()
    assert set(seen) <= {None, "refused"} and None in seen
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(contents(tmp_path / "out")) == ["a", "b", "c"]
    assert len(set(contents(tmp_path / "out").values())) == 1


# --- memory

LLADA = {"d_model": 384, "n_layers": 34, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 1152}
LLADA2 = {"hidden_size": 256, "num_hidden_layers": 20, "num_experts": 16, "moe_intermediate_size": 256}


def big_checkpoint(small: Path, directory: Path, **sizes) -> Path:
    """A published checkpoint like `small` with other sizes and random weights, in shards of 32 MiB."""
    shutil.copytree(small, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    directory.chmod(0o755)
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config_of(small) | sizes))
    blueprint = resolve(Checkpoint(str(directory)))
    shapes = {name: HeldTensor(tensor) for name, tensor in blueprint.skeleton().state_dict().items()}
    places, shard, size = {}, {}, 0
    for name, tensor in mapping.to_original(by_name(blueprint.family.name).rules, shapes).items():
        shard[name] = torch.randn(tensor.shape) * 0.02
        if sum(tensor.nbytes for tensor in shard.values()) > 32 * MIB:
            size += write_shard(directory, shard, places)
    size += write_shard(directory, shard, places)
    assert 200 * MIB < size < 300 * MIB
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": places}))
    return directory


def write_shard(directory: Path, shard: dict[str, torch.Tensor], places: dict[str, str]) -> int:
    """Writes a weight file and forgets its tensors; returns their bytes."""
    file = f"model-{len(list(directory.glob('*.safetensors'))) + 1:05}.safetensors"
    save_file(shard, directory / file)
    places |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in shard.values())
    shard.clear()
    return size


def peak(action: str, warm_up: Path, big: Path, tmp_path: Path, **environment: str) -> float:
    """Most memory of a process that converts or loads, beyond what it holds before, in sizes of the checkpoint.

    Args:
        action: Python that works on `path`, a string, and writes to `directory`, a Path.
        warm_up: a small checkpoint of the same kind, so that all is imported.
        big: the checkpoint.
        tmp_path: where to write.
        environment: more variables for the process.
    """
    script = f"""
import gc, re, sys
from pathlib import Path
import torch
from dllm_ray.models.convert import Target, to_native, to_original
from dllm_ray.models.load import load

def kilobytes(name):
    return int(re.search(name + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def act(path, directory):
    directory.mkdir()
    {action}

torch.set_num_threads(1)
act({str(warm_up)!r}, Path({str(tmp_path / "warm")!r}))
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = kilobytes("VmRSS")
act({str(big)!r}, Path({str(tmp_path / "made")!r}))
print((kilobytes("VmHWM") - before) * 1024)
"""
    variables = os.environ | environment
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratio = int(done.stdout.split()[-1]) / sum(file.stat().st_size for file in big.glob("*.safetensors"))
    print(f"{action} on {big.name}: peak of {ratio:.3f} of the checkpoint")
    return ratio


@pytest.fixture(scope="module", params=["llada", "llada2"])
def big(request, golden, tmp_path_factory) -> tuple[Path, Path]:
    """A small and a big checkpoint of the same family."""
    small, sizes = golden / request.param / "checkpoint", {"llada": LLADA, "llada2": LLADA2}[request.param]
    return small, big_checkpoint(small, tmp_path_factory.mktemp("big") / request.param, **sizes)


@pytest.mark.slow
class TestMemory:
    def test_converting_holds_little_of_the_checkpoint(self, big, tmp_path):
        assert peak("to_native(path, directory, Target())", *big, tmp_path) < 0.25

    def test_going_back_holds_little_of_the_checkpoint(self, big, tmp_path):
        small, large = (native(path, tmp_path / f"native{path.name}{i}") for i, path in enumerate(big))
        assert peak("to_original(path, directory)", small, large, tmp_path) < 0.25

    def test_casting_holds_little_of_the_checkpoint(self, big, tmp_path):
        assert peak("to_native(path, directory, Target(), dtype='bfloat16')", *big, tmp_path) < 0.25

    @pytest.mark.parametrize("dtype", ["auto", "float32"])
    def test_loading_holds_the_checkpoint_once(self, big, tmp_path, dtype):
        assert peak(f"lm = load(path, dtype={dtype!r})", *big, tmp_path) <= 1.15

    def test_loading_in_half_the_type_holds_half_of_the_checkpoint(self, big, tmp_path):
        returned = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed at once, as tensors of real models are
        assert peak("lm = load(path, dtype='bfloat16')", *big, tmp_path, **returned) <= 0.65


# --- what a checkpoint is, for people


def test_a_published_checkpoint_is_described_with_its_map(llada):
    tensors = stored(llada)
    count = sum(tensor.numel() for tensor in tensors.values())
    lines = description(str(llada)).splitlines()
    for line in (
        "family        llada (published layout, mapped while loading)",
        "architecture  LlamaForCausalLM",
        f"parameters    {count:,}",
        f"weights       {len(tensors)} tensors, {4 * count:,} bytes, float32",
        "num_hidden_layers   2",
        "hidden_size         64",
        "num_attention_heads 4",
        "vocab_size          512",
        "context             1024",
        "  mask_token_id     5",
        "  attention         full",
        "  shift_logits      False",
        "  model.transformer.wte.weight -> model.embed_tokens.weight (1)",
        "  model.transformer.blocks.{i}.ff_proj.weight -> model.layers.{i}.mlp.gate_proj.weight (2)",
    ):
        assert line in lines


def test_every_native_tensor_is_counted_in_the_map(published, tmp_path):
    lines = description(str(published)).partition("native tensors)\n")[2].splitlines()
    counted = sum(int(line.rpartition("(")[2].removesuffix(")")) for line in lines)
    assert counted == len(stored(native(published, tmp_path / "native")))


def test_a_native_checkpoint_is_described_without_a_map(llada, tmp_path):
    told = description(str(native(llada, tmp_path / "native")))
    assert "family        llada (native layout)" in told
    assert "->" not in told


def test_a_model_of_no_published_family_is_described(make_lm, tmp_path):
    lm = make_lm("llama")
    lm.save(tmp_path)
    told = description(str(tmp_path))
    assert "family        none of the published diffusion families (native layout)" in told
    assert f"parameters    {sum(parameter.numel() for parameter in lm.model.parameters()):,}" in told


def test_what_can_not_be_loaded_can_not_be_described(llada, tmp_path):
    source = writable_copy(llada, tmp_path / "source")
    without_tensor(source, "model.transformer.wte.weight")
    assert "'model.transformer.wte.weight'" in refused(description, str(source))


def test_an_adapter_is_described_with_its_base(llada, tmp_path):
    add_lora(load(llada), LoRAConfig(rank=2), seed=0).save(tmp_path / "adapter")
    said = description(str(tmp_path / "adapter"))
    assert f"its base      {llada}" in said
    assert "family        llada (published layout" in said


@pytest.mark.parametrize("spare_rows", [0, 16], ids=["full table", "spare rows"])
def test_a_decoder_whose_mask_token_is_yet_to_come_is_described(tmp_path, spare_rows):
    tokens = causal_directory(tmp_path, spare_rows, tied=False)
    assert f"mask_token_id     {tokens}" in description(str(tmp_path))
