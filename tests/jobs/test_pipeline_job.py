"""jobs/pipeline.py: its rules, its state, what it refuses, and from nothing to a server with a kill in each stage."""

import json
import math
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest
import ray
import yaml
from jobs_testing import HANGS_S, ROOT, TINY, complete, environment, load_job
from mlflow import MlflowClient

from dllm_ray import tracking
from dllm_ray.cli import run_job
from dllm_ray.errors import ConfigError, EvaluationError, OutputError
from dllm_ray.pipeline import rules
from dllm_ray.pipeline.config import PipelineJob
from dllm_ray.pipeline.rules import Rule
from dllm_ray.pipeline.state import STAGES, State

pipeline = load_job("pipeline")
RAY = str(Path(sys.executable).parent / "ray")


def scores(value: float, setting: str = "") -> dict:
    return {setting: {"digits": {"exact_match": value}}}


# --- rules


@pytest.mark.parametrize(
    ("text", "ours", "champion", "holds"),
    [
        ("digits/exact_match >= 0.8", 0.8, None, True),
        ("digits/exact_match > 0.8", 0.8, None, False),
        ("digits/exact_match<=.8", 0.7, None, True),
        ("digits/exact_match < 7e-1", 0.7, None, False),
        ("digits/exact_match >= -1", 0.0, 0.9, True),
        ("digits/exact_match >= champion", 0.5, 0.5, True),
        ("digits/exact_match > champion", 0.5, 0.5, False),
        ("digits/exact_match >= champion + 0.25", 0.75, 0.5, True),
        ("digits/exact_match >= champion + 0.25", 0.5, 0.5, False),
        ("digits/exact_match >= champion - 0.25", 0.25, 0.5, True),
        ("digits/exact_match >= champion-0.25", 0.125, 0.5, False),
        ("digits/exact_match >= champion + 9", 0.1, None, True),  # there is nothing to be better than
        ("digits/exact_match >= 0", math.nan, None, False),
        ("digits/exact_match >= champion", math.nan, None, False),
    ],
)
def test_a_rule_holds_or_not(text, ours, champion, holds):
    verdict = Rule.parse(text).judge(scores(ours), None if champion is None else scores(champion))
    assert verdict.holds is holds
    assert str(verdict).startswith("holds: " if holds else "fails: ")


def test_a_rule_may_be_about_a_variant():
    rule = Rule.parse("steps=4: digits/exact_match >= 0.5")
    assert (rule.setting, rule.task, rule.metric) == ("steps=4", "digits", "exact_match")
    assert rule.judge(scores(0.1) | scores(0.6, "steps=4"), None).holds
    with pytest.raises(EvaluationError, match="no score digits/exact_match of steps=4; there are none"):
        rule.judge(scores(0.9), None)


@pytest.mark.parametrize(
    "text", ["", "exact_match >= 0.8", "digits/exact_match = 0.8", "digits/exact_match >= best", "a/b >= champion * 2"]
)
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(ConfigError, match="rules: expected TASK/METRIC >= NUMBER"):
        Rule.parse(text)


def test_rules_speak_of_what_is_measured():
    measured = {"": {"digits": ["exact_match", "sort"]}, "steps=4": {"digits": ["exact_match"]}}
    rules.check([Rule.parse("digits/sort > 0"), Rule.parse("steps=4: digits/exact_match > champion")], measured)
    for text, said in (
        ("digits/exact > 0", "digits has no metric 'exact'; it has exact_match, sort"),
        ("letters/exact_match > 0", "no task 'letters' is evaluated; there are 'digits'"),
        ("steps=2: digits/sort > 0", "no setting 'steps=2' is evaluated; there are '', 'steps=4'"),
    ):
        with pytest.raises(ConfigError, match=said):
            rules.check([Rule.parse(text)], measured)


# --- state


def test_a_stage_that_is_begun_again_forgets_those_after_it(tmp_path):
    with State(tmp_path) as state:
        state.run_id = "abc"
        for name in STAGES[:3]:
            state.begin(name, {"steps": 8})
            state.finish(name, {"of": name})
    with State(tmp_path) as state:
        assert state.run_id == "abc" and state.outcome("compare") == {"of": "compare"}
        assert state.changes("evaluate", {"steps": 4}) == ["steps was 8, is now 4"]
        assert state.changes("evaluate", {"steps": 8}) == state.changes("deploy", {"steps": 8}) == []
        state.begin("evaluate", {"steps": 4})
    with State(tmp_path) as state:
        assert state.outcome("train") and state.settings("evaluate") == {"steps": 4}
        assert state.outcome("evaluate") is state.settings("compare") is None
    with State(tmp_path, fresh=True) as state:
        assert state.run_id is None and state.settings("train") is None


def test_a_folder_is_for_one_pipeline_at_a_time(tmp_path):
    with State(tmp_path), pytest.raises(OutputError, match="another run is using"):
        State(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": null}', '{"run_id": null, "stages": {"bake": {}}}'])
def test_a_state_that_is_none_is_told(tmp_path, text):
    (tmp_path / "pipeline.json").write_text(text)
    with pytest.raises(OutputError, match=r"pipeline\.json can't be read .*--fresh"):
        State(tmp_path)
    State(tmp_path, fresh=True)


# --- settings


def nested(dotted: dict[str, str]) -> dict:
    tree: dict = {}
    for name, value in dotted.items():
        *sections, last = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = yaml.safe_load(value)
    return tree


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Settings of the stages, for a model that learns nothing in no time."""
    folder = tmp_path_factory.mktemp("settings")
    train = TINY | {"train.max_steps": "8", "train.checkpoint_every": "4", "observe.sample_rows": "0"}
    sampler = {"max_new_tokens": 8, "block_size": 8, "steps": 2}
    pool = {"workers": 1, "threads_per_worker": 1, "batch_size": 8}
    trees = {
        "train": nested(train),
        "evaluate": {
            "limit": 16,
            "evaluate": {"tasks": ["digits"], "variants": [{"steps": 1}], **pool},
            "sampler": sampler,
        },
        "serve": {
            "model": {"name": "it", "sampler": sampler, "threads": 1, "cpus_per_replica": 0.5},
            "limits": {"max_rows": 2},
        },
    }
    for name, tree in trees.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tree))
    return {f"{name}.config": str(folder / f"{name}.yaml") for name in trees}


def words(settings: dict[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("promote.rules", "[digits >= 1]", "promote.rules: expected TASK/METRIC >= NUMBER"),
        ("promote.rules", "[digits/exact >= 1]", "promote.rules: 'digits/exact >= 1': digits has no metric 'exact'"),
        ("promote.rules", "[gsm8k/exact_match >= 1]", "no task 'gsm8k' is evaluated; there are 'digits'"),
        ("promote.name", "a/b", "promote.name: expected letters, digits"),
        ("promote.alias", "v3", "promote.alias: expected letters, digits, _ and -"),
        ("train.config", "gone.yaml", "train: in the settings of this stage, no such settings file: gone.yaml"),
        ("train.job", "sfd", "train.job: expected one of 'sft', 'pretrain', got sfd"),
        (
            "train.set",
            "{train.batch_size: 0}",
            "train: in the settings of this stage, train.batch_size: must be at least",
        ),
        ("evaluate.set", "{evaluate: {tasks: [digit]}}", "no task 'digit'; the nearest names: digits"),
        (
            "evaluate.set",
            "{sampler.stops: 3}",
            "evaluate: in the settings of this stage, unknown option --sampler.stops",
        ),
        ("serve.set", "{port: 70000}", "serve: in the settings of this stage, port: must lie between 1 and 65535"),
        ("serve.set", "{model.sampler: {stops: 3}}", "serve.model.sampler"),
        (
            "serve.set",
            "{models: [{path: some/model}], model: {path: null}}",
            "serve.models: none of the models is models:/",
        ),
        (
            "tracking.uri",
            "sqlite:////no/such/folder/mlruns.db",
            "tracking.uri sqlite:////no/such/folder/mlruns.db can't be",
        ),
        ("seed", "-1", "seed: must lie between 0 and"),
    ],
)
def test_bad_settings_are_told_before_anything_is_started(files, tmp_path, monkeypatch, capsys, setting, value, said):
    def started(*_args, **_kwargs):
        raise AssertionError("Ray was started")

    monkeypatch.setattr(ray, "init", started)
    settings = {"output_dir": str(tmp_path / "out"), **files, setting: value}
    if setting == "serve.set" and "models" in value:
        settings.pop("serve.config")
    assert run_job(PipelineJob, pipeline.main, "", words(settings)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and said in message and message.count("\n") == 1, message


def test_the_demo_needs_nothing_and_a_cluster_file_counts_for_the_stages(tmp_path, monkeypatch):
    from dllm_ray.config import parse
    from dllm_ray.pipeline.plan import Plan

    monkeypatch.chdir(tmp_path)  # paths of the demo are those of the repository
    job = parse(PipelineJob, ["--config", str(pipeline.DEMO), "--seed", "3"], "", "")
    plan = Plan(job, tmp_path, ROOT)
    assert (plan.training.seed, plan.training.train.max_steps) == (3, 1400)
    assert plan.evaluation().model.path == str(tmp_path / "train" / "final")
    assert plan.serving.model.path == "models:/digits@champion"
    stores = {one.tracking.uri for one in (plan.training, plan.evaluation())} | {plan.serving.tracking_uri}
    assert stores == {f"sqlite:///{tmp_path}/mlruns.db"}
    assert plan.serve_command().startswith(
        f"python jobs/serve.py --config {ROOT}/configs/serve/digits.yaml --model.path"
    )
    monkeypatch.setenv("DLLM_RAY_CLUSTER", str(ROOT / "configs" / "clusters" / "two-cpus.yaml"))
    plan = Plan(job, tmp_path, ROOT)
    assert (plan.training.train.threads_per_worker, plan.evaluation().evaluate.workers) == (1, 2)


# --- from nothing to a server

KILLED = """
import os, runpy, signal, sys
from importlib import import_module
from operator import attrgetter
place, _, argument = sys.argv[1].partition("?")
module, _, name = place.partition(":")
sys.argv = sys.argv[2:]
*owner, name = name.split(".")
owner = attrgetter(".".join(owner))(import_module(module)) if owner else import_module(module)
was = getattr(owner, name)
def last(*args, **kwargs):
    result = was(*args, **kwargs)
    if not argument or argument in kwargs:
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, last)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs a job that is killed at the end of a certain call."""

IN_STAGES = {
    "train": "dllm_ray.training.run_folder:RunFolder.update?checkpoint_step",
    "evaluate": "dllm_ray.evaluation.cache:AnswerCache.add",
    "compare": "dllm_ray.tracking:Run.save_view",
    "register": "dllm_ray.tracking:register",
    "deploy": "dllm_ray.serving.server:start",
}
"""Stage -> a call in the middle of it, after which something has been made that must not be made twice."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment of jobs on a Ray cluster on loopback."""
    logs = tmp_path_factory.mktemp("head")
    folder = tempfile.mkdtemp(prefix="ray-")  # names of sockets must be short
    port = free_port()
    variables = environment() | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    options = {
        "node-ip-address": "127.0.0.1",
        "port": port,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "include-dashboard": "false",
        "num-cpus": 4,
        "temp-dir": folder,
    }
    with (logs / "head.log").open("w") as log:
        head = subprocess.Popen(
            [RAY, "start", "--head", "--block", "--disable-usage-stats", *(f"--{k}={v}" for k, v in options.items())],
            env=variables,
            stdout=log,
            stderr=log,
            cwd=logs,
        )
    began = time.monotonic()
    try:
        while "Ray runtime started" not in (logs / "head.log").read_text():
            assert head.poll() is None and time.monotonic() - began < HANGS_S, (logs / "head.log").read_text()
            time.sleep(0.2)
        yield variables | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        head.terminate()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def ask(address: str, path: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def served_version(address: str) -> str:
    (model,) = ask(address, "/v1/models")["data"]
    return model["diffusion"]["version"]


def below(client: MlflowClient, run) -> list:
    query = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    return client.search_runs([run.info.experiment_id], query)


@pytest.mark.slow
def test_from_nothing_to_a_server_killed_once_in_each_stage(cluster, files, tmp_path):
    out, port = tmp_path / "out", free_port()
    address, uri = f"http://127.0.0.1:{port}", f"sqlite:///{tmp_path}/out/mlruns.db"
    settings = {"output_dir": str(out), **files, "promote.name": "tiny", "serve.set": f"{{port: {port}}}"}
    settings |= {"promote.rules": "[digits/exact_match >= 0, 'steps=1: digits/exact_match >= champion']"}
    job = ["jobs/pipeline.py", *words(settings)]
    said = ""
    for place in IN_STAGES.values():
        done = complete([sys.executable, "-c", KILLED, place, *job], env=cluster)
        assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
        said += done.stdout
    done = complete([sys.executable, *job], env=cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    said += done.stdout

    for number, name in enumerate(STAGES, 1):
        begun, went_on, finished = (
            said.count(f"stage     {number}/5 {name}: {what}") for what in ("begins", "goes on", "done in")
        )
        assert (begun, went_on, finished) == (1, 1, 1), said

    client = MlflowClient(tracking_uri=uri)
    (experiment,) = client.search_experiments(filter_string="name = 'dllm_ray'")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if run.data.tags["dllm_ray.job"] == "pipeline"]
    children = below(client, parent)
    assert sorted(run.data.tags["dllm_ray.job"] for run in children) == ["compare", "evaluate", "sft"]
    (trained,) = [run for run in children if run.data.tags["dllm_ray.job"] == "sft"]
    (evaluated,) = [run for run in children if run.data.tags["dllm_ray.job"] == "evaluate"]
    assert evaluated.data.tags["dllm_ray.trained_by"] == trained.info.run_id
    assert len(below(client, evaluated)) == 1, "the variant, once"
    steps = [point.step for point in client.get_metric_history(trained.info.run_id, "train/loss")]
    assert set(steps) == set(range(1, 9))
    assert parent.data.tags["dllm_ray.pipeline.version"] == "models:/tiny/1"
    assert parent.data.tags["dllm_ray.pipeline.address"] == address
    assert parent.data.metrics["eval/digits/exact_match"] == evaluated.data.metrics["eval/digits/exact_match"]
    artifacts = {item.path for item in client.list_artifacts(parent.info.run_id)}
    assert {"compare.html", "compare.md", "verdicts.json", "scores.json"} <= artifacts

    (version,) = client.search_model_versions("name = 'tiny'")
    assert int(version.version) == 1
    assert version.run_id == trained.info.run_id
    assert int(client.get_model_version_by_alias("tiny", "champion").version) == 1
    fetched = tracking.fetch_model("models:/tiny/1", uri)
    assert (fetched / "model.safetensors").read_bytes() == (out / "train/final/model.safetensors").read_bytes()
    assert served_version(address) == "models:/tiny/1"
    answer = ask(address, "/v1/chat/completions", {"messages": [{"role": "user", "content": "sort 21"}], "seed": 1})
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")

    # the same again does nothing
    again = complete([sys.executable, *job], env=cluster)
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before: ") == 5 and "done in" not in again.stdout
    assert len(client.search_runs([experiment.experiment_id])) == len(runs)

    # another model, which is not better: it is registered, and everything else stays as it is
    other = tmp_path / "other"
    settings |= {"output_dir": str(other), "tracking.uri": uri, "train.set": "{seed: 1, train.max_steps: 2}"}
    settings |= {"promote.rules": "[digits/exact_match >= champion + 0.5]"}
    for asked, champion_is_asked in (("{limit: 8}", True), ("{}", False)):
        done = complete([sys.executable, "jobs/pipeline.py", *words(settings | {"evaluate.set": asked})], env=cluster)
        assert done.returncode == 3, done.stdout + done.stderr
        assert "error: models:/tiny/2 is registered and not promoted: digits/exact_match >= champion" in done.stderr
        assert "champion stays models:/tiny/1" in done.stderr
        assert "deploy: left out: rules don't hold" in done.stdout
        assert ("models:/tiny/1 is asked the same\n" in done.stdout) is champion_is_asked, done.stdout
        compared = json.loads((other / "compare" / "compare.json").read_text())["rows"]
        assert {row["model"] for row in compared if row["ours"]} == {
            str(other / "train" / "final"),
            "models:/tiny/1" if champion_is_asked else str(out / "train" / "final"),
        }
        shutil.rmtree(other / "champion", ignore_errors=True)
    assert "train: done before" in done.stdout
    assert "evaluate: again: main: limit was 8, is now 16" in done.stdout
    assert "register: done in" in done.stdout or "register: done before" in done.stdout
    assert sorted(int(one.version) for one in client.search_model_versions("name = 'tiny'")) == [1, 2]
    assert int(client.get_model_version_by_alias("tiny", "champion").version) == 1
    assert served_version(address) == "models:/tiny/1"
