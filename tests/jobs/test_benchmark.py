"""jobs/benchmark.py measures all three loops in one run."""

import json
import subprocess
import sys

import pytest
from jobs_testing import ROOT, environment


def benchmark(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "jobs/benchmark.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)


@pytest.mark.slow
def test_three_loops_are_measured_and_compared(tmp_path):
    path = tmp_path / "figures.json"
    small = ["--rounds", "1", "--steps", "10", "--warmup_steps", "5", "--train.batch_size", "8"]
    done = benchmark("train", *small, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(path.read_text())
    speeds = figures["tokens_per_s"]
    assert set(speeds) == {"under Ray Train", "the same loop alone", "bare loop, all logits"}
    assert all(len(readings) == 2 and min(readings) > 0 for readings in figures["readings"].values())
    ours = speeds["under Ray Train"]
    assert figures["ratio_to_same_loop"] == pytest.approx(ours / speeds["the same loop alone"])
    assert figures["ratio_to_bare_loop"] == pytest.approx(ours / speeds["bare loop, all logits"])
    assert all(name in done.stdout for name in speeds)


def test_an_unknown_benchmark_is_refused():
    done = benchmark("trian")
    assert done.returncode == 2
    assert done.stderr == "error: benchmark 'trian' is unknown; expected train\n"
