"""Jobs whose checkpoints, answers, tokenized rows and artifacts lie in S3-compatible storage."""

import json
import os
import re
import time
from pathlib import Path

import pytest
import yaml
from jobs_testing import HANGS_S, command, complete, ended, environment, history, start_training, train
from mlflow import MlflowClient

pytestmark = pytest.mark.slow

STEPS, EVERY = 120, 40
SETTINGS = {"train__max_steps": str(STEPS), "train__checkpoint_every": str(EVERY), "data__valid_rows": "0"}
BUCKET = "lab"


@pytest.fixture(scope="module")
def bucket():
    """A bucket of a server on loopback, which the environment of every process names."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    access = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "somebody",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in access}
    os.environ |= access
    made = boto3.resource("s3").create_bucket(Bucket=BUCKET)
    yield made
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    server.stop()


@pytest.fixture
def cluster(tmp_path) -> str:
    """A cluster file that names the bucket for everything."""
    path = tmp_path / "cluster.yaml"
    places = {
        "train": {"storage_path": f"s3://{BUCKET}/checkpoints"},
        "evaluate": {"cache": f"s3://{BUCKET}/answers"},
        "data": {"cache_dir": f"s3://{BUCKET}/tokenized"},
        "tracking": {"artifacts": f"s3://{BUCKET}/mlflow"},
    }
    path.write_text(yaml.safe_dump(places))
    return str(path)


def names(bucket, prefix: str) -> list[str]:
    return [item.key for item in bucket.objects.filter(Prefix=prefix)]


def recorded_checkpoint(bucket) -> str:
    """What Ray Train has on record of the run in the bucket."""
    found = [name for name in names(bucket, "checkpoints/") if name.endswith("checkpoint_manager_snapshot.json")]
    return bucket.Object(found[0]).get()["Body"].read().decode() if found else ""


def test_a_killed_run_goes_on_from_its_checkpoint_in_the_bucket(tmp_path, bucket, cluster):
    folder, log = tmp_path / "run", tmp_path / "log"
    driver = start_training(folder, log, cluster=cluster, **SETTINGS)
    began = time.monotonic()
    while "checkpoint_2" not in recorded_checkpoint(bucket):
        if driver.poll() is not None or time.monotonic() - began > HANGS_S:
            ended(driver, log)
            pytest.fail(log.read_text())
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    assert not (folder / "checkpoints").exists()
    done = train(folder, cluster=cluster, **SETTINGS)
    assert done.returncode == 0, done.stdout + done.stderr
    [step] = re.findall(rf"from step (\d+) of {STEPS} steps", done.stdout)
    assert int(step) >= EVERY and int(step) % EVERY == 0
    assert (folder / "final" / "model.safetensors").is_file()
    losses = history(folder, "train/loss")
    assert sorted(losses) == list(range(1, STEPS + 1))
    assert all(values == pytest.approx([values[0]] * len(values), rel=1e-4) for values in losses.values())
    assert names(bucket, "tokenized/")

    client = MlflowClient(f"sqlite:///{folder}/mlruns.db")
    [run] = client.search_runs([client.get_experiment_by_name("dllm_ray").experiment_id])
    assert run.info.artifact_uri.startswith(f"s3://{BUCKET}/mlflow/")
    assert any(name.endswith("/config.yaml") for name in names(bucket, "mlflow/"))
    read = Path(client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))).read_text()
    assert yaml.safe_load(read)["train"]["storage_path"] == f"s3://{BUCKET}/checkpoints"


def test_answers_in_the_bucket_are_not_asked_for_again(tmp_path, bucket, cluster, trained):
    def evaluate(name: str) -> dict:
        settings = {
            "cluster": cluster,
            "model.path": str(trained[0] / "final"),
            "evaluate.tasks": "[digits]",
            "evaluate.limit": "24",
            "evaluate.workers": "2",
            "output_dir": str(tmp_path / name),
        }
        done = complete(command("evaluate", settings), env=environment())
        assert done.returncode == 0, done.stdout + done.stderr
        assert not (tmp_path / name / "answers").exists()
        return json.loads((tmp_path / name / "results.json").read_text())

    first, second = evaluate("first"), evaluate("second")
    assert names(bucket, "answers/")
    assert first["sampler"]["asked"] == second["sampler"]["from_disk"] > 20  # some questions are equal
    assert first["sampler"]["from_disk"] == second["sampler"]["asked"] == 0
    assert first["results"] == second["results"]
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"sweep": {"documents": 16, "holdout": 8, "space": {"steps": [8, 4]}}}))
    settings = {
        "config": str(space),
        "cluster": cluster,
        "model.path": str(trained[0] / "final"),
        "evaluate.tasks": "[digits]",
        "evaluate.workers": "2",
    }
    before = len(names(bucket, "answers/"))
    done = complete(command("sweep", settings | {"output_dir": str(tmp_path / "sweep")}), env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "sweep" / "answers").exists()
    assert len(names(bucket, "answers/")) > before
