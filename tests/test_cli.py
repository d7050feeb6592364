"""`run_job`: exit status and what a user sees on stderr."""

from dataclasses import dataclass

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
