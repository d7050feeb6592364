"""jobs/benchmark.py measures all three loops in one run."""

import json
import subprocess
import sys

import pytest
from jobs_testing import complete
from mlflow import MlflowClient


def benchmark(*words: str) -> subprocess.CompletedProcess:
    return complete([sys.executable, "jobs/benchmark.py", *words])


@pytest.mark.slow
def test_three_loops_are_measured_and_compared(tmp_path):
    path = tmp_path / "figures.json"
    small = ["--rounds", "1", "--steps", "10", "--warmup_steps", "5", "--train.batch_size", "8"]
    done = benchmark("train", *small, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(path.read_text())
    speeds = figures["tokens_per_s"]
    assert set(speeds) == {"under Ray Train", "the same loop alone", "bare loop, all logits"}
    for turns in figures["readings"].values():
        assert len(turns) == 1 and len(turns[0]["tokens_per_s"]) == 2 and min(turns[0]["tokens_per_s"]) > 0
    assert all(peak > 0 for peak in figures["peak_memory_gb"].values())
    assert 0 <= figures["data_wait"] < 1
    ours = speeds["under Ray Train"]
    assert figures["ratio_to_same_loop"] == pytest.approx(ours / speeds["the same loop alone"])
    assert figures["ratio_to_bare_loop"] == pytest.approx(ours / speeds["bare loop, all logits"])
    assert all(name in done.stdout for name in speeds)


def test_an_unknown_benchmark_is_refused():
    done = benchmark("trian")
    assert done.returncode == 2
    assert done.stderr == "error: benchmark 'trian' is unknown; expected one of train, sample, likelihood\n"


@pytest.mark.slow
def test_decoding_algorithms_are_measured_beside_their_forwards(tmp_path):
    path, folder = tmp_path / "figures.json", tmp_path / "out"
    small = ["--prompt_tokens", "8", "--new_tokens", "8", "--block_size", "4", "--rounds", "1", "--threads", "1"]
    small += ["--model.scratch.hidden_size", "32", "--model.scratch.num_hidden_layers", "1"]
    record = ["--json", str(path), "--mlflow", "true", "--output_dir", str(folder)]
    done = benchmark("sample", "--batch_sizes", "[1, 2]", *small, *record)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    named = {row["algorithm"] for row in rows}
    assert {"mdlm", "prefix", "dual", "block"} < named
    assert len(rows) == 2 * len(named)
    for row in rows:
        assert row["ratio"] > 0 and row["tokens_per_s"] > 0
    assert next(row for row in rows if row["algorithm"] == "mdlm")["nfe"] == 8
    assert next(row for row in rows if row["algorithm"] == "mdlm_half_steps")["tpf"] == 2
    [run] = MlflowClient(f"sqlite:///{folder}/mlruns.db").search_runs(["1"])
    assert run.data.metrics["benchmark/dual/batch_2/nfe"] == 8


@pytest.mark.slow
def test_likelihoods_are_measured_beside_their_forwards(tmp_path):
    path = tmp_path / "figures.json"
    small = ["--requests", "3", "--lengths", "[[6, 2], [4, 9]]", "--likelihood.mc_num", "8", "--rounds", "1"]
    small += ["--model.scratch.hidden_size", "32", "--model.scratch.num_hidden_layers", "1", "--threads", "1"]
    done = benchmark("likelihood", *small, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    short, long = json.loads(path.read_text())["rows"]
    assert (short["copies"], long["copies"]) == (3, 8)
    for row in (short, long):
        assert min(row[name] for name in ("requests_per_s", "ratio", "one_by_one", "all_logits")) > 0


def test_an_unknown_algorithm_is_refused():
    done = benchmark("sample", "--algorithms", "[mdlm, duel]")
    assert done.returncode == 2
    assert "algorithms: expected some of mdlm," in done.stderr and "got 'duel'" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sample", "--json", "nowhere/figures.json"), "json: 'nowhere/figures.json' can't be written"),
        (("train", "--json", "."), "json: '.' can't be written"),
        (("sample", "--algorithms", "[]"), "algorithms: expected some of mdlm,"),
        (("likelihood", "--lengths", "[[5, 0]]"), "lengths: expected pairs of numbers of at least 1"),
    ],
)
def test_what_would_be_found_wrong_after_measuring_is_refused_before(words, said):
    done = benchmark(*words)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
