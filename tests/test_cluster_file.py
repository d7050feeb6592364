"""A cluster file sets resources and storage, the same for every job, and nothing else."""

import importlib
from pathlib import Path

import pytest
import yaml

from dllm_ray.cluster_file import SETTINGS, VARIABLE, ClusterFile
from dllm_ray.config import leaf_types, parse
from dllm_ray.errors import ConfigError
from jobs.sft import SFTJob

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs" / "clusters").glob("*.yaml"))
JOBS = {
    ("jobs.sft", "SFTJob"): ["--data.path", "builtin:digits"],
    ("jobs.evaluate", "EvaluateJob"): ["--model.path", "M", "--evaluate.tasks", "[digits]"],
    ("jobs.sweep", "SweepJob"): ["--model.path", "M", "--evaluate.tasks", "[digits]"],
    ("jobs.sample", "SampleJob"): ["--model.path", "M", "--prompts", "p.jsonl"],
    ("dllm_ray.serving.config", "ServeConfig"): ["--model.path", "M"],
    ("jobs.compare", "CompareJob"): ["--tracking.uri", "sqlite:///x.db"],
}


def job_class(module: str, name: str) -> type:
    return getattr(importlib.import_module(module), name)


DATA = ("--data.path", "builtin:digits")


def read(file: Path, *words: str) -> SFTJob:
    return parse(SFTJob, [*DATA, *words, "--cluster", str(file)], "sft", "Trains.", cluster=ClusterFile)


@pytest.fixture
def write(tmp_path):
    def write(**tree) -> Path:
        path = tmp_path / "cluster.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    return write


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job[1])
def test_the_files_that_come_along_fit_every_job(job, file):
    cls = job_class(*job)
    settings = parse(cls, [*JOBS[job], "--cluster", str(file)], "job", "A job.", cluster=ClusterFile)
    plain = parse(cls, JOBS[job], "job", "A job.")
    assert type(settings) is type(plain) is cls


def test_every_setting_is_one_of_a_job():
    known = {name for job in JOBS for name in leaf_types(job_class(*job))}
    assert set(SETTINGS) <= known


def test_it_wins_over_other_files_and_loses_to_the_command_line(write, tmp_path):
    other = tmp_path / "job.yaml"
    other.write_text("train: {workers: 1, batch_size: 8, learning_rate: 0.5}\n")
    file = write(train={"workers": 4, "storage_path": "s3://bucket/x", "gpus_per_worker": 1})
    job = read(file, "--config", str(other), "--train.gpus_per_worker", "0")
    assert job.train.workers == 4 and job.train.storage_path == "s3://bucket/x"
    assert job.train.gpus_per_worker == 0 and job.train.learning_rate == 0.5


def test_a_number_of_workers_may_follow_the_cluster(write):
    assert read(write(train={"workers": {"min": 1, "max": 3}})).train.workers.max == 3


def test_settings_of_other_jobs_are_left_to_them(write):
    file = write(evaluate={"cache": "s3://bucket/answers"}, workers=3, model={"replicas": 2})
    job = read(file)
    assert job == parse(SFTJob, DATA, "sft", "Trains.")


def test_relative_outputs_lie_below_the_shared_folder(write, tmp_path):
    file = write(outputs=str(tmp_path))
    (tmp_path / "outputs/base").mkdir(parents=True)
    assert read(file).output_dir == f"{tmp_path}/outputs/sft"
    assert read(file, "--output_dir", "outputs/mine").output_dir == f"{tmp_path}/outputs/mine"
    assert read(file, "--output_dir", "/elsewhere/mine").output_dir == "/elsewhere/mine"
    assert read(file, "--model.path", "outputs/base").model.path == f"{tmp_path}/outputs/base"
    assert read(file, "--model.path", "GSAI-ML/LLaDA-8B-Base").model.path == "GSAI-ML/LLaDA-8B-Base"


def test_a_model_that_is_here_is_not_looked_for_elsewhere(write, tmp_path, monkeypatch):
    file = write(outputs=str(tmp_path))
    for folder in (tmp_path / "base", tmp_path / "here" / "base"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert read(file, "--model.path", "base").model.path == str(tmp_path / "here" / "base")


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"train": {"learning_rate": 1.0}}, "'train.learning_rate' is neither a resource nor storage"),
        ({"sampler": {"steps": 1}}, "'sampler.steps' is neither"),
        ({"train": {"worker": 1}}, "did you mean train.workers?"),
        ({"outputs": "relative/folder"}, "outputs: expected the absolute path of a folder, got 'relative/folder'"),
    ],
)
def test_anything_else_is_refused_by_name(write, tree, said):
    with pytest.raises(ConfigError, match=r"cluster\.yaml") as raised:
        read(write(**tree))
    assert said in str(raised.value)


def test_a_wrong_value_is_refused_like_anywhere(write):
    with pytest.raises(ConfigError, match=r"train\.workers"):
        read(write(train={"workers": "many"}))


def test_the_environment_names_it_for_every_job(write, monkeypatch, capsys):
    from dllm_ray.cli import run_job

    monkeypatch.setenv(VARIABLE, str(write(train={"workers": 7})))
    with pytest.raises(SystemExit):
        run_job(SFTJob, lambda job: None, "Trains.", [*DATA, "--print_config"])
    assert "workers: 7" in capsys.readouterr().out
