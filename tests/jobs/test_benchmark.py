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
    assert done.stderr == "error: benchmark 'trian' is unknown; expected one of train, sample, likelihood, serve\n"


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
def test_random_weights_get_edit_heads_where_all_algorithms_edit(tmp_path):
    path = tmp_path / "figures.json"
    small = ["--prompt_tokens", "8", "--new_tokens", "8", "--rounds", "1", "--threads", "1", "--batch_sizes", "[2]"]
    small += ["--model.scratch.hidden_size", "32", "--model.scratch.num_hidden_layers", "1"]
    done = benchmark("sample", "--algorithms", "[edit_flow, edit_flow_adaptive]", *small, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [row["algorithm"] for row in rows] == ["edit_flow", "edit_flow_adaptive"]
    assert all(row["ratio"] > 0 and row["nfe"] > 1 for row in rows)


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


@pytest.mark.slow
@pytest.mark.parametrize("server", ["local", "ray"])
def test_a_server_is_measured_beside_its_engine(tmp_path, server):
    path = tmp_path / "figures.json"
    small = ["--load.requests", "4", "--load.new_tokens", "8", "--sampler.steps", "8", "--rounds", "1"]
    small += ["--model.scratch.hidden_size", "32", "--model.scratch.num_hidden_layers", "1", "--threads", "1"]
    small += ["--rates", "[20.0]", "--clients", "[1, 2]", "--stream", "[true, false]", "--json", str(path)]
    done = benchmark("serve", *small, "--server", server, "--variants", "{plain: {}, few: {steps: 4}}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    for name, nfe in (("plain", 8), ("few", 4)):
        found = {(row["load"], row["amount"], row["stream"]): row for row in rows if row["settings"] == name}
        loads = (("clients", 1), ("clients", 2), ("rate", 20))
        both = {(load, amount, stream) for load, amount in loads for stream in (False, True)}
        assert set(found) == both | {("engine", 1, False), ("engine", 2, False)}
        for row in found.values():
            assert (row["requests"], row["tokens"], row["errors"]) == (4, 32, {}) and row["tpf"] == 8 / nfe
        load = found["clients", 2, True]
        assert load["of_engine"] == pytest.approx(load["tokens_per_s"] / found["engine", 2, False]["tokens_per_s"])
        assert 0 < load["first_text"]["p50"] <= load["end"]["p99"] and load["first_text_over_rest"] > 0
    assert "serving on 1 CPU threads, float32: few" in done.stdout and "2 clients" in done.stdout


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
        (("serve", "--clients", "[0]"), "clients: expected numbers of at least 1, got [0]"),
        (("serve", "--clients", "[]"), "clients: give numbers of clients, or rates"),
        (("serve", "--rates", "[0]"), "rates: expected numbers above 0"),
        (("serve", "--stream", "[]"), "stream: expected at least one"),
        (("serve", "--variants", "{a: {stepz: 1}}"), "variants.a: unknown key 'stepz'; did you mean steps?"),
        (("serve", "--url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9/v1"),
    ],
)
def test_what_would_be_found_wrong_after_measuring_is_refused_before(words, said):
    done = benchmark(*words)
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
