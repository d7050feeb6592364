"""jobs/serve.py as a user runs it."""

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import APIConnectionError, OpenAI

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.slow


def start(*options: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "jobs" / "serve.py"), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)


def test_it_serves_until_it_is_told_to_stop(make_lm, tmp_path):
    make_lm().save(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    options = ["--model.path", str(tmp_path / "tiny"), "--model.sampler.max_new_tokens", "8", "--port", str(port)]
    job = start(*options, "--model.threads", "1")
    try:
        said = job.stdout.readline()
        assert said == f"serving   http://127.0.0.1:{port} (tiny)\n", job.communicate(timeout=60)[1]
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["tiny"]
        answer = client.completions.create(model="tiny", prompt="sort", seed=1)
        assert answer.usage.completion_tokens <= 8
    finally:
        job.send_signal(signal.SIGTERM)
        said, complaints = job.communicate(timeout=60)
    assert job.returncode == 0
    assert "Traceback" not in complaints


def test_what_was_begun_is_finished_and_nothing_else_begins(make_lm, tmp_path):
    make_lm().save(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    long = [f"--model.sampler.{name}=50" for name in ("max_new_tokens", "steps", "block_size")]
    long += ["--limits.max_rows", "1"]  # one text after the other
    job = start("--model.path", str(tmp_path / "tiny"), *long, "--port", str(port), "--model.threads", "1")
    try:
        assert job.stdout.readline().startswith("serving"), job.communicate(timeout=60)[1]
        ask = {"base_url": f"http://127.0.0.1:{port}/v1", "api_key": "none", "max_retries": 0, "timeout": 60}
        with ThreadPoolExecutor(1) as pool, OpenAI(**ask) as client:
            begun = pool.submit(client.completions.create, model="tiny", prompt=["sort"] * 4, seed=1, n=8)
            time.sleep(0.5)
            assert not begun.done()
            job.send_signal(signal.SIGINT)
            time.sleep(0.5)
            with OpenAI(**ask) as late, pytest.raises(APIConnectionError):
                late.completions.create(model="tiny", prompt="sort")
            assert len(begun.result().choices) == 32
        _, complaints = job.communicate(timeout=60)
    finally:
        job.kill()
    assert job.returncode == 0
    assert "Traceback" not in complaints


def test_a_port_that_is_taken_is_told_before_anything_starts(make_lm, tmp_path):
    make_lm().save(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        job = start("--model.path", str(tmp_path / "tiny"), "--port", str(listener.getsockname()[1]))
        _, complaints = job.communicate(timeout=120)
    assert job.returncode == 2
    assert complaints.startswith("error: port: can't listen on 127.0.0.1:")


def test_a_model_that_can_t_be_loaded_is_told_as_it_is(make_lm, tmp_path):
    make_lm().save(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    job = start("--model.path", str(tmp_path / "broken"), "--port", str(port))
    _, complaints = job.communicate(timeout=240)
    assert job.returncode == 2
    assert complaints.startswith("error: ")
    assert "broken" in complaints
    assert "Traceback" not in complaints
