"""cluster/slurm on a real Slurm: munge, a controller and two nodes, all on loopback and of the tests' own."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(Path(__file__).resolve().parents[1] / "jobs"))

from jobs_testing import HANGS_S, ROOT, TINY, environment, history, runs

DAEMONS = ("munged", "slurmctld", "slurmd")
missing = [name for name in DAEMONS if shutil.which(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"needs Debian's slurm-wlm and munge ({', '.join(missing)} missing)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root: slurmd runs jobs as their users"),
]

STEPS, EVERY = 200, 40
SETTINGS = TINY | {
    "data.valid_rows": "0",
    "data.valid_path": "null",
    "observe.sample_rows": "0",
    "train.max_steps": str(STEPS),
    "train.checkpoint_every": str(EVERY),
    "train.cpus_per_worker": "2",  # of the 3 of a task: a worker in each, and room for the data
}

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
SchedulerParameters=sched_interval=1,bf_interval=1
PartitionName=all Nodes=node1,node2 Default=YES MaxTime=INFINITE
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=8
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=8
"""
"""Two nodes that are one machine. A requeued job waits `cred_expire` seconds before it starts again, and two minutes
where that is less than 5."""


class Slurm:
    """A cluster, through the commands that its users have."""

    def __init__(self, folder: Path, ray: Path):
        self.ray = ray
        self.variables = environment() | {"SLURM_CONF": str(folder / "slurm.conf"), "DLLM_RAY_TMP": str(ray)}

    def __call__(self, *words: str) -> str:
        done = subprocess.run(words, env=self.variables, cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, folder: Path, **changes: str) -> str:
        """Submits a training run over two tasks; its log is beside its output folder."""
        settings = SETTINGS | {"output_dir": str(folder)} | {k.replace("__", "."): v for k, v in changes.items()}
        job = ["jobs/sft.py", *(word for name, value in settings.items() for word in (f"--{name}", value))]
        size = ["--nodes=2", "--cpus-per-task=3", f"--output={log_of(folder)}"]
        return self("sbatch", "--parsable", *size, "cluster/slurm/job.sbatch", *job)

    def job(self, number: str) -> dict[str, str]:
        """What Slurm knows of a job."""
        words = self("scontrol", "show", "job", "--oneliner", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def until(self, done, number: str, folder: Path):
        """Waits for something to become true of a job."""
        began = time.monotonic()
        while not (said := done()):
            if time.monotonic() - began > HANGS_S:
                pytest.fail(f"hangs: {self.job(number)} {log_of(folder).read_text()}")
            time.sleep(0.1)
        return said

    def ended(self, number: str, folder: Path) -> dict[str, str]:
        """A job that is over, one way or another."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return self.until(lambda: (job := self.job(number))["JobState"] in over and job, number, folder)

    def left_by(self, number: str) -> list:
        """Processes and folders that a job has left."""
        return [*self.processes(number), *self.ray.glob(f"ray{number}.*")]

    def processes(self, number: str, name: str = "") -> list[psutil.Process]:
        """The processes of a job on all nodes whose command line holds `name`."""
        found = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                own = (variables.get("SLURM_JOB_ID"), variables.get("DLLM_RAY_TMP")) == (number, str(self.ray))
                if own and name in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:  # it has ended
                continue
        return found


def log_of(folder: Path) -> Path:
    return folder.with_suffix(".log")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    ray = Path(tempfile.mkdtemp())  # Ray's sockets need a short path
    host = socket.gethostname().partition(".")[0]
    first, second, controller = (free_port() for _ in range(3))
    configuration = folder / "slurm.conf"
    configuration.write_text(
        CONFIGURATION.format(folder=folder, host=host, first=first, second=second, controller=controller)
    )
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    files = {name: f"{folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
    munge = ["munged", "--foreground", "--force", f"--key-file={key}", *(f"--{k}={v}" for k, v in files.items())]
    commands = {
        "munged": munge,
        "slurmctld": ["slurmctld", "-D", "-f", str(configuration)],
        **{name: ["slurmd", "-D", "-f", str(configuration), "-N", name] for name in ("node1", "node2")},
    }
    (folder / "state").mkdir()
    running = {}
    cluster = Slurm(folder, ray)
    try:
        for name, words in commands.items():
            (folder / name).mkdir()
            with (folder / f"{name}.log").open("w") as log:
                running[name] = subprocess.Popen(words, stdout=log, stderr=log, env=cluster.variables)
            while name == "munged" and not (folder / "munge.socket").exists():
                assert running[name].poll() is None, (folder / "munged.log").read_text()
                time.sleep(0.05)
        began = time.monotonic()
        while idle(cluster.variables) < 2:
            logs = "".join((folder / f"{name}.log").read_text() for name in running)
            assert all(daemon.poll() is None for daemon in running.values()), logs
            assert time.monotonic() - began < HANGS_S, logs
            time.sleep(0.2)
        yield cluster
        subprocess.run(["scancel", "--user=root"], env=cluster.variables, check=True)
        while subprocess.run(["squeue", "--noheader"], env=cluster.variables, capture_output=True).stdout.strip():
            time.sleep(0.2)
    finally:
        for daemon in reversed(running.values()):
            daemon.terminate()
            daemon.wait(60)
        shutil.rmtree(ray)


def idle(variables: dict[str, str]) -> int:
    """Nodes that wait for jobs."""
    words = ["sinfo", "--noheader", "--Node", "--format=%T"]
    return subprocess.run(words, env=variables, capture_output=True, text=True).stdout.split().count("idle")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def step_of(folder: Path) -> int:
    """The step of a run's last checkpoint, 0 before the first."""
    try:
        return json.loads((folder / "run.json").read_text()).get("checkpoint_step", 0)
    except FileNotFoundError:
        return 0


def requeued(slurm, number: str, folder: Path, restarts: int) -> int:
    """Waits until a run is requeued and nothing of it is left; returns the step that it saved before."""
    slurm.until(lambda: slurm.job(number)["Restarts"] == str(restarts), number, folder)
    slurm.until(lambda: slurm.job(number)["JobState"] == "PENDING", number, folder)
    assert not slurm.left_by(number)
    return step_of(folder)


def test_a_run_that_is_requeued_twice_beside_another_one_ends_as_that(slurm, tmp_path):
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    one, two = slurm.submit(plain), slurm.submit(moved)

    # the warning of `--signal`, before the time limit or at a preemption: the run saves and requeues itself
    slurm.until(lambda: step_of(moved), two, moved)
    workers = slurm.processes(two, "RayTrainWorker")
    assert {worker.environ()["SLURM_PROCID"] for worker in workers} == {"0", "1"}
    slurm("scancel", "--batch", "--signal=USR1", two)
    first = requeued(slurm, two, moved, 1)

    # Slurm requeues it
    slurm.until(lambda: f"train     from step {first} of" in log_of(moved).read_text(), two, moved)
    slurm("scontrol", "requeue", two)
    second = requeued(slurm, two, moved, 2)
    assert 0 < first <= second < STEPS and not (moved / "final").exists()

    for number, folder, restarts in ((one, plain, "0"), (two, moved, "2")):
        job, log = slurm.ended(number, folder), log_of(folder).read_text()
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", restarts), log
        assert "ray       2 nodes with 6 CPUs and 0 GPUs at 127.0.0.1:" in log
        assert not slurm.left_by(number)
    log = log_of(moved).read_text()
    assert re.findall(r"from step (\d+) of", log) == [str(first), str(second)]
    assert log.count("interrupted: saving a checkpoint") == 2
    assert log.count("requeued: the same command goes on") == 1  # the other time Slurm did
    (record,) = runs(moved)  # one run in MLflow, in three parts
    assert record.info.status == "FINISHED"
    curves = {folder: history(folder, "train/loss") for folder in (plain, moved)}
    assert sorted(curves[moved]) == list(range(1, STEPS + 1))
    assert {len(values) for values in curves[moved].values()} == {1}, "a step was done twice"
    for step, values in curves[plain].items():
        assert curves[moved][step] == pytest.approx(values, rel=1e-4)
    models = [load_file(folder / "final" / "model.safetensors") for folder in (plain, moved)]
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_a_job_that_is_not_there_fails_with_a_message_and_its_status(slurm, tmp_path):
    log = tmp_path / "run.log"
    number = slurm("sbatch", "--parsable", f"--output={log}", "cluster/slurm/job.sbatch", "jobs/none.py")
    job = slurm.ended(number, tmp_path / "run")
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert log.read_text() == "error: jobs/none.py is no file: sbatch cluster/slurm/job.sbatch jobs/sft.py ...\n"
