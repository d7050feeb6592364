"""jobs/evaluate.py on tables of settings over real data: equal to the adapter without Ray, also where workers or the
driver are killed; what it plans; what it refuses."""

import json
import os
import signal
import subprocess
import time

import psutil
import pytest
import yaml
from jobs_testing import HANGS_S, ROOT, command, ended, environment, load_job, run, runs

from dllm_ray.cli import run_job
from dllm_ray.config import parse
from dllm_ray.evaluation.answering import LocalAnswers
from dllm_ray.evaluation.asking import Asker
from dllm_ray.evaluation.run import evaluate
from dllm_ray.models.load import open_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def table(trained, real_data, tmp_path_factory):
    """The settings file of a table with a line for each kind of task."""
    lines = [
        {"task": "gsm8k_file", "data_file": str(real_data / "gsm8k" / "test.jsonl"), "limit": 12, "reference": "GSM8K"},
        {"task": "humaneval_file", "data_file": str(real_data / "humaneval" / "HumanEval.jsonl.gz"), "limit": 4},
        {"task": "bbh_file", "data_file": str(real_data / "bbh" / "[bdn]*.json"), "sampler": {"steps": 2}},
        {"task": "bbh_choice_file", "data_file": str(real_data / "bbh" / "navigate.json"), "chat_template": False},
        {"task": "text_file", "data_file": str(real_data / "text" / "c4_demo.jsonl"), "limit": 3},
    ]
    path = tmp_path_factory.mktemp("table") / "table.yaml"
    tree = {
        "model": {"path": str(trained[0] / "final")},
        "evaluate": {"suite": lines, "limit": 6, "batch_size": 3, "confirm_run_unsafe_code": True},
        "sampler": {"max_new_tokens": 16, "steps": 8, "block_size": 8, "temperature": 1.0},
        "likelihood": {"mc_num": 6, "batch_size": 8},
    }
    path.write_text(yaml.safe_dump(tree))
    return path


def without_ray(table) -> dict[str, dict]:
    """Line -> lm-eval's scores, asked in this process."""
    job = parse(load_job("evaluate").EvaluateJob, ["--config", str(table)], "", "")
    asker, lm = Asker(job.model, job.seed), open_model(job.model)
    scores = {}
    for ask in job.asks():
        answers = LocalAnswers(lm, ask.sampler, ask.likelihood, ask.evaluate.batch_size)
        scores[ask.name] = evaluate(asker.harness(ask, answers), ask.evaluate, job.seed)["results"]
    return scores


def written(folder, line: str) -> dict:
    return json.loads((folder / line / "results.json").read_text())


def numbers(scores: dict) -> dict[str, float]:
    return {
        f"{task} {name}": pytest.approx(value, rel=1e-4, nan_ok=True)
        for task, values in scores.items()
        for name, value in values.items()
        if isinstance(value, float)
    }


def test_scores_are_those_without_ray_and_a_second_run_reads_them_from_disk(table, tmp_path):
    expected = without_ray(table)
    for again in (False, True):
        places = {"output_dir": str(tmp_path), "tracking__uri": f"sqlite:///{tmp_path}/mlruns.db"}
        done = run("evaluate", config=str(table), evaluate__workers="3", **places)
        assert done.returncode == 0, done.stdout + done.stderr
        for line, scores in expected.items():
            results = written(tmp_path, line)
            assert numbers(results["results"]) == numbers(scores)
            figures = results["sampler"]
            assert figures["from_disk" if again else "asked"] > 0 == figures["asked" if again else "from_disk"]
            assert results["environment"]["packages"]["lm-eval"]
    assert any(name.endswith("_stderr,none") or "stderr" in name for name in expected["gsm8k_file"]["gsm8k_file"])
    assert "pass@1" in done.stdout and "bits_per_byte" in done.stdout
    recorded = {record.data.tags.get("dllm_ray.eval.setting"): record for record in runs(tmp_path, "evaluate")}
    assert set(expected) <= recorded.keys()
    line = recorded["gsm8k_file"]
    assert line.data.tags["dllm_ray.eval.reference"] == "GSM8K"
    assert "eval/gsm8k_file/exact_match.strict_stderr" in line.data.metrics
    assert line.data.metrics["sampler/nfe"] == written(tmp_path, "gsm8k_file")["sampler"]["nfe"]


def test_a_killed_worker_costs_nothing_and_a_killed_driver_the_slices_under_way(table, tmp_path):
    expected = without_ray(table)["gsm8k_file"]
    words = {"config": str(table), "suite": "gsm8k_file", "output_dir": str(tmp_path), "evaluate.batch_size": "1"}
    words |= {"tracking.uri": f"sqlite:///{tmp_path}/mlruns.db"}
    log = tmp_path / "log"
    with log.open("w") as file:
        streams = {"stdout": file, "stderr": file}
        driver = subprocess.Popen(command("evaluate", words), cwd=ROOT, env=environment(), **streams)

    def wait_for(slices: int) -> int:
        began = time.monotonic()
        while len(found := list((tmp_path / "answers").rglob("*.jsonl"))) < slices:
            if driver.poll() is not None or time.monotonic() - began > HANGS_S:
                ended(driver, log)
                pytest.fail(log.read_text())
            time.sleep(0.005)
        return len(found)

    wait_for(1)
    workers = [child for child in psutil.Process(driver.pid).children(recursive=True) if "_Worker" in child.name()]
    os.kill((workers or pytest.fail("no workers"))[0].pid, signal.SIGKILL)
    kept = wait_for(3)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    kept = len(list((tmp_path / "answers").rglob("*.jsonl")))
    done = run("evaluate", **{name.replace(".", "__"): value for name, value in words.items()})
    assert done.returncode == 0, done.stdout + done.stderr
    results = written(tmp_path, "gsm8k_file")
    assert numbers(results["results"]) == numbers(expected)
    assert (results["sampler"]["from_disk"], results["sampler"]["asked"]) == (kept, 12 - kept)


def in_this_process(*argv: str) -> int:
    job = load_job("evaluate")
    return run_job(job.EvaluateJob, job.main, "", list(argv))


def test_a_plan_counts_requests_and_estimates_their_time(table, tmp_path):
    done = run("evaluate", config=str(table), suite="gsm8k_file,bbh_choice_file", plan="true", output_dir=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 generate_until" in done.stdout and "12 loglikelihood" in done.stdout and "at most" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--suite", "gsm9k"], "suite: no line 'gsm9k'; the nearest: gsm8k_file"),
        (["--evaluate.confirm_run_unsafe_code", "false"], "humaneval_file runs code that the model writes"),
        (
            ["--suite", "gsm8k_file", "--set", "sampler.max_new_tokens=64, sampler.steps=64"],
            "gsm8k_file: 64 leaves no room for a prompt in the",
        ),
        (["--limit", "0"], "limit: must be at least 1, got 0"),
    ],
)
def test_what_can_not_be_asked_is_said_before_anything_is_started(table, tmp_path, capsys, argv, said):
    assert in_this_process("--config", str(table), "--output_dir", str(tmp_path / "out"), *argv) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
