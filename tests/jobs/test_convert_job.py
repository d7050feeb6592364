"""jobs/convert.py: every line of its help, what a kill or an interrupt leaves, and one line for every mistake.

Named apart from tests/models/test_convert.py, as pytest wants one module of a name.
"""

import json
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import transformers
from jobs_testing import ROOT, command, environment, load_job, run
from safetensors.torch import load_file, save_file

from dllm_ray.cli import run_job
from dllm_ray.models.convert import to_original
from dllm_ray.models.load import load

IDS = torch.arange(20, 44).reshape(3, 8)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def configure(folder: Path, **changes) -> None:
    """Changes fields of config.json; None removes one."""
    config = {name: value for name, value in (config_of(folder) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))


def same_tensors(made: Path, expected: Path) -> bool:
    """The same names, types and bytes."""
    ours, theirs = stored(made), stored(expected)
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == tensor.dtype and torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8))
        for name, tensor in theirs.items()
    )


def same_logits(made: Path, expected: Path, **options) -> bool:
    with torch.no_grad():
        return torch.allclose(load(made).logits(IDS), load(expected, **options).logits(IDS), rtol=0, atol=1e-4)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def convert(model: Path, output_dir: Path, **settings: str) -> list[str]:
    """Converts a model; returns the lines that were printed, on both streams."""
    done = run("convert", model__path=str(model), output_dir=str(output_dir), **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return (done.stdout + done.stderr).splitlines()


def only_ours(lines: list[str]) -> bool:
    """Whether no library has put in a word."""
    return all(line.startswith(("convert: ", "model     ")) for line in lines)


@pytest.fixture
def llada(golden, tmp_path) -> Path:
    """A published checkpoint that may be spoilt."""
    shutil.copytree(golden / "llada" / "checkpoint", tmp_path / "LLaDA-8B")
    for path in (tmp_path / "LLaDA-8B", *(tmp_path / "LLaDA-8B").iterdir()):
        path.chmod(0o755)
    return tmp_path / "LLaDA-8B"


@pytest.fixture
def qwen(make_lm, tmp_path) -> Path:
    """A plain autoregressive checkpoint."""
    make_lm("qwen3", seed=3).save(tmp_path / "Qwen3")
    configure(tmp_path / "Qwen3", diffusion=None, is_causal=None)
    return tmp_path / "Qwen3"


@pytest.fixture
def adapter(tmp_path):
    """Makes an adapter that changes a model."""

    def make(model: Path) -> Path:
        from peft import LoraConfig, get_peft_model

        adapted = get_peft_model(load(model).model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.save_pretrained(tmp_path / "lora")
        return tmp_path / "lora"

    return make


# --- the lines of its help


def test_a_checkpoint_is_described_and_nothing_is_written(llada):
    before = names(llada), names(llada.parent)
    done = run("convert", describe=str(llada))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "family        llada (published layout, mapped while loading)"
    assert "  model.transformer.wte.weight -> model.embed_tokens.weight (1)" in lines
    assert (names(llada), names(llada.parent)) == before


@pytest.mark.slow
def test_a_published_checkpoint_becomes_a_native_one_and_comes_back_bit_for_bit(llada, tmp_path):
    from transformers import AutoModelForCausalLM

    out, back = tmp_path / "new" / "out", tmp_path / "back"
    lines = convert(llada, out)
    assert only_ours(lines) and lines[-1] == f"model     {out}"
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(out).eval()(input_ids=IDS).logits
        assert torch.equal(plain, load(llada).logits(IDS))
    assert convert(out, back, to="original")[-1] == f"model     {back}"
    assert same_tensors(back, llada)
    assert config_of(back) == config_of(llada)
    assert names(tmp_path) == ["LLaDA-8B", "back", "new"]


def test_progress_is_told_once_for_every_amount(llada, tmp_path):
    lines = convert(llada, tmp_path / "out")
    assert lines == ["convert: MiB 1/1", f"model     {tmp_path / 'out'}"]


def test_a_decoder_becomes_a_masked_diffusion_model(qwen, tmp_path):
    convert(qwen, tmp_path / "out", to="mdlm", shift_logits="true")
    made = config_of(tmp_path / "out")
    assert made["is_causal"] is False
    assert (made["diffusion"]["attention"], made["diffusion"]["shift_logits"]) == ("full", True)
    assert same_tensors(tmp_path / "out", qwen)


def test_a_decoder_becomes_a_block_diffusion_model_in_another_type_and_several_files(qwen, tmp_path):
    out = tmp_path / "out"
    convert(qwen, out, to="bd3lm", block_size="8", model__dtype="bfloat16", shard_gb="0.00005")
    made = config_of(out)
    assert (made["diffusion"]["attention"], made["diffusion"]["block_size"]) == ("block_causal", 8)
    assert len(list(out.glob("*.safetensors"))) > 1
    assert {tensor.dtype for tensor in stored(out).values()} == {torch.bfloat16}
    assert load(out).spec.block_size == 8


@pytest.mark.slow
def test_an_adapter_is_merged(qwen, adapter, tmp_path):
    lora = adapter(qwen)
    lines = convert(qwen, tmp_path / "out", model__adapter=str(lora))
    assert same_logits(tmp_path / "out", qwen, adapter=lora)
    assert not same_logits(tmp_path / "out", qwen)
    assert only_ours(lines), lines


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_layout_of_its_family(llada, adapter, tmp_path):
    lora = adapter(llada)
    convert(llada, tmp_path / "out", model__adapter=str(lora), to="original")
    assert config_of(tmp_path / "out") == config_of(llada)
    assert stored(tmp_path / "out").keys() == stored(llada).keys()
    assert same_logits(tmp_path / "out", llada, adapter=lora)
    assert [path for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def test_a_training_checkpoint_in_parts_becomes_a_model(qwen, tmp_path):
    import torch.distributed.checkpoint as dcp

    lm = load(qwen)
    dcp.save({"model": lm.model.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    lm.model.config.save_pretrained(tmp_path / "checkpoint")
    lm.tokenizer.save_pretrained(tmp_path / "checkpoint")
    lines = convert(tmp_path / "checkpoint", tmp_path / "out")
    assert same_tensors(tmp_path / "out", qwen)
    assert only_ours(lines), lines


def test_an_existing_directory_is_replaced_when_told(llada, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    (out / "config.json").touch()
    words = command("convert", {"model.path": str(llada), "output_dir": str(out)})
    done = subprocess.run([*words, "--overwrite"], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "config.json" in names(out) and "old" not in names(out)
    assert names(tmp_path) == ["LLaDA-8B", "out"]


def test_a_directory_that_holds_no_model_is_never_replaced(llada, tmp_path):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("precious")
    done = run("convert", model__path=str(llada), output_dir=str(out), overwrite="true")
    assert done.returncode == 2
    assert done.stderr == f"error: {out} exists and holds no model, so it isn't replaced; name another --output_dir\n"
    assert (out / "thesis.tex").read_text() == "precious"


def test_a_model_may_be_converted_in_its_place(llada, golden):
    convert(llada, llada, overwrite="true")
    assert config_of(llada)["model_type"] == "llama"
    assert same_logits(llada, golden / "llada" / "checkpoint")
    assert names(llada.parent) == [llada.name]


# --- kills and interrupts


@pytest.fixture(scope="module")
def large(make_lm, tmp_path_factory) -> Path:
    """A model of some 200 MiB, so that there is a middle to be killed in."""
    path = tmp_path_factory.mktemp("large") / "model"
    make_lm("llama", hidden_size=512, num_hidden_layers=12).save(path)
    return path


def start(model: Path, output_dir: Path, **settings: str) -> subprocess.Popen:
    """Begins to convert a model, in many files."""
    words = {"model.path": str(model), "output_dir": str(output_dir), "shard_gb": "0.005"} | settings
    return subprocess.Popen(
        command("convert", words),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def in_the_middle(process: subprocess.Popen, output_dir: Path) -> Path:
    """Waits until some of the files are written; returns the folder they are in."""
    while True:
        found = [path for path in output_dir.parent.iterdir() if path.name.endswith(".partial")]
        if found and len(list(found[0].glob("*.safetensors"))) > 1:
            return found[0]
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize("exists", [False, True], ids=["new", "existing"])
def test_a_kill_leaves_what_was_there_and_the_same_command_then_succeeds(large, tmp_path, exists):
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        (out / "config.json").write_text("old")
    process = start(large, out, overwrite="true")
    debris = in_the_middle(process, out)
    process.kill()
    process.wait()
    assert not (debris / "config.json").exists()
    assert names(tmp_path) == sorted([debris.name] + ["out"] * exists)
    assert not exists or names(out) == ["config.json"]

    convert(large, out, overwrite="true")
    assert names(tmp_path) == ["out"]
    assert same_tensors(out, large)


@pytest.mark.slow
def test_an_interrupt_leaves_nothing(large, tmp_path):
    process = start(large, tmp_path / "out")
    in_the_middle(process, tmp_path / "out")
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert (process.returncode, error) == (130, "interrupted\n")
    assert names(tmp_path) == []


@pytest.mark.slow
def test_two_at_once_leave_one_whole_directory(large, tmp_path):
    out = tmp_path / "out"
    kinds = [{"to": "mdlm"}, {"to": "bd3lm", "block_size": "8"}]
    both = [start(large, out, overwrite="true", **kind) for kind in kinds]
    ends = [(process.communicate()[1], process.returncode) for process in both]
    assert ("", 0) in ends
    assert all(end == ("", 0) or (end[1] == 2 and end[0].count("\n") == 1) for end in ends), ends
    assert names(tmp_path) == ["out"]
    assert same_tensors(out, large)
    assert config_of(out)["diffusion"]["attention"] in ("full", "block_causal")


@pytest.mark.slow
def test_a_full_disk_ends_with_one_line_and_leaves_what_was_there(large, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    words = command("convert", {"model.path": str(large), "output_dir": str(out), "overwrite": "true"})
    limit = 50 << 20  # no file may grow beyond it
    done = subprocess.run(
        words,
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 2
    assert done.stderr == f"error: {out} can't be written: File too large\n"
    assert names(tmp_path) == ["out"] and names(out) == ["config.json"]


# --- mistakes


@pytest.fixture
def fails(capfd, tmp_path):
    """Runs the job, which must fail; returns its one line, and makes sure that nothing was written."""
    job = load_job("convert")
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # as a job does before it imports anything
    transformers.logging.disable_progress_bar()

    def call(**settings) -> str:
        words = {"output_dir": str(tmp_path / "out")} | {
            name.replace("__", "."): value for name, value in settings.items()
        }
        argv = [word for name, value in words.items() if value is not None for word in (f"--{name}", str(value))]
        before = names(tmp_path)
        capfd.readouterr()  # what making the input printed
        status = run_job(job.ConvertJob, job.main, "", argv)
        out, error = capfd.readouterr()
        assert status == 2
        assert error.startswith("error: ") and error.count("\n") == 1, error
        assert "Traceback" not in out + error
        assert names(tmp_path) == before
        return error

    yield call
    transformers.logging.set_verbosity(verbosity)
    transformers.logging.enable_progress_bar()


def spoil(folder: Path, change) -> None:
    """Changes the tensors of a model, in place."""
    tensors = stored(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__path": None}, "model.path: name the model"),
        ({"output_dir": None}, "output_dir: name the directory to make"),
        ({"to": "llada"}, "to: expected one of 'native', 'mdlm', 'bd3lm', 'editflow', 'original', got llada"),
        ({"to": "bd3lm", "block_size": 0}, "block_size: must be at least 1, got 0"),
        ({"model__quantization": "4bit"}, "model.quantization: has no effect here"),
        ({"model__dtype": "float8"}, "model.dtype: expected one of 'float32', 'bfloat16', 'float16', 'auto'"),
        ({"shard_gb": 0}, "shard_gb: must be above 0, got 0.0"),
        ({"to": "original", "model__dtype": "bfloat16"}, "model.dtype: has no effect on --to original"),
        ({"to": "original", "shift_logits": "true"}, "shift_logits: has no effect on --to original"),
        ({"overwite": "true"}, "unknown option --overwite; did you mean overwrite?"),
        ({"model__path": "/no/such/model"}, "no such model directory: /no/such/model"),
        ({"describe": "/no/such/model"}, "no such model directory: /no/such/model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_can_not_be(fails, llada, settings, message):
    assert message in fails(**({"model__path": llada} | settings))


def test_an_existing_directory(fails, llada, tmp_path):
    (tmp_path / "out").mkdir()
    message = fails(model__path=llada)
    assert f"{tmp_path / 'out'} exists; name another --output_dir, or replace it with --overwrite" in message
    assert names(tmp_path / "out") == []


def test_an_output_that_is_a_file_or_below_one(fails, llada, tmp_path):
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'} is a file" in fails(model__path=llada, output_dir=tmp_path / "file", overwrite="true")
    below = tmp_path / "file" / "out"
    assert f"{below} can't be written: " in fails(model__path=llada, output_dir=below)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_directory_that_lacks_a_part(fails, llada, part):
    (llada / part).unlink()
    assert f"{llada}: no " in fails(model__path=llada)
    assert f"{llada}: no " in fails(describe=llada)


@pytest.mark.parametrize("describe", [False, True], ids=["convert", "describe"])
def test_a_missing_shard(fails, llada, tmp_path, describe):
    in_shards(llada, tmp_path / "shards")
    lost = sorted((tmp_path / "shards").glob("*.safetensors"))[1]
    count = len(load_file(lost))
    lost.unlink()
    message = fails(**({"describe": tmp_path / "shards"} if describe else {"model__path": tmp_path / "shards"}))
    index = "model.safetensors.index.json"
    assert f"{tmp_path / 'shards'}: shard {lost.name} is missing; {index} says it holds {count} tensors" in message


def in_shards(source: Path, target: Path) -> None:
    """A copy of a published checkpoint in several files."""
    load(source).save(target.with_name("native"))
    target.mkdir()
    to_original(str(target.with_name("native")), target, shard_bytes=100_000)


def test_a_shard_that_is_cut_off(fails, llada):
    file = llada / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    message = fails(model__path=llada)
    assert f"{file}: tensor " in message and "cut off or broken; copy or download it again" in message


def test_a_tensor_of_another_shape(fails, llada):
    spoil(llada, lambda tensors: tensors.update({"model.transformer.ln_f.weight": torch.ones(32)}))
    message = fails(model__path=llada)
    assert "tensor 'model.transformer.ln_f.weight' has the shape [32]; config.json asks for [64]" in message


def test_a_missing_tensor(fails, llada):
    spoil(llada, lambda tensors: tensors.pop("model.transformer.blocks.1.q_proj.weight"))
    message = fails(model__path=llada)
    assert "1 tensors are missing from the weights, first 'model.transformer.blocks.1.q_proj.weight'" in message
    assert "found 20, expected 21" in message


def test_a_leftover_tensor(fails, llada):
    spoil(llada, lambda tensors: tensors.update({"model.transformer.wpe.weight": torch.ones(1024, 64)}))
    message = fails(model__path=llada)
    assert "1 tensors have no place in the model, first 'model.transformer.wpe.weight' [1024, 64]" in message


def test_the_same_mistakes_in_a_native_directory(fails, qwen):
    whole = stored(qwen)
    name = "model.layers.1.mlp.up_proj.weight"
    spoil(qwen, lambda tensors: tensors.pop(name))
    assert f"1 tensors of Qwen3ForCausalLM are missing from the weights, first '{name}'" in fails(model__path=qwen)
    spoil(qwen, lambda tensors: tensors.update({name: whole[name][:5]}))
    assert f"first '{name}': found [5, 32], expected [128, 32]" in fails(model__path=qwen)
    spoil(qwen, lambda tensors: tensors.update({name: whole[name], "model.wpe.weight": torch.ones(3)}))
    assert "1 tensors have no place in Qwen3ForCausalLM, first 'model.wpe.weight'" in fails(model__path=qwen)


def test_an_unknown_model_type(fails, llada):
    configure(llada, model_type="nonsense", architectures=["NonsenseLM"])
    message = fails(model__path=llada)
    assert "model_type 'nonsense' is neither a published diffusion family (" in message and "llada2_moe" in message


def test_a_variant_that_can_not_be_mapped_exactly(fails, llada):
    configure(llada, alibi=True)
    message = fails(model__path=llada)
    assert "alibi is True; a llada checkpoint can only be mapped exactly with False" in message


def test_a_model_that_has_no_published_layout(fails, qwen):
    message = fails(model__path=qwen, to="original")
    assert f"{qwen}: is no converted checkpoint of a published family" in message and "qwen3" in message


def test_an_adapter_of_another_base(fails, qwen, adapter, make_lm, tmp_path):
    lora = adapter(qwen)
    make_lm("qwen3", hidden_size=64).save(tmp_path / "wider")
    message = fails(model__path=tmp_path / "wider", model__adapter=lora)
    assert f"{lora}: the adapter, made for {qwen}, doesn't fit {tmp_path / 'wider'} (Qwen3ForCausalLM)" in message


def test_a_directory_that_is_no_adapter(fails, qwen, tmp_path):
    message = fails(model__path=qwen, model__adapter=tmp_path)
    assert f"{tmp_path}: no adapter_config.json in it; expected a PEFT adapter directory" in message


def test_a_training_checkpoint_that_lost_a_part(fails, qwen, tmp_path):
    import torch.distributed.checkpoint as dcp

    lm = load(qwen)
    dcp.save({"model": lm.model.state_dict()}, checkpoint_id=tmp_path / "checkpoint", no_dist=True)
    lm.model.config.save_pretrained(tmp_path / "checkpoint")
    lm.tokenizer.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "__0_0.distcp").unlink()
    message = fails(model__path=tmp_path / "checkpoint")
    assert "__0_0.distcp" in message and "can't be written" not in message


def fails_as_a_process(tmp_path: Path, **settings) -> str:
    """Runs the job, which must fail; returns the one line on its standard error."""
    before = names(tmp_path)
    done = run("convert", output_dir=str(tmp_path / "out"), **{name: str(value) for name, value in settings.items()})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stdout
    assert names(tmp_path) == before
    return done.stderr


def test_a_mistake_is_one_line_of_the_process_too(llada, tmp_path):
    """Whatever libraries would say."""
    configure(llada, model_type="nonsense", architectures=["NonsenseLM"])
    assert f"error: {llada}: model_type 'nonsense' is " in fails_as_a_process(tmp_path, model__path=llada)


def test_a_wrong_adapter_is_one_line_of_the_process_too(qwen, adapter, make_lm, tmp_path):
    lora = adapter(qwen)
    make_lm("qwen3", hidden_size=64).save(tmp_path / "wider")
    message = fails_as_a_process(tmp_path, model__path=tmp_path / "wider", model__adapter=lora)
    assert f"error: {lora}: the adapter, made for {qwen}, doesn't fit {tmp_path / 'wider'}" in message
