"""`run_job`: exit status and what a user sees on stderr."""

import json
from dataclasses import dataclass, field

import pytest

from dllm_ray import errors
from dllm_ray.cli import run_job


@dataclass
class Job:
    rows: int = 1
    """Rows."""


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "TRANSFORMERS_VERBOSITY", "TQDM_DISABLE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")


def test_a_job_that_does_what_it_says_exits_with_0(capsys):
    seen = []
    assert run_job(Job, seen.append, "A job.", ["--rows", "3"]) == 0
    assert seen == [Job(rows=3)]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("argv", [["--row", "3"], ["--rows", "x"], ["--config", "none.yaml"], ["stray"]])
def test_bad_input_exits_with_2_and_one_line_before_anything_runs(capsys, argv):
    assert run_job(Job, lambda job: pytest.fail("the job ran"), "A job.", argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.ConfigError("m", "f"), 2),
        (errors.DataError("m"), 2),
        (errors.ModelError("m"), 2),
        (errors.OutputError("m"), 2),
        (errors.ResourceError("m"), 2),
        (errors.EvaluationError("m"), 2),
        (errors.TrainingError("m"), 1),
    ],
)
def test_each_user_error_has_its_exit_status(capsys, error, status):
    def main(job):
        raise error

    assert run_job(Job, main, "A job.", []) == status
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupted_job_exits_with_130(capsys):
    def main(job):
        raise KeyboardInterrupt

    assert run_job(Job, main, "A job.", []) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_defect_of_ours_shows_its_traceback():
    def main(job):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_job(Job, main, "A job.", [])


def test_help_exits_with_0_and_keeps_the_description_as_written(capsys):
    with pytest.raises(SystemExit) as stop:
        run_job(Job, pytest.fail, "A job.\n\n    python job.py   # twice", ["--help"])
    assert stop.value.code == 0
    assert "A job.\n\n    python job.py   # twice" in capsys.readouterr().out


def test_an_error_can_cross_process_borders():
    """Ray sends a worker's error to the driver pickled."""
    import pickle

    error = pickle.loads(pickle.dumps(errors.ConfigError("is wrong", "train.rows")))
    assert (str(error), error.field, error.message) == ("train.rows: is wrong", "train.rows", "is wrong")


@dataclass
class ModelSection:
    path: str | None = None
    """Model."""


@dataclass
class SamplerSection:
    block_size: int | None = 32
    """Block."""
    steps: int = 128
    """Steps."""


@dataclass
class SamplingJob:
    model: ModelSection = field(default_factory=ModelSection)
    """Model."""
    sampler: SamplerSection = field(default_factory=SamplerSection)
    """Sampler."""


def model_with(folder, sampler) -> str:
    (folder / "config.json").write_text(json.dumps({"diffusion": {"sampler": sampler}}))
    return str(folder)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (None, 7)),
        (["--sampler.steps", "9"], (None, 9)),
        (["--sampler.block_size", "4"], (4, 7)),
    ],
)
def test_a_models_own_sampler_settings_are_defaults_that_options_override(tmp_path, words, expected):
    path = model_with(tmp_path, {"block_size": None, "steps": 7})
    seen = []
    assert run_job(SamplingJob, seen.append, "A job.", ["--model.path", path, *words]) == 0
    assert (seen[0].sampler.block_size, seen[0].sampler.steps) == expected


def test_files_override_a_models_own_sampler_settings(tmp_path):
    path = model_with(tmp_path, {"steps": 7})
    (tmp_path / "job.yaml").write_text(f"model: {{path: {path}}}\nsampler: {{steps: 8}}\n")
    seen = []
    assert run_job(SamplingJob, seen.append, "A job.", ["--config", str(tmp_path / "job.yaml")]) == 0
    assert seen[0].sampler.steps == 8


def test_an_adapter_samples_like_its_base(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    adapter = {"base_model_name_or_path": model_with(base, {"steps": 7})}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    seen = []
    assert run_job(SamplingJob, seen.append, "A job.", ["--model.path", str(tmp_path)]) == 0
    assert seen[0].sampler.steps == 7


@pytest.mark.parametrize("content", ["{", "[]", '{"diffusion": 3}', '{"diffusion": {"sampler": 3}}', None])
def test_a_model_that_cannot_be_read_sets_nothing_here(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    seen = []
    assert run_job(SamplingJob, seen.append, "A job.", ["--model.path", str(tmp_path)]) == 0
    assert seen[0].sampler == SamplerSection()


def test_a_models_sampler_setting_that_does_not_exist_is_named(tmp_path, capsys):
    path = model_with(tmp_path, {"stepz": 7})
    assert run_job(SamplingJob, lambda job: None, "A job.", ["--model.path", path]) == 2
    assert "stepz" in capsys.readouterr().err
