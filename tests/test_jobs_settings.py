"""The settings of the real jobs: all explained, all files in `configs/` readable, nothing heavy imported for them."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dllm_ray.cli import run_job
from dllm_ray.config import leaf_types, parse

ROOT = Path(__file__).resolve().parents[1]
SFT, PRETRAIN, SAMPLE, CHAT, SERVE, EVALUATE, SWEEP, COMPARE, CONVERT, PIPELINE, DOCTOR, BENCHMARK, *OTHERS = jobs = (
    ("sft", "SFTJob"),
    ("pretrain", "PretrainJob"),
    ("sample", "SampleJob"),
    ("chat", "ChatJob"),
    ("serve", "ServeConfig"),
    ("evaluate", "EvaluateJob"),
    ("sweep", "SweepJob"),
    ("compare", "CompareJob"),
    ("convert", "ConvertJob"),
    ("pipeline", "PipelineJob"),
    ("doctor", "DoctorConfig"),
    ("benchmark", "TrainBenchmark"),
    ("benchmark", "SampleBenchmark"),
    ("benchmark", "LikelihoodBenchmark"),
    ("benchmark", "ServeBenchmark"),
)
SAMPLE_BENCHMARK, LIKELIHOOD_BENCHMARK, SERVE_BENCHMARK = OTHERS
SMALLEST = {
    SFT: ["--data.path", "chats.jsonl"],
    PRETRAIN: ["--data.path", "book.txt"],
    SAMPLE: ["--model.path", "m", "--prompt", "hi"],
    CHAT: ["--model.path", "m"],
    SERVE: ["--model.path", "m"],
    EVALUATE: ["--model.path", "m"],
    SWEEP: ["--model.path", "m"],
    COMPARE: ["--tracking.uri", "sqlite:///x.db"],
    CONVERT: ["--model.path", "m", "--output_dir", "out"],
    PIPELINE: [],
    DOCTOR: [],
    BENCHMARK: [],
    SAMPLE_BENCHMARK: [],
    LIKELIHOOD_BENCHMARK: [],
    SERVE_BENCHMARK: [],
}
"""The options without which a job can't know what to do."""
OF_FILE = {
    "benchmark/sample.yaml": SAMPLE_BENCHMARK,
    "benchmark/likelihood.yaml": LIKELIHOOD_BENCHMARK,
    "benchmark/serve.yaml": SERVE_BENCHMARK,
    "benchmark/serve_vocabulary.yaml": SERVE_BENCHMARK,
    "benchmark/serve_cache.yaml": SERVE_BENCHMARK,
}
"""The jobs of settings files that aren't the first job of their folder's name."""
NEEDS = {name: ["--data.path", "x"] for name in ("gsm8k_tiny.yaml", "gsm8k.yaml", "tiny.yaml")} | {
    name: ["--model.path", "m"] for name in ("parallelism.yaml", "eos.yaml")
}
NEEDS["several.yaml"] = ["--insecure", "true"]  # or keys, in the environment
"""The options that a settings file leaves to the user."""
CLUSTERS = set((ROOT / "configs" / "clusters").glob("*.yaml"))
"""Files of no job, which have a test of their own."""


def job_class(name: str, class_name: str) -> type:
    spec = importlib.util.spec_from_file_location(f"jobs_{name}", ROOT / "jobs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return getattr(module, class_name)


every_job = pytest.mark.parametrize("job", jobs, ids=lambda job: job[1])


@every_job
def test_every_setting_is_explained_in_help(job, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    settings = job_class(*job)
    with pytest.raises(SystemExit) as stop:
        parse(settings, ["--help"], "job", "A job.")
    assert stop.value.code == 0
    said = capsys.readouterr().out
    unexplained = []
    for name in leaf_types(settings):
        entry = re.search(rf"^  --{re.escape(name)}[ ,].*?(?=^  -|^\S|\Z)", said, re.MULTILINE | re.DOTALL)
        words = re.split(r"\s{2,}", entry[0].strip(), maxsplit=1)[1].partition("(type:")[0] if entry else ""
        if not re.search(r"\w+", words):
            unexplained.append(name)
    assert unexplained == []


@every_job
def test_printed_settings_read_back_to_the_same(job, capsys, tmp_path):
    settings = job_class(*job)
    argv = SMALLEST[job]
    with pytest.raises(SystemExit):
        parse(settings, [*argv, "--print_config"], "job", "A job.")
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    assert parse(settings, ["--config", str(path)], "job", "A job.") == parse(settings, argv, "job", "A job.")


@pytest.mark.parametrize(
    "path",
    sorted(set((ROOT / "configs").glob("*/*.yaml")) - CLUSTERS),
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_settings_file_fits_its_job(path):
    job = OF_FILE.get(f"{path.parent.name}/{path.name}") or next(job for job in jobs if job[0] == path.parent.name)
    parse(job_class(*job), ["--config", str(path), *NEEDS.get(path.name, [])], "job", "A job.")


@pytest.mark.parametrize(
    ("job", "argv", "said"),
    [
        (SFT, [], "data.path: name the training data"),
        (SFT, ["--data.path", "x", "--train.batchsize", "2"], "did you mean train.batch_size?"),
        (SFT, ["--data.path", "x", "--train.workers", "8", "--train.batch_size", "4"], "train.batch_size: "),
        (SFT, ["--data.path", "x", "--train.max_length", "5000"], "train.max_length: 5000 exceeds"),
        (SFT, ["--data.path", "x", "--train.betas", "[0.9, 1.5]"], "train.betas: "),
        (SFT, ["--data.path", "x", "--train.warmup", "2"], "train.warmup: "),
        (SFT, ["--data.path", "x", "--model.adapter", "a"], "model.path: an adapter or quantization needs a model"),
        (SFT, ["--data.path", "x", "--model.path", "m", "--model.adapter", "a"], "model.adapter: "),
        (SFT, ["--data.path", "x", "--model.path", "m", "--model.quantization", "4bit"], "model.quantization: "),
        (
            SFT,
            ["--data.path", "x", "--model.scratch.hidden_size", "30"],
            "model.scratch.hidden_size: must be a multiple",
        ),
        (SFT, ["--data.path", "x", "--model.scratch.vocab_size", "10"], "model.scratch.vocab_size: "),
        (SFT, ["--data.path", "x", "--objective.time_epsilon", "1"], "objective.time_epsilon: "),
        (
            SFT,
            ["--data.path", "x", "--sampler.max_new_tokens", "null"],
            "sampler.max_new_tokens: set max_new_tokens or",
        ),
        (SFT, ["--data.path", "x", "--sampler.temperature", "-1"], "sampler.temperature: "),
        (SFT, ["--data.path", "x", "--data.shuffle_mb", "0"], "data.shuffle_mb: "),
        (SAMPLE, ["--prompt", "hi"], "model.path: name the model"),
        (SAMPLE, ["--model.path", "m"], "prompt: give one question"),
        (SAMPLE, ["--model.path", "m", "--prompt", "hi", "--prompts", "f"], "prompt: give one question"),
        (SAMPLE, ["--model.path", "m", "--prompts", "f", "--limit", "0"], "limit: must be at least 1"),
        (EVALUATE, [], "model.path: name the model"),
        (EVALUATE, ["--model.path", "m", "--evaluate.tasks", "[]"], "evaluate.tasks: "),
        (EVALUATE, ["--model.path", "m", "--evaluate.variants", "[{step: 4}]"], "evaluate.variants: "),
        (EVALUATE, ["--model.path", "m", "--evaluate.variants", "[{steps: 0}]"], "evaluate.variants: "),
        (CHAT, [], "model.path: name the model"),
        (CHAT, ["--model.path", "m", "--show", "loud"], "show: expected one of 'step', 'confidence', 'off'"),
        (BENCHMARK, ["--rounds", "0"], "rounds: must be at least 1"),
        (SAMPLE_BENCHMARK, ["--batch_sizes", "[0]"], "batch_sizes: expected numbers of at least 1"),
        (SAMPLE_BENCHMARK, ["--algorithms", "[fast]"], "algorithms: expected some of mdlm, "),
    ],
)
def test_what_cannot_work_is_refused_before_the_job_starts(job, argv, said, capsys):
    assert run_job(job_class(*job), lambda settings: pytest.fail("the job ran"), "A job.", argv) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def python(*argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import dllm_ray, dllm_ray.config, dllm_ray.errors",
        "import runpy; sys.argv = ['sft.py', '--help']\n"
        "try: runpy.run_path('jobs/sft.py', run_name='__main__')\n"
        "except SystemExit: pass",
    ],
    ids=["import", "help"],
)
def test_torch_transformers_and_ray_are_not_imported_for_the_package_or_for_help(code):
    heavy = "{'torch', 'transformers', 'ray', 'mlflow', 'datasets', 'lm_eval'}"
    done = python("-c", f"import sys\n{code}\nprint('heavy:', sorted({heavy} & set(sys.modules)))")
    assert done.stdout.splitlines()[-1:] == ["heavy: []"], done.stderr


def test_the_settings_parser_is_imported_only_to_parse():
    done = python("-c", "import sys, dllm_ray, dllm_ray.config\nprint('jsonargparse' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_a_job_started_with_bad_input_shows_one_line_and_no_traceback():
    done = python("jobs/sft.py", "--data.path", "x", "--train.batchsize", "2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: unknown option --train.batchsize; did you mean train.batch_size?\n"


def test_a_benchmark_of_unknown_kind_is_refused():
    done = python("jobs/benchmark.py", "fly")
    assert (done.returncode, done.stderr) == (
        2,
        "error: benchmark 'fly' is unknown; expected one of train, sample, likelihood, serve\n",
    )
