"""What nodes are asked, asked of this machine: real folders, files, sockets and a real group of two processes."""

import http.server
import socket
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest

from dllm_ray import tracking
from dllm_ray.doctor import probe
from dllm_ray.doctor.config import DoctorConfig
from dllm_ray.doctor.nodes import within
from dllm_ray.doctor.probe import Peer, Probe
from dllm_ray.doctor.storage import places
from dllm_ray.errors import ConfigError, OutputError
from dllm_ray.tracking import TrackingConfig


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def server(status: int):
    """An address that answers everything with one status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"[]")

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()


def test_facts_are_those_of_this_machine(tmp_path):
    found = Probe().facts(["torch", "no-such-package"], str(tmp_path))
    assert found["packages"]["torch"].startswith("2.") and found["packages"]["no-such-package"] is None
    assert Path(found["source"]["folder"]).name == "dllm_ray" and len(found["source"]["digest"]) == 8
    assert found["interfaces"]["lo"] == "127.0.0.1"
    assert 0 < found["temporary"]["free"] < found["temporary"]["total"]


@pytest.mark.parametrize("through", ["pyarrow", "fsspec"])
def test_a_folder_is_visited(tmp_path, through):
    probe.put(str(tmp_path), through, "driver", "token")
    found = Probe().visit(str(tmp_path), through, "driver", "token", "mine")
    assert (found["read"], found["write"]) == (None, None) and found["disk"]["free"] > 0 and found["mount"]["type"]
    assert probe.get(str(tmp_path), through, "mine") == "token"
    for name in ("driver", "mine"):
        probe.remove(str(tmp_path), through, name)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_the_drivers_file_is_another(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_READ_AGAIN_S", 0.0)
    found = Probe().visit(str(tmp_path), "pyarrow", "driver", "token", "mine")
    assert found["read"] == "the folder is there, without the file that the driver wrote into it"
    found = Probe().visit(str(tmp_path / "missing"), "pyarrow", "driver", "token", "mine")
    assert found["read"] == "there is no such folder" and "No such file" in found["write"]
    assert not (tmp_path / "missing").exists()


def test_a_bucket_is_visited(monkeypatch):
    import boto3
    from moto.server import ThreadedMotoServer

    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    access = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "somebody", "SECRET_ACCESS_KEY": "secret"}
    for name, value in (access | {"DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(f"AWS_{name}", value)
    try:
        bucket = boto3.resource("s3").create_bucket(Bucket="doctored")
        for through in ("pyarrow", "fsspec"):
            probe.put("s3://doctored/rows", through, "driver", "token")
            found = Probe().visit("s3://doctored/rows", through, "driver", "token", "mine")
            assert (found["read"], found["write"], found["disk"]) == (None, None, None)
            assert probe.get("s3://doctored/rows", through, "mine") == "token"
            for name in ("driver", "mine"):
                probe.remove("s3://doctored/rows", through, name)
        assert not [item.key for item in bucket.objects.all() if not item.key.endswith("/")]
        with pytest.raises(OSError):
            probe.put("s3://no-such-lab/rows", "pyarrow", "driver", "token")
    finally:
        store.stop()


def test_the_hub_is_asked_where_it_is_said_to_be(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert Probe().hub(5)["offline"] is True
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with server(200) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        found = Probe().hub(5)
        assert (found["status"], found["token"], found["cache_problem"]) == (200, False, None)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    assert "refused" in Probe().hub(5)["problem"]
    assert not (tmp_path / "hub").exists()


def test_two_processes_form_a_group():
    first, results = Peer(), []
    port = first.open("127.0.0.1", 20)
    # one process holds one group: the other rank lives in a process of its own
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    other = context.Process(target=Peer().reduce, args=("gloo", "127.0.0.1", port, 1, 1 << 16, 20))
    other.start()
    results.append(first.reduce("gloo", "127.0.0.1", port, 0, 1 << 16, 20))
    other.join(20)
    assert other.exitcode == 0 and 0 < results[0] < 20


def test_a_partner_that_never_comes_is_waited_for_so_long_only():
    alone = Peer()
    port = alone.open("127.0.0.1", 1)
    with pytest.raises(Exception, match=r"(?i)time"):
        alone.reduce("gloo", "127.0.0.1", port, 0, 1 << 16, 1)


def test_what_hangs_is_left_after_a_while():
    held = threading.Event()
    answer = within(0.1, held.wait)
    held.set()
    assert answer.problem == "no answer within 0.1 s"
    assert within(5, int, "7").value == 7
    assert "invalid literal" in within(5, int, "x").problem


def test_places_are_those_of_the_settings(tmp_path):
    job = DoctorConfig(output_dir=str(tmp_path), storage=[str(tmp_path), "s3://bucket/more"])
    job.evaluate.cache = job.data.cache_dir = "s3://bucket/cache"
    found = [(place.setting, place.path, place.through, place.everywhere) for place in places(job)]
    assert found == [
        ("evaluate.cache", "s3://bucket/cache", "pyarrow", True),
        ("data.cache_dir", "s3://bucket/cache", "fsspec", True),
        ("storage", str(tmp_path), "pyarrow", True),
        ("storage", "s3://bucket/more", "pyarrow", True),
    ]
    job.train.storage_path, job.storage = "/shared", []
    assert [place.everywhere for place in places(job)] == [True, True, True, False]


@pytest.mark.parametrize("change", [{"timeout_s": 0}, {"nodes": 0}, {"min_free_gb": -1}, {"json": ""}])
def test_settings_that_mean_nothing_are_refused(change):
    with pytest.raises(ConfigError):
        DoctorConfig(**change)


def test_a_tracking_store_is_tried_and_left_as_it_was(tmp_path):
    from mlflow import MlflowClient

    store = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlruns.db", artifacts=(tmp_path / "artifacts").as_uri())
    assert tracking.probe(store)["is_new"] and not list(tmp_path.iterdir())
    client = MlflowClient(store.uri)
    client.search_experiments()  # makes the database
    found = tracking.probe(store)
    assert found["artifacts"] is None and found["where"].startswith(store.artifacts)
    assert [item.name for item in client.search_experiments()] == ["Default"]
    known = client.create_experiment(store.experiment, (tmp_path / "known").as_uri())
    assert tracking.probe(store)["where"].startswith((tmp_path / "known").as_uri())
    assert client.search_runs([known]) == []
    assert not [path for path in tmp_path.rglob("*") if path.name == "doctor.txt"]
    with pytest.raises(OutputError, match="isn't there"):
        tracking.probe(TrackingConfig(uri=f"sqlite:///{tmp_path}/missing/mlruns.db"))


def test_a_place_that_takes_no_artifacts_is_told(tmp_path):
    from mlflow import MlflowClient

    (tmp_path / "file").touch()
    store = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlruns.db", artifacts=f"file://{tmp_path}/file/below")
    MlflowClient(store.uri).search_experiments()
    assert "Not a directory" in tracking.probe(store)["artifacts"]
