"""A tiny trained run, made once for all tests of jobs."""

from pathlib import Path

import pytest
from jobs_testing import train


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """The output folder and output of a tiny run with two workers."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = train(folder, train__max_steps="60", train__checkpoint_every="20", observe__sample_rows="2")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout
