"""Schemathesis, led by the API's own description: no request makes a 5xx, and no answer is other than described."""

import subprocess
import sys
from pathlib import Path

import pytest
from serving_testing import FakeBackend, served

from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving.app import AppSettings, create_app
from dllm_ray.serving.keys import digest
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.local import LocalModel

# What a description can't say, such as that a canvas needs a stream, may be refused.
CHECKS = ["--exclude-checks", "positive_data_acceptance"]


def fuzz(app, folder: Path, examples: int, *options: str) -> None:
    """Fails with schemathesis's report unless it finds nothing. It leaves files in `folder`."""
    with served(app) as url:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", *CHECKS, *options]
        command += ["--seed", "1", "--max-examples", str(examples), "--continue-on-failure", "--no-color"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "No issues found" in ended.stdout


@pytest.mark.slow
def test_the_api(tmp_path):
    told = []
    app = create_app({"fake": FakeBackend()}, AppSettings(api_keys=(digest("sk-1"),)), told.append)
    fuzz(app, tmp_path, 30, "--header", "Authorization: Bearer sk-1")
    assert {200, 400, 401, 404, 405, 415} <= {item.status for item in told}


@pytest.mark.slow
def test_the_api_without_keys_before_a_model(make_lm, tmp_path):
    sampler = SamplerConfig(max_new_tokens=8, steps=4, block_size=4)
    model = LocalModel("tiny", make_lm("llama"), Limits(max_new_tokens=16, max_steps=16), sampler)
    try:
        told = []
        fuzz(create_app({"tiny": model}, observe=told.append), tmp_path, 30)
        assert {200, 400, 404, 405, 415, 422} <= {item.status for item in told}
        figures = model.figures()
        assert (figures.active, figures.queued) == (0, 0)
    finally:
        model.close()
