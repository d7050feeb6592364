"""`ray job submit` against a head with token authentication."""

import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from jobs_testing import ROOT, TINY, environment, runs

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).parent / "ray")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def head(tmp_path):
    """The address and environment of a Ray head on loopback that asks for a token."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(32))
    variables = environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    dashboard = free_port()
    options = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "ray-client-server-port": free_port(),
        "num-cpus": 4,
    }
    words = [f"--{name}={value}" for name, value in options.items()]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", *words],
            env=variables,
            stdout=log,
            stderr=log,
            cwd=tmp_path,
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        while not answers(address, token.read_text()):
            assert process.poll() is None, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield address, variables
    finally:
        process.terminate()
        process.wait()


def answers(address: str, token: str) -> bool:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status == 200
    except OSError:
        return False


def test_a_submitted_job_trains_on_the_cluster_and_mlflow_holds_its_run(head, tmp_path):
    address, variables = head
    settings = TINY | {"output_dir": str(tmp_path / "run"), "train.max_steps": "10"}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    job = ["python", "jobs/sft.py", *words]
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *job]
    done = subprocess.run(submit, cwd=ROOT, env=variables, capture_output=True, text=True)
    while "No available agent" in done.stderr:  # the head answers before it can take jobs
        time.sleep(1)
        done = subprocess.run(submit, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: step 10/10" in done.stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "FINISHED"

    # bad input fails the submitted job too
    bad = [*submit, "--train.batch_size", "0"]
    refused = subprocess.run(bad, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "train.batch_size: must be at least 1" in refused.stdout

    # and so does everybody without the token
    stranger = {name: value for name, value in variables.items() if not name.startswith("RAY_AUTH")}
    stranger |= {"HOME": str(tmp_path)}
    refused = subprocess.run(
        [RAY, "job", "list", "--address", address], env=stranger, capture_output=True, text=True, cwd=tmp_path
    )
    assert refused.returncode != 0, os.linesep.join([refused.stdout, refused.stderr])
