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
from jobs_testing import HANGS_S, TINY, complete, environment, runs

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
        "dashboard-agent-listen-port": free_port(),  # without it no job can be submitted, and others may have it
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
        began = time.monotonic()
        while not answers(address, token.read_text()):
            up = process.poll() is None and time.monotonic() - began < HANGS_S
            assert up, (tmp_path / "head.log").read_text()
            time.sleep(0.5)
        yield address, variables
    finally:
        process.terminate()
        process.wait()


def answers(address: str, token: str) -> bool:
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status == 200
    except OSError:
        return False


def test_a_submitted_job_trains_on_the_cluster_and_mlflow_holds_its_run(head, tmp_path):
    address, variables = head
    settings = TINY | {"output_dir": str(tmp_path / "run"), "train.max_steps": "10"}
    words = [word for name, value in settings.items() for word in (f"--{name}", value)]
    job = ["python", "jobs/sft.py", *words]
    submit = [RAY, "job", "submit", "--address", address, "--working-dir", ".", "--", *job]
    began = time.monotonic()
    done = complete(submit, env=variables)
    while "No available agent" in done.stderr and time.monotonic() - began < HANGS_S:
        time.sleep(1)  # the head answers before it can take jobs
        done = complete(submit, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train: step 10/10" in done.stdout
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()
    (record,) = runs(tmp_path / "run")
    assert record.info.status == "FINISHED"

    # bad input fails the submitted job too
    bad = [*submit, "--train.batch_size", "0"]
    refused = complete(bad, env=variables)
    assert refused.returncode != 0
    assert "train.batch_size: must be at least 1" in refused.stdout

    # and so does everybody without the token
    stranger = {name: value for name, value in variables.items() if not name.startswith("RAY_AUTH")}
    stranger |= {"HOME": str(tmp_path)}
    refused = complete([RAY, "job", "list", "--address", address], env=stranger, cwd=tmp_path)
    assert refused.returncode != 0, os.linesep.join([refused.stdout, refused.stderr])
