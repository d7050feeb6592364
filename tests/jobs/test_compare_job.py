"""jobs/compare.py over a real MLflow store: what it finds, shows, records, and says when there is nothing."""

import base64
import json
import re
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from jobs_testing import load_job, run
from mlflow import MlflowClient

from dllm_ray import tracking
from dllm_ray.cli import run_job
from dllm_ray.evaluation import compare
from dllm_ray.tracking import TrackingConfig

job = load_job("compare")
LLADA = "GSAI-ML/LLaDA-8B-Instruct"
SUITE = """
model: {path: GSAI-ML/LLaDA-8B-Instruct}
sampler: {max_new_tokens: 512, steps: 512, block_size: 512}
evaluate: {suite: [{task: gsm8k_cot, name: gsm8k}, {task: mmlu_pro}]}
"""


@pytest.fixture(scope="module")
def official(tmp_path_factory) -> Path:
    """A folder with official settings of one model."""
    folder = tmp_path_factory.mktemp("official")
    (folder / "llada.yaml").write_text(SUITE)
    return folder


def evaluated(store: Path, model: str, task: str, score: float, setting=None, line="", parent=None, **tags):
    """Records an evaluation as jobs/evaluate.py does."""
    known = {"dllm_ray.model": model, "dllm_ray.eval.task": task, "dllm_ray.eval.setting": line or None, **tags}
    with tracking.start("evaluate", {"seed": 0}, store, TrackingConfig(), known, parent=parent) as run:
        run.log({f"eval/{task}/exact_match": score, f"eval/{task}/exact_match_stderr": 0.01})
        run.log({"sampler/nfe": 640.0, "sampler/tpf": 1.5, "sampler/tokens_per_s": 22.0})
        run.json("setting.json", setting or {"limit": None})
        run.json("results.json", {"n-samples": {task: {"effective": 100, "original": 1319}}})
    return run.run_id


@pytest.fixture(scope="module")
def store(tmp_path_factory, official) -> Path:
    """A database with a suite of a published model, run twice, and a model of our own."""
    folder = tmp_path_factory.mktemp("store")
    [gsm8k, _] = compare.official_lines(official, [LLADA], lambda model: {})
    settings = dict(gsm8k.settings) | {"sampler.steps": 64, "limit": 100}
    with tracking.start("evaluate", {"seed": 0}, folder, TrackingConfig(), {"dllm_ray.model": LLADA}) as suite:
        for score in (0.6, 0.7):
            evaluated(folder, LLADA, "gsm8k_cot", score, settings, "gsm8k", parent=suite.run_id)
    evaluated(folder, "outputs/digits/final", "digits", 0.81, {"tasks": ["digits"], "limit": None})
    with (
        pytest.raises(RuntimeError),
        tracking.start("evaluate", {}, folder, TrackingConfig(), {"dllm_ray.model": "m"}) as broken,
    ):
        broken.tag({"dllm_ray.eval.task": "sort"})
        raise RuntimeError("out of memory")
    (folder / "suite").write_text(suite.run_id)
    return folder


@pytest.fixture
def ask(monkeypatch, capsys, tmp_path, official):
    """Runs the job; returns its exit status, output, and what it left."""
    monkeypatch.setattr(job, "OFFICIAL_SETTINGS", official)

    def call(store: Path | None, **settings):
        words = {"output_dir": str(tmp_path / "out"), **settings}
        if store is not None:
            words["tracking.uri"] = f"sqlite:///{store}/mlruns.db"
        argv = [word for name, value in words.items() for word in (f"--{name}", value)]
        status = run_job(job.CompareJob, job.main, "", argv)
        out, err = capsys.readouterr()
        found = tmp_path / "out" / "compare.json"
        return status, out, err, json.loads(found.read_text()) if found.is_file() else None

    return call


def test_a_run_stands_beside_the_published_scores(ask, store, tmp_path):
    status, out, err, tree = ask(store, model="llada")
    assert (status, err) == (0, "")
    [row] = tree["rows"]
    assert row["ours"]["value"] == 70.0 and row["ours"]["stderr"] == 1.0 and row["ours"]["documents"] == 100
    assert row["official"]["score"] == 69.4 and row["reproduced"]["score"] == 74.7
    assert row["difference"] == {"points": pytest.approx(0.6), "standard_errors": pytest.approx(0.6)}
    assert row["official_line"] == {"file": "llada", "name": "gsm8k", "task": "gsm8k_cot"}
    assert {item["setting"]: item["ours"] for item in row["differs"]} == {"sampler.steps": 64, "limit": 100}
    assert "70.0 ± 1.0" in out and "69.4" in out
    assert "[1] steps 64 instead of 512, limit 100 [llada: gsm8k]" in out
    texts = [(tmp_path / "out" / name).read_text() for name in ("compare.md", "compare.html")]
    assert all("steps 64 instead of 512" in text for text in texts) and "<svg" in texts[1]


def test_the_page_and_the_figures_are_recorded(ask, store):
    status, out, *_ = ask(store, model="llada")
    assert status == 0
    client = MlflowClient(f"sqlite:///{store}/mlruns.db")
    recorded = client.get_run(out.rpartition("tracking  run ")[2].partition(":")[0])
    assert recorded.data.tags["dllm_ray.job"] == "compare"
    assert recorded.info.run_name == "compare LLaDA-8B-Instruct"
    assert recorded.data.metrics[f"compare/{LLADA}/gsm8k_cot/gsm8k/ours"] == 70.0
    assert recorded.data.metrics[f"compare/{LLADA}/gsm8k_cot/gsm8k/difference"] == pytest.approx(0.6)
    names = {item.path for item in client.list_artifacts(recorded.info.run_id)}
    assert {"compare.md", "compare.html", "compare.json", "config.yaml"} <= names
    below = client.search_runs([recorded.info.experiment_id], f"tags.`dllm_ray.compare` = '{recorded.info.run_id}'")
    scores = {run.info.run_name: run.data.metrics["score/GSM8K"] for run in below}
    assert scores == {
        f"{LLADA} gsm8k ours": 70.0,
        "LLaDA-8B-Instruct official": 69.4,
        "LLaDA-8B-Instruct reproduced": 74.7,
    }


def test_a_saved_view_sets_the_scores_side_by_side(ask, store):
    _, out, *_ = ask(store, model="llada")
    run_id = out.rpartition("tracking  run ")[2].partition(":")[0]
    address = out.rpartition("view      ")[2].strip()
    client = MlflowClient(f"sqlite:///{store}/mlruns.db")
    experiment = client.get_experiment(client.get_run(run_id).info.experiment_id)
    key = address.rpartition("viewStateShareKey=")[2]
    assert address == f"http://127.0.0.1:5000/#/experiments/{experiment.experiment_id}/runs?viewStateShareKey={key}"
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{key}"])
    assert view["name"] == "compare LLaDA-8B-Instruct"
    state = json.loads(zlib.decompress(base64.b64decode(view["state"].removeprefix("deflate;"))))
    shown = client.search_runs([experiment.experiment_id], state["searchFilter"])
    assert {run.data.tags["dllm_ray.score"] for run in shown} == {"ours", "official", "reproduced"}
    metrics = {name for run in shown for name in run.data.metrics}
    assert {f"metrics.`{name}`" for name in metrics} == set(state["selectedColumns"]) - {"tags.`dllm_ray.score`"}
    assert [chart["metricKey"] for chart in state["compareRunCharts"]] == ["score/GSM8K"]
    # the same comparison again takes the place of its view
    ask(store, model="llada")
    views = client.get_experiment(experiment.experiment_id).tags
    assert sum(json.loads(value).get("name") == view["name"] for tag, value in views.items() if "View" in tag) == 1


def test_the_page_goes_where_it_is_wanted_and_needs_nothing_beside_it(ask, store, tmp_path):
    page = tmp_path / "scores.html"
    status, out, *_ = ask(store, model="llada", html=str(page))
    assert status == 0 and f"page      {page}" in out
    assert not (tmp_path / "out" / "compare.html").exists()
    text = page.read_text()
    assert "69.4" in text and "default-src 'none'" in text
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|(?:src|href)=", text)
    status, _, err, _ = ask(store, html=str(tmp_path / "nowhere" / "scores.html"))
    assert status == 2 and err.endswith("scores.html is no file in a folder that is there\n")


def test_every_run_is_shown_on_request_and_a_suite_means_the_runs_below_it(ask, store):
    _, _, _, tree = ask(store, run_ids=(store / "suite").read_text(), all="true")
    assert [row["ours"]["value"] for row in tree["rows"]] == [70.0, 60.0]


def test_a_model_of_ones_own_is_shown_beside_official_rows(ask, store):
    status, out, _, tree = ask(store, task="digits")
    assert status == 0
    mine, *others = tree["rows"]
    assert mine["model"] == "outputs/digits/final" and mine["ours"]["value"] == 81.0 and mine["official"] is None
    assert any(row["model"] == "LLaDA-8B-Instruct" and row["official"]["score"] == 69.4 for row in others)
    assert "outputs/digits/final" in out and "69.4" in out
    _, _, _, tree = ask(store, task="digits", published="ModernBERT-base-chat-v0.1")
    assert {row["model"] for row in tree["rows"]} == {"outputs/digits/final", "ModernBERT-base-chat-v0.1"}


def test_a_failed_run_is_marked(ask, store):
    _, out, _, tree = ask(store, task="sort")
    assert tree["rows"][0]["remarks"] == ["failed", "no score"]
    assert "[1] failed, no score" in out


def test_the_store_is_as_it_was_for_the_reader(store):
    config = TrackingConfig(uri=f"sqlite:///{store}/mlruns.db")
    found = tracking.find_runs(config, "evaluate")
    assert [found.started for found in found] == sorted((found.started for found in found), reverse=True)
    assert found[0].artifact("nothing.json") is None
    assert tracking.find_runs(config, "sft") == []
    with pytest.raises(tracking.OutputError, match=r"has no experiment 'x'; it has .*'dllm_ray'"):
        tracking.find_runs(replace(config, experiment="x"), "evaluate")
    assert MlflowClient(config.uri).get_experiment_by_name("x") is None


def test_a_store_that_is_not_named_or_not_there(ask, tmp_path):
    status, _, err, _ = ask(None)
    assert status == 2 and err.startswith("error: tracking.uri: name the store")
    status, _, err, _ = ask(tmp_path)
    assert status == 2 and err == f"error: tracking.uri sqlite:///{tmp_path}/mlruns.db: no such database\n"
    assert not (tmp_path / "mlruns.db").exists()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"task": "humaneval"}, "none of the 5 evaluation runs in sqlite:///"),
        ({"task": "humaneval"}, "they have tasks digits, gsm8k_cot, sort"),
        ({"model": "dream"}, f"they have models {LLADA}, m, outputs/digits/final"),
        ({"run_ids": "abc"}, "has no evaluation run abc; it has 5, the newest is "),
        ({"published": "GPT-9"}, "published: no published scores of 'GPT-9'; there are LLaDA-8B-Base, "),
    ],
)
def test_nothing_found_says_where_and_what_there_is(ask, store, wrong, said):
    status, _, err, tree = ask(store, **wrong)
    assert status == 2 and said in err and err.count("\n") == 1 and tree is None


def test_the_job_runs_by_itself_over_the_real_official_settings(store, tmp_path):
    done = run("compare", output_dir=str(tmp_path), tracking__uri=f"sqlite:///{store}/mlruns.db", model="llada")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "69.4" in done.stdout and str(tmp_path / "compare.html") in done.stdout
