"""Runs the jobs as users do: one process each, on real Ray, MLflow and files."""

import importlib.util
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

ROOT = Path(__file__).resolve().parents[2]
HANGS_S = 600
"""How long a test waits for a job before it makes the job say where it hangs; none takes a quarter of this."""

TINY = {
    "model.scratch.architecture": "bert",
    "model.scratch.vocab_size": "300",
    "model.scratch.hidden_size": "32",
    "model.scratch.num_hidden_layers": "2",
    "model.scratch.num_attention_heads": "2",
    "model.scratch.max_position_embeddings": "64",
    "data.path": "builtin:digits[train:500]",
    "data.valid_path": "builtin:digits[test:32]",
    "train.workers": "2",
    "train.threads_per_worker": "1",
    "train.precision": "float32",
    "train.batch_size": "16",
    "train.max_length": "64",
    "train.max_steps": "30",
    "train.log_every": "1",
    "sampler.max_new_tokens": "8",
    "sampler.block_size": "8",
    "sampler.steps": "8",
    "observe.sample_rows": "0",
}


def load_job(name: str):
    """A job's file as a module."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", ROOT / "jobs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def environment() -> dict[str, str]:
    """The jobs' environment: no cluster, no network, this interpreter first."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return variables | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONFAULTHANDLER": "1",  # where a process is when it is aborted
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }


def command(job: str, settings: dict[str, str]) -> list[str]:
    """The command line of a job."""
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return [sys.executable, f"jobs/{job}.py", *words]


def complete(words: list[str], **options) -> subprocess.CompletedProcess:
    """Runs a command to its end, in the jobs' environment unless told otherwise."""
    options = {"cwd": ROOT, "env": environment()} | options
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        output, errors = process.communicate(timeout=HANGS_S)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
        pytest.fail("hangs: {} {}".format(*process.communicate(timeout=60)))
    return subprocess.CompletedProcess(words, process.returncode, output, errors)


def ended(driver: subprocess.Popen, log: Path) -> int:
    """The exit status of a job that writes to a log."""
    try:
        return driver.wait(HANGS_S)
    except subprocess.TimeoutExpired:
        driver.send_signal(signal.SIGABRT)
        driver.wait(60)
        pytest.fail(f"hangs: {log.read_text()}")


def run(job: str, **settings: str) -> subprocess.CompletedProcess:
    """Runs a job to its end; dots in names of settings are written as __."""
    return complete(command(job, {name.replace("__", "."): value for name, value in settings.items()}))


def train(output_dir: Path, **changes: str) -> subprocess.CompletedProcess:
    """Trains the tiny model."""
    settings = TINY | {"output_dir": str(output_dir)} | {k.replace("__", "."): v for k, v in changes.items()}
    return complete(command("sft", settings))


def start_training(output_dir: Path, log: Path, **changes: str) -> subprocess.Popen:
    """Begins to train the tiny model."""
    settings = TINY | {"output_dir": str(output_dir)} | {k.replace("__", "."): v for k, v in changes.items()}
    with log.open("w") as file:
        return subprocess.Popen(
            command("sft", settings),
            cwd=ROOT,
            env=environment(),
            stdout=file,
            stderr=subprocess.STDOUT,
            # tests in the background of a shell ignore interrupts, and what they start would inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )


def train_workers(driver: subprocess.Popen) -> list[psutil.Process]:
    """The Ray Train worker processes below a driver."""
    return [
        process
        for process in psutil.Process(driver.pid).children(recursive=True)
        if "RayTrainWorker" in " ".join(process.cmdline())
    ]


def runs(output_dir: Path, job: str = "sft") -> list:
    """The MLflow runs of a job, the oldest first."""
    client = MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlruns.db")
    (experiment,) = client.search_experiments(filter_string="name = 'dllm_ray'")
    return client.search_runs(
        [experiment.experiment_id], f"tags.`dllm_ray.job` = '{job}'", order_by=["attributes.start_time ASC"]
    )


def history(output_dir: Path, metric: str, job: str = "sft") -> dict[int, list[float]]:
    """Step -> every value that the one training run in a folder recorded for it."""
    client = MlflowClient(tracking_uri=f"sqlite:///{output_dir}/mlruns.db")
    (found,) = runs(output_dir, job)
    values = defaultdict(list)
    for point in client.get_metric_history(found.info.run_id, metric):
        values[point.step].append(point.value)
    return dict(values)
