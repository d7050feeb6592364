"""Every mistake of a user ends with status 2 and one message that says what and where, before Ray starts."""

import json
import shutil
from pathlib import Path

import pytest
import ray
from jobs_testing import TINY, load_job

from dllm_ray.cli import run_job

sft, sample, evaluate, sweep = (load_job(name) for name in ("sft", "sample", "evaluate", "sweep"))
JOBS = {
    "sft": (sft.SFTJob, sft.main),
    "sample": (sample.SampleJob, sample.main),
    "evaluate": (evaluate.EvaluateJob, evaluate.main),
    "sweep": (sweep.SweepJob, sweep.main),
}


@pytest.fixture
def fails(monkeypatch, capsys, tmp_path):
    """Runs a job that must fail; returns its one message."""

    def no_ray(*_args, **_kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", no_ray)

    def call(name: str, **settings) -> str:
        words = {key.replace("__", "."): value for key, value in settings.items()}
        words = (TINY if name == "sft" else {}) | {"output_dir": str(tmp_path / "out")} | words
        job, main = JOBS[name]
        argv = [word for key, value in words.items() if value is not None for word in (f"--{key}", str(value))]
        capsys.readouterr()  # what making the input printed
        status = run_job(job, main, "", argv)
        out, err = capsys.readouterr()
        assert status == 2
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert "Traceback" not in out + err
        return err

    return call


def write(path: Path, *rows) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


ROW = {"prompt": "sort 21", "response": "12"}


def test_a_missing_file(fails, tmp_path):
    path = str(tmp_path / "gone.jsonl")
    assert f"no such file, folder or pattern: {path}" in fails("sft", data__path=path)


def test_an_empty_file(fails, tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert f"{path}: the file is empty" in fails("sft", data__path=path)


def test_a_broken_line(fails, tmp_path):
    path = write(tmp_path / "rows.jsonl", *[ROW] * 16, '{"prompt": "sort 21", "resp\n', *[ROW] * 9)
    message = fails("sft", data__path=path)
    assert f"{path}, line 17: not valid JSON" in message and '{"prompt": "sort 21", "resp' in message


def test_a_missing_column(fails, tmp_path):
    path = write(tmp_path / "rows.jsonl", {"prompt": "sort 21", "completion": "12"})
    message = fails("sft", data__path=path)
    assert f"{path}, line 1: the columns 'prompt', 'completion'" in message and "data.columns" in message


def test_no_usable_row(fails, tmp_path):
    path = write(tmp_path / "rows.jsonl", *[{"prompt": "sort 21", "response": " "}] * 3)
    message = fails("sft", data__path=path)
    assert "empty answer" in message and f"{path}, line 1" in message and "sort 21" in message


def test_a_max_length_shorter_than_every_prompt(fails):
    message = fails("sft", train__max_length="3")
    assert "prompt longer than max_length" in message and "builtin:digits[train], row 0" in message


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("train.batch_sise", "8", "unknown option --train.batch_sise; did you mean train.batch_size?"),
        ("train.batch_size", "many", "train.batch_size: expected int, got many"),
        ("train.batch_size", "0", "train.batch_size: must be at least 1, got 0"),
        ("train.precision", "fp8", "train.precision: expected one of 'bf16', 'float32', got fp8"),
        ("train.max_length", "65", "train.max_length: 65 exceeds model.scratch.max_position_embeddings (64)"),
        ("seed", "-1", "seed: must lie between 0 and 2^32 - 1, got -1"),
        ("sampler.steps", "0", "sampler.steps: must be at least 1, got 0"),
        ("model.scratch.architecture", "berd", "architecture 'berd' is not"),
        ("model.scratch.extra", "{hidden_act: swosh}", "these sizes and extra don't make a bert"),
        ("model.scratch.vocab_size", "257", "vocab_size 257 is too small"),
        ("model.adapter", "adapter", "model.path: an adapter or quantization needs a model to load"),
        ("data.columns", "{query: question}", "'query' is no column of ours"),
        ("data.padding", "block", "data.padding: block fills up blocks: it needs objective.name bd3lm"),
        ("data.max_tokens_per_batch", "9", "data.max_tokens_per_batch: "),
        ("config", "gone.yaml", "no such settings file: gone.yaml"),
    ],
)
def test_settings_that_can_not_be(fails, setting, value, message):
    assert message in fails("sft", **{setting: value})


def test_an_unknown_key_in_a_file(fails, tmp_path):
    path = write(tmp_path / "job.yaml", "train:\n  max_step: 3\n")
    assert f"{path}: unknown key 'train.max_step'; did you mean train.max_steps?" in fails("sft", config=path)


@pytest.fixture
def model(make_lm, tmp_path) -> Path:
    """A directory with a good model."""
    make_lm().save(tmp_path / "model")
    return tmp_path / "model"


def jobs_on(model: Path, tmp_path: Path) -> dict[str, dict[str, str]]:
    """The settings with which each job opens a model."""
    prompts = write(tmp_path / "prompts.jsonl", {"prompt": "sort 21"})
    return {
        "sft": {"model.path": str(model)},
        "sample": {"model.path": str(model), "prompts": prompts},
        "evaluate": {"model.path": str(model), "sampler.max_new_tokens": "8"},
        "sweep": {"model.path": str(model), "sampler.max_new_tokens": "8", "sweep.space": "{temperature: [0, 1]}"},
    }


@pytest.mark.parametrize("job", JOBS)
class TestModels:
    def test_no_such_directory(self, fails, tmp_path, job):
        path = tmp_path / "gone"
        assert f"no such model directory: {path}" in fails(job, **jobs_on(path, tmp_path)[job])

    def test_no_weights(self, fails, tmp_path, model, job):
        (model / "model.safetensors").unlink()
        assert f"{model}: no weights in it" in fails(job, **jobs_on(model, tmp_path)[job])

    def test_no_tokenizer(self, fails, tmp_path, model, job):
        for file in model.glob("tokenizer*"):
            file.unlink()
        assert f"{model}: no tokenizer in it" in fails(job, **jobs_on(model, tmp_path)[job])

    def test_a_broken_config(self, fails, tmp_path, model, job):
        (model / "config.json").write_text("{")
        assert "config.json" in fails(job, **jobs_on(model, tmp_path)[job])

    def test_an_output_that_can_not_be_written(self, fails, tmp_path, model, job):
        (tmp_path / "file").touch()
        settings = jobs_on(model, tmp_path)[job] | {"output_dir": str(tmp_path / "file" / "out")}
        assert f"output_dir {tmp_path / 'file' / 'out'} can't be written" in fails(job, **settings)


def test_a_folder_without_write_permission(fails):
    folder = "/sys/kernel/run"  # where not even root may make a folder
    assert f"output_dir {folder} can't be written: " in fails("sft", output_dir=folder)


def test_a_context_shorter_than_the_rows(fails, tmp_path, model):
    message = fails("sft", model__path=model, train__max_length="65")
    assert "train.max_length: 65 exceeds the model's context of 64" in message


@pytest.mark.parametrize("job", ["evaluate", "sweep"])
def test_an_answer_that_fills_the_context(fails, tmp_path, model, job):
    message = fails(job, **jobs_on(model, tmp_path)[job] | {"sampler.max_new_tokens": "64"})
    assert "sampler.max_new_tokens: 64 leaves no room for a prompt in the model's context of 64" in message


@pytest.mark.parametrize("job", JOBS)
def test_fewer_steps_than_blocks(fails, tmp_path, model, job):
    few = {"sampler.max_new_tokens": 32, "sampler.block_size": 8, "sampler.steps": 3}
    message = fails(job, **jobs_on(model, tmp_path)[job] | few)
    assert "sampler.steps: 3 steps are fewer than the 4 blocks of the answer" in message


def test_no_prompt_and_two_prompts(fails, model):
    assert "give one question with --prompt, or a file with --prompts" in fails("sample", model__path=model)
    message = fails("sample", model__path=model, prompt="a", prompts="b.jsonl")
    assert "give one question with --prompt, or a file with --prompts" in message


def test_a_prompts_file_without_a_question(fails, tmp_path, model):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "sort 21"}, {"text": "sort 21"})
    message = fails("sample", model__path=model, prompts=path)
    assert f"{path}, line 2: no messages, prompt, instruction or question" in message


def test_a_prompt_that_is_too_long_for_the_model(fails, tmp_path, model):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "sort 21"}, {"prompt": "9" * 60})
    message = fails("sample", model__path=model, prompts=path, sampler__max_new_tokens=8)
    assert "prompt 2 has" in message and "doesn't fit the model's context of 64" in message


def test_prompts_that_are_no_text(fails, tmp_path, model):
    assert "not valid Unicode" in fails("sample", model__path=model, prompt="a\udcff")
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "\\ud800"}\n')
    assert f"{path}, line 1: prompt is not valid Unicode" in fails("sample", model__path=model, prompts=path)


def test_unknown_columns_of_a_prompts_file(fails, tmp_path, model):
    path = write(tmp_path / "prompts.jsonl", {"prompt": "sort 21"})
    assert "'foo' is no column of ours" in fails("sample", model__path=model, prompts=path, columns="{foo: bar}")


def test_one_file_of_several_without_a_usable_row(fails, tmp_path):
    good = write(tmp_path / "good.jsonl", *[ROW] * 20)
    bad = write(tmp_path / "bad.jsonl", {"question": "sort 21", "answer": ""})
    message = fails("sft", data__path=json.dumps([good, bad]))
    assert f"{bad}: none of its 1 rows can be used: empty answer" in message


def test_a_model_that_is_not_named(fails):
    assert "model.path: name the model" in fails("evaluate")


def test_a_variant_with_an_unknown_field(fails, model):
    message = fails("evaluate", model__path=model, evaluate__variants="[{stepps: 4}]")
    assert "evaluate.variants: {'stepps': 4}: sampler: unknown key 'stepps'; did you mean steps?" in message
    message = fails("evaluate", model__path=model, evaluate__variants="[{block_size: x}]")
    assert "evaluate.variants: {'block_size': 'x'}: sampler: block_size: expected int or null, got x" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sweep.space": "{}"}, "sweep.space: name at least one field of sampler and its values"),
        (
            {"sweep.space": "{temprature: [0, 1]}"},
            "no field of the sampler is called 'temprature'; the nearest: temper",
        ),
        ({"sweep.space": "{temperature: {unifrom: [0, 1]}}"}, "unknown kind 'unifrom'; did you mean uniform?"),
        ({"sweep.space": "{temperature: {uniform: [0, 1]}}"}, "a grid needs a list of values, not a range"),
        ({"sweep.space": "{steps: [1, 2], block_size: [1]}"}, "no combination is possible; the first, steps=1,block_"),
        ({"sweep.metric": "exact_mach"}, "sweep.metric: task digits has no metric 'exact_mach', but exact_match"),
        ({"sweep.metric": "exact_match,strict"}, "sweep.metric: task digits has no filter 'strict', but none"),
        ({"sweep.documents": "501"}, "sweep.documents: 501 documents for the search and 0 held-out ones are more than"),
        ({"sweep.holdout": "500"}, "sweep.holdout: 0 documents for the search and 500 held-out ones are more than"),
        (
            {"sweep.documents": "9", "sweep.holdout": "2", "evaluate.limit": "10"},
            "there are: 10 (of 500, evaluate.limi",
        ),
        ({"sweep.asha": "true"}, "sweep.asha: settings are dropped by one number: set objectives to [score]"),
        (
            {"sweep.asha": "true", "sweep.objectives": "[score]", "evaluate.limit": "40"},
            "sweep.first_documents: the first settings are dropped after 32 documents, and the search has only 27",
        ),
        ({"sweep.searcher": "nsga2", "sweep.objectives": "[score]"}, "sweep.objectives: nsga2 weighs two objectives"),
        ({"sweep.searcher": "bayes"}, "sweep.searcher: expected one of 'grid', 'random', 'tpe', 'nsga2', got bayes"),
        ({"sweep.background": "llada/GSM9K"}, "llada/GSM9K"),
        ({"line": "gsm8k"}, "line: chooses among the lines of evaluate.suite, and there are none"),
        (
            {"line": "gsm9k", "evaluate.suite": "[{task: digits}, {task: gsm8k_file}]"},
            "line: no line 'gsm9k'; the nearest: gsm8k_file",
        ),
        (
            {"evaluate.suite": "[{task: digits}, {task: digits, name: again}]"},
            "line: the suite has several lines: name one, e.g. --line gsm8k_cot",
        ),
        ({"evaluate.tasks": "[bbh_choice_file]"}, "bbh_choice_file"),
    ],
)
def test_sweeps_that_can_not_be(fails, tmp_path, model, settings, message):
    assert message in fails("sweep", **jobs_on(model, tmp_path)["sweep"] | settings)
    assert not (tmp_path / "out").exists()


def test_a_sweep_in_a_folder_of_another(fails, tmp_path, model):
    from dllm_ray.answers import model_key
    from dllm_ray.config import parse
    from dllm_ray.tuning.sweep import State, state_key

    settings = jobs_on(model, tmp_path)["sweep"]
    argv = [word for name, value in settings.items() for word in (f"--{name}", value)]
    job = parse(sweep.SweepJob, argv, "", "")
    (tmp_path / "out").mkdir()
    State(tmp_path / "out", state_key(model_key(job.model), job.sweep, job.ask(), job.seed), fresh=False)
    left = (tmp_path / "out" / "state.json").read_text()
    for changed in ({"sweep.space": "{temperature: [0, 2]}"}, {"seed": "1"}, {"sampler.eos_penalty": "1.0"}):
        message = fails("sweep", **settings | changed)
        assert "holds a sweep with other settings" in message and next(iter(changed)) in message
        assert "--fresh" in message
    assert (tmp_path / "out" / "state.json").read_text() == left


def test_a_tracking_database_that_is_none(fails, tmp_path, model):
    path = write(tmp_path / "mlruns.db", "not a database, but long enough to be taken for one. " * 20)
    message = fails("evaluate", model__path=model, sampler__max_new_tokens=8, tracking__uri=f"sqlite:///{path}")
    assert f"tracking.uri sqlite:///{path} can't be used" in message


def test_nothing_is_left_of_a_model_that_was_there(fails, tmp_path, model):
    shutil.copytree(model, tmp_path / "out" / "final")
    assert "is not from a run of this job" in fails("sft", fresh="true")
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()
