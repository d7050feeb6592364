"""jobs/sft.py from end to end: what it leaves behind."""

import json

import pytest
import torch
import yaml
from jobs_testing import ROOT, command, complete, history, run, runs, train

pytestmark = pytest.mark.slow


def test_it_says_what_it_does(trained):
    folder, output = trained
    assert "500 rows read, 500 usable" in output
    assert "for 60 steps with 2 workers on cpu" in output
    assert "step 60/60  loss" in output
    assert f"mlflow ui --backend-store-uri sqlite:///{folder}/mlruns.db" in output


def test_the_model_opens_with_plain_transformers_and_gives_the_same_logits(trained):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    import dllm_ray

    final = trained[0] / "final"
    lm = dllm_ray.load(final)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(final).eval(), AutoTokenizer.from_pretrained(final)
    ids = torch.tensor([tokenizer("reverse 1234")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, lm.logits(ids))
    assert tokenizer.mask_token_id == lm.spec.mask_token_id


def test_the_resolved_settings_are_saved_with_every_checkpoint_and_the_model(trained):
    folder, _ = trained
    files = [*folder.glob("checkpoints/checkpoint_*/config.yaml"), folder / "final" / "config.yaml"]
    assert len(files) == 3  # two checkpoints are kept
    for file in files:
        settings = yaml.safe_load(file.read_text())
        assert settings["train"]["max_steps"] == 60
        assert settings["train"]["learning_rate"] == 1e-3  # resolved from null


def test_the_latest_checkpoint_is_kept(trained):
    states = [json.loads(file.read_text()) for file in trained[0].glob("checkpoints/checkpoint_*/state.json")]
    assert 60 in [state["step"] for state in states]
    assert all(state["valid_nll"] > 0 for state in states)


def test_mlflow_holds_parameters_metrics_tags_and_artifacts(trained):
    from mlflow import MlflowClient

    folder, _ = trained
    (found,) = runs(folder)
    assert found.info.status == "FINISHED"
    assert found.data.params["train.batch_size"] == "16"
    assert {"train/loss", "train/tokens_per_s", "valid/nll", "valid/ppl"} <= set(found.data.metrics)
    tags = found.data.tags
    assert tags["dllm_ray.checkpoint"] == str(folder / "final")
    assert (tags["dllm_ray.family"], tags["dllm_ray.objective"]) == ("bert", "mdlm")
    assert len(tags["dllm_ray.data_fingerprint"]) == 64
    artifacts = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlruns.db").list_artifacts(found.info.run_id)
    expected = {"config.yaml", "system.json", "data.json", "samples", "model_card.md"}
    assert {item.path for item in artifacts} == expected


def test_validation_improves(trained):
    values = history(trained[0], "valid/nll")
    assert min(values) == 0 and max(values) == 60
    assert values[60][0] < values[0][0]


def test_a_finished_run_is_not_trained_again(trained):
    folder, _ = trained
    before = (folder / "final" / "model.safetensors").stat().st_mtime
    again = train(folder, train__max_steps="60", train__checkpoint_every="20", observe__sample_rows="2")
    assert again.returncode == 0 and "finished already" in again.stdout
    assert (folder / "final" / "model.safetensors").stat().st_mtime == before


def test_a_decoder_trains_on_from_a_checkpoint(tmp_path, make_lm):
    make_lm("qwen3").save(tmp_path / "model")
    done = run(
        "sft",
        output_dir=str(tmp_path / "run"),
        model__path=str(tmp_path / "model"),
        data__path="builtin:digits[train:64]",
        data__padding="ignore",
        train__workers="1",
        train__max_steps="3",
        train__batch_size="8",
        train__max_length="48",
        sampler__max_new_tokens="8",
        sampler__block_size="8",
        sampler__steps="4",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "run" / "final" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["is_causal"] is False
    (found,) = runs(tmp_path / "run")
    assert found.data.params["train.learning_rate"] == "2e-05"


def test_an_adapter_on_4_bits_is_trained_on_a_model_that_stays_as_it_is_and_is_evaluated_by_itself(tmp_path, make_lm):
    make_lm("qwen3").save(tmp_path / "model")
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    sampler = {"sampler.max_new_tokens": "8", "sampler.block_size": "8", "sampler.steps": "4"}
    settings = {
        "output_dir": "run",
        "model.path": "model",  # relative, although workers run in a folder of their own
        "model.quantization": "4bit",
        "lora.rank": "4",
        "data.path": "builtin:digits[train:64]",
        "train.workers": "2",
        "train.max_steps": "4",
        "train.checkpoint_every": "2",
        "train.batch_size": "8",
        "train.max_length": "48",
        **sampler,
    }
    words = command("sft", settings)
    words[1] = str(ROOT / words[1])
    done = complete(words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "of them trained" in done.stdout
    final = tmp_path / "run" / "final"
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "model")
    assert not (final / "model.safetensors").exists()
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before
    words = {name.replace(".", "__"): value for name, value in sampler.items()}
    asked = {"evaluate__limit": "4", "evaluate__workers": "1", "model__quantization": "4bit"}
    scored = run("evaluate", model__path=str(final), output_dir=str(tmp_path / "scores"), **asked, **words)
    assert scored.returncode == 0, scored.stderr
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["n-samples"]["digits"]["effective"] == 4
    again = run("sft", model__path=str(final), data__path="builtin:digits[train:64]", output_dir=str(tmp_path / "no"))
    assert again.returncode == 2 and "is an adapter, and training starts from a model" in again.stderr


def test_runs_in_one_storage_keep_apart_and_fresh_starts_over(tmp_path):
    few = {"train__max_steps": "4", "train__workers": "1", "data__valid_rows": "0"}
    store = {"train__storage_path": str(tmp_path / "store")}
    for changes in ({}, {"fresh": "true"}):
        done = train(tmp_path / "a", **few, **store, **changes)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "for 4 steps" in done.stdout
    names = [folder.name.partition("-")[0] for folder in (tmp_path / "store").glob("*-*")]
    assert names == ["a", "a"]


def test_a_run_that_diverges_stops_with_the_step_and_keeps_the_last_good_checkpoint(tmp_path):
    wild = {"train__learning_rate": "1e30", "train__warmup": "0", "train__clip_norm": "0", "train__workers": "1"}
    done = train(tmp_path / "run", **wild)
    assert done.returncode == 1
    assert "the run diverged at step" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "final").exists()
    (found,) = runs(tmp_path / "run")
    assert found.info.status == "FAILED"
