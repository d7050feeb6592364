"""MLflow on SQLite and on PostgreSQL: what a run records, and how it ends."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from postgres_testing import postgres

from dllm_ray import tracking
from dllm_ray.errors import ConfigError, DataError, OutputError
from dllm_ray.tracking import TrackingConfig

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Store:
    """Where runs of a test are recorded."""

    folder: Path
    """The output folder."""
    tracking: TrackingConfig


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(request, tmp_path_factory) -> Store:
    """One database for all tests here: creating one takes seconds."""
    folder = tmp_path_factory.mktemp("tracking")
    if request.param == "sqlite":
        yield Store(folder, TrackingConfig())
        return
    with postgres() as uri:
        yield Store(folder, TrackingConfig(uri=uri, artifacts=str(folder / "artifacts")))


def open_run(store, job="sft", settings=None, tags=None, **more):
    return tracking.start(job, settings or {"seed": 0}, store.folder, store.tracking, tags or {}, **more)


def read(run):
    return MlflowClient(tracking_uri=run.uri).get_run(run.run_id)


def artifact(run, name):
    client = MlflowClient(tracking_uri=run.uri)
    return Path(client.download_artifacts(run.run_id, name)).read_text(encoding="utf-8")


def test_the_database_and_its_artifacts_lie_in_the_output_folder_unless_told_otherwise(store):
    with open_run(store) as run:
        run.text("note.txt", "hello")
    assert artifact(run, "note.txt") == "hello"
    if store.tracking.uri is None:
        assert run.uri == f"sqlite:///{store.folder}/mlruns.db"
        assert (store.folder / "mlruns.db").is_file()
        assert list((store.folder / "mlartifacts").rglob("note.txt"))
    else:
        assert list((store.folder / "artifacts").rglob("note.txt"))


def test_settings_become_parameters_and_a_file_that_reads_back(store):
    settings = {"seed": 3, "train": {"betas": [0.9, 0.99], "workers": None}, "data": {"columns": {}}}
    with open_run(store, settings=settings) as run:
        pass
    params = read(run).data.params
    assert params["seed"] == "3" and params["train.betas"] == "[0.9, 0.99]"
    assert yaml.safe_load(artifact(run, "config.yaml")) == settings
    facts = json.loads(artifact(run, "system.json"))
    assert {"torch", "ray", "transformers"} <= set(facts["packages"])


def test_long_values_are_cut_and_secrets_hidden(store):
    secret = "postgresql://me:hunter2@db/ml"
    settings = {"data": {"path": "x" * 20_000}, "serve": {"api_keys": ["sk-1"]}, "tracking": {"uri": secret}}
    with open_run(store, settings=settings) as run:
        pass
    params = read(run).data.params
    assert params["serve.api_keys"] == "(hidden)"
    assert params["data.path"].startswith("xxx") and len(params["data.path"]) < 20_000
    assert params["tracking.uri"] == "postgresql://db/ml"
    recorded = artifact(run, "config.yaml")
    assert "sk-1" not in recorded and "hunter2" not in recorded


def test_metrics_keep_their_steps(store):
    with open_run(store) as run:
        run.log_many([({"train/loss": 2.0}, 10), ({"train/loss": 1.0}, 20)])
    history = MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(10, 2.0), (20, 1.0)]
    assert read(run).info.status == "FINISHED"


def test_more_points_than_one_request_holds_are_all_recorded(store):
    with open_run(store) as run:
        run.log_many([({"a": step, "b": step}, step) for step in range(700)])
    assert len(MlflowClient(tracking_uri=run.uri).get_metric_history(run.run_id, "b")) == 700


@pytest.mark.parametrize(
    ("error", "status"), [(DataError("line 17 is broken"), "FAILED"), (KeyboardInterrupt(), "KILLED")]
)
def test_a_run_that_breaks_off_says_how_and_why(store, error, status):
    with pytest.raises(type(error)), open_run(store) as run:
        raise error
    found = read(run)
    assert found.info.status == status
    assert found.data.tags["dllm_ray.failure"] == f"{type(error).__name__}: {error}"


def test_a_resumed_run_goes_on_in_the_same_record(store):
    with pytest.raises(DataError), open_run(store) as run:
        raise DataError("gone")
    with open_run(store, resume=run.run_id) as again:
        assert read(again).info.status == "RUNNING"
    assert again.run_id == run.run_id
    assert read(again).info.status == "FINISHED"
    assert "dllm_ray.failure" not in read(again).data.tags


def test_a_child_names_its_parent_and_a_stranger_does_not(store):
    with open_run(store) as training:
        pass
    with open_run(store, job="evaluate", parent=training.run_id) as child:
        pass
    with open_run(store, job="evaluate", parent="f" * 32) as orphan:
        pass
    assert read(child).data.tags["mlflow.parentRunId"] == training.run_id
    assert "mlflow.parentRunId" not in read(orphan).data.tags


def test_a_run_records_finished_children_with_their_settings(store):
    settings = {"sampler": {"steps": 8, "threshold": None, "suppress_tokens": [1, 2], "policy": "x" * 20_000}}
    with open_run(store) as run:
        run_id = run.child("steps=8", {"score": 0.5, "documents": 40}, {"dllm_ray.job": "sweep-setting"}, settings)
        plain = run.child("plain", {"score": 1.0}, {})
    client = MlflowClient(tracking_uri=run.uri)
    child = client.get_run(run_id)
    assert child.info.status == "FINISHED" and child.info.run_name == "steps=8"
    assert child.info.experiment_id == read(run).info.experiment_id
    assert child.data.metrics == {"score": 0.5, "documents": 40.0}
    policy = child.data.params.pop("sampler.policy")
    assert policy.startswith("xxx") and len(policy) < 20_000
    assert child.data.params == {
        "sampler.steps": "8",
        "sampler.threshold": "None",
        "sampler.suppress_tokens": "[1, 2]",
    }
    assert child.data.tags["mlflow.parentRunId"] == run.run_id
    assert child.data.tags["dllm_ray.job"] == "sweep-setting"
    assert client.get_run(plain).data.params == {} and plain != run_id


def test_what_is_not_known_below_a_run_is_deleted_with_what_is_below_it(store):
    with open_run(store, job="pipeline") as run:
        with open_run(store, parent=run.run_id) as kept:
            below_kept = kept.child("variant", {}, {})
        with open_run(store, job="compare", parent=run.run_id) as dropped:
            below_dropped = dropped.child("variant", {}, {})
            column = dropped.child("column", {}, {tracking.COMPARISON: dropped.run_id}, nested=False)
        run.prune({kept.run_id})
    client = MlflowClient(tracking_uri=run.uri)
    stages = {name: client.get_run(name).info.lifecycle_stage for name in (kept.run_id, below_kept, run.run_id)}
    assert set(stages.values()) == {"active"}
    gone = {client.get_run(name).info.lifecycle_stage for name in (dropped.run_id, below_dropped, column)}
    assert gone == {"deleted"}
    where = tracking.resolved(store.tracking, store.folder)
    assert tracking.find_run(where, kept.run_id).run_id == kept.run_id
    assert tracking.find_run(where, dropped.run_id) is tracking.find_run(where, "f" * 32) is None


def test_versions_of_a_model_are_found_by_alias_number_and_tags(store):
    uri = tracking.resolved(store.tracking, store.folder).uri
    assert tracking.find_version("models:/poems@champion", uri) is None
    assert tracking.tagged_version("poems", uri, {}) is None
    (store.folder / "final").mkdir(exist_ok=True)
    (store.folder / "final" / "config.json").write_text("{}")
    with open_run(store) as run:
        source = run.folder(store.folder / "final", "model")
    versions = [tracking.register("poems", source, run.run_id, {"digest": digest}, uri) for digest in "aba"]
    assert [(one.number, one.run_id, one.tags) for one in versions] == [
        (number, run.run_id, {"digest": digest}) for number, digest in enumerate("aba", 1)
    ]
    assert tracking.tagged_version("poems", uri, {"digest": "a"}) == versions[2]
    assert tracking.tagged_version("poems", uri, {"digest": "c"}) is None
    for version in versions[:2]:
        tracking.set_alias(version, "champion", uri)
    found = tracking.find_version("models:/poems@champion", uri)
    assert str(found) == tracking.registered_version("models:/poems@champion", uri) == "models:/poems/2"
    assert tracking.find_version("models:/poems/1", uri).tags == {"digest": "a"}
    assert tracking.find_version("models:/poems/9", uri) is None
    assert (tracking.fetch_model("models:/poems/1", uri) / "config.json").read_text() == "{}"


def test_tags_say_what_the_run_is_about(store):
    with open_run(store, tags={"dllm_ray.model": "m", "dllm_ray.family": None}) as run:
        pass
    tags = read(run).data.tags
    assert (tags["dllm_ray.job"], tags["dllm_ray.model"]) == ("sft", "m")
    assert "dllm_ray.family" not in tags


def test_work_on_a_model_is_recorded_where_it_was_trained_if_that_is_still_there(store):
    with open_run(store) as training:
        pass
    here = TrackingConfig()
    assert tracking.beside_training(here, {"tracking_uri": training.uri}).uri == training.uri
    assert tracking.beside_training(here, {"tracking_uri": "sqlite:////gone/mlruns.db"}).uri is None
    assert tracking.beside_training(here, {"tracking_uri": "http://host:5000"}).uri == "http://host:5000"
    assert tracking.beside_training(TrackingConfig(uri="http://mine"), {"tracking_uri": training.uri}).uri == (
        "http://mine"
    )


def test_a_database_that_can_not_be_opened_is_named(tmp_path):
    (tmp_path / "mlruns.db").write_text("not a database, although long enough to be mistaken for one" * 20)
    broken = Store(tmp_path, TrackingConfig())
    with pytest.raises(OutputError, match=r"tracking\.uri .*mlruns\.db can't be used"), open_run(broken):
        pass


def test_a_server_that_can_not_be_reached_is_named_without_its_password(tmp_path):
    settings = TrackingConfig(uri="http://me:hunter2@127.0.0.1:9")
    with (
        pytest.raises(OutputError, match=r"tracking\.uri http://127\.0\.0\.1:9 can't be used") as error,
        tracking.start("sft", {}, tmp_path, settings, {}),
    ):
        pass
    assert "hunter2" not in str(error.value)


def test_the_ui_is_named_by_command_or_address():
    assert tracking.ui_command("sqlite:////a/mlruns.db") == "mlflow ui --backend-store-uri sqlite:////a/mlruns.db"
    assert tracking.ui_command("http://host:5000") == "http://host:5000"


BEGIN = """
import sys, time
from pathlib import Path
import mlflow.store.tracking.sqlalchemy_store  # the slow part, so that all begin at once
from dllm_ray import tracking
print("ready", flush=True)
sys.stdin.readline()
folder, uri, artifacts, points = sys.argv[1:]
settings = tracking.TrackingConfig(uri=uri or None, artifacts=artifacts or None)
with tracking.start("sample", {"seed": 0}, Path(folder), settings, {}) as run:
    for step in range(int(points)):
        run.log({"a": step, "b": -step}, step)
    run.text("note.txt", run.run_id)
print(run.run_id)
"""


def begin_together(folder, settings, processes, points) -> list[str]:
    """Runs of as many processes that begin at once and log at once; their ids."""
    words = [sys.executable, "-c", BEGIN, str(folder), settings.uri or "", settings.artifacts or "", str(points)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(words, **pipes, cwd=ROOT) for _ in range(processes)]
    for process in started:
        assert process.stdout.readline() == "ready\n"
    for process in started:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0] * processes, told
    assert not any("Traceback" in errors or "ERROR" in errors for _, errors in told), told
    return [output.strip() for output, _ in told]


def check_all(uri: str, run_ids: list[str], points: int) -> None:
    client = MlflowClient(tracking_uri=uri)
    assert len(set(run_ids)) == len(run_ids)
    for run_id in run_ids:
        assert client.get_run(run_id).info.status == "FINISHED"
        assert [point.value for point in client.get_metric_history(run_id, "b")] == [-step for step in range(points)]
        assert Path(client.download_artifacts(run_id, "note.txt")).read_text() == run_id


def test_runs_that_begin_together_share_a_new_database(tmp_path):
    run_ids = begin_together(tmp_path, TrackingConfig(), 3, 5)
    check_all(f"sqlite:///{tmp_path}/mlruns.db", run_ids, 5)


@pytest.mark.slow
def test_eight_processes_share_a_new_database_of_postgresql(tmp_path):
    with postgres() as uri:
        settings = TrackingConfig(uri=uri, artifacts=str(tmp_path / "artifacts"))
        run_ids = begin_together(tmp_path, settings, 8, 50)
        check_all(uri, run_ids, 50)
        nowhere = TrackingConfig(uri=uri, experiment="another")
        with (
            pytest.raises(ConfigError, match=r"tracking\.artifacts: name a folder or URL"),
            tracking.start("sft", {}, tmp_path, nowhere, {}),
        ):
            pass
        assert MlflowClient(tracking_uri=uri).get_experiment_by_name("another") is None
