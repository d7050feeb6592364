"""jobs/doctor.py over a real cluster of several nodes, healthy at first, then with faults planted in one of them."""

import http.server
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from jobs_testing import HANGS_S, ROOT, command, complete, environment, run

pytestmark = pytest.mark.slow

RAY = str(Path(sys.executable).parent / "ray")
AHEAD_S = 30
FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub that has no models."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"[]")

    def log_message(self, *_):
        pass


class Cluster:
    """Nodes on this machine, each with an environment and a temporary folder of its own."""

    def __init__(self, folder: Path, hub: str):
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.shared = folder / "shared"
        self.shared.mkdir()
        (folder / "token").write_text(secrets.token_hex(32))
        self.variables = environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "PYTHONPATH": str(ROOT),
            "HF_ENDPOINT": hub,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(folder / "hub"),
        }
        self.processes: list[subprocess.Popen] = []

    def start(self, name: str, before: list[str] | None = None, tries: int = 2, **variables: str) -> None:
        """Starts a node; the first is the head."""
        options = {
            "node-name": name,
            "node-ip-address": "127.0.0.1",
            "num-cpus": 2,
            "object-store-memory": 100_000_000,
            "temp-dir": self.folder / name,
        }
        options |= {"address": self.address} if self.processes else {"port": self.port, "include-dashboard": "false"}
        words = [f"--{option}={value}" for option, value in options.items()] + ["--head"] * (not self.processes)
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(
                [*(before or []), RAY, "start", "--block", "--disable-usage-stats", *words],
                env=self.variables | variables,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
            )
        self.processes.append(process)
        began = time.monotonic()
        while "Ray runtime started" not in (self.folder / f"{name}.log").read_text():
            said = (self.folder / f"{name}.log").read_text()
            if process.poll() is not None and "timed out during startup" in said and tries:
                self.processes.remove(process)  # Ray gives a node 30 s, which a busy machine may not
                return self.start(name, before, tries - 1, **variables)
            assert process.poll() is None and time.monotonic() - began < HANGS_S, said
            time.sleep(0.2)
        return None

    def stop(self) -> None:
        """Ends what was started, and what that has started."""
        every = [child for process in self.processes for child in _family(process)]
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for process in every:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    def examine(self, name: str, **settings: str) -> tuple[subprocess.CompletedProcess, dict]:
        """Runs the job on the cluster; what it printed, and what it left for machines."""
        words = {
            "json": str(self.folder / f"{name}.json"),
            "train.storage_path": str(self.shared),
            "output_dir": str(self.folder / "outputs"),
            "min_free_gb": "0",
            "pair_timeout_s": "4",
        }
        done = complete(
            command("doctor", words | {key.replace("__", "."): value for key, value in settings.items()}),
            env=self.variables | {"RAY_ADDRESS": self.address},
        )
        return done, json.loads((self.folder / f"{name}.json").read_text())


def _family(process: subprocess.Popen) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        return [parent, *parent.children(recursive=True)]
    return []


@pytest.fixture(scope="module")
def cluster():
    """A head and a second node, both healthy."""
    hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    folder = Path(tempfile.mkdtemp(prefix="doctor_", dir="/tmp"))  # names of sockets must be short
    started = Cluster(folder, f"http://127.0.0.1:{hub.server_port}")
    try:
        started.start("head")
        started.start("second")
        yield started
    finally:
        started.stop()
        hub.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def healthy(cluster) -> tuple[subprocess.CompletedProcess, dict]:
    """What is said of two good nodes."""
    return cluster.examine("healthy", nodes="2", tracking__uri=f"sqlite:///{cluster.folder}/mlruns.db")


@pytest.fixture(scope="module")
def ill(cluster, healthy) -> tuple[subprocess.CompletedProcess, dict]:
    """What is said when a third node has five faults, a fourth is missing, and MLflow is down."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make mount namespaces (root)")
    if FAKETIME is None:
        pytest.skip("needs Debian's package faketime")
    old = cluster.folder / "old" / "transformers-5.22.0.dist-info"
    old.mkdir(parents=True)
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 5.22.0\n")
    own_folder = f'mount -t tmpfs none {cluster.shared} && exec "$@"'
    cluster.start(
        "third",
        ["unshare", "--mount", "sh", "-c", own_folder, "sh"],
        PYTHONPATH=os.pathsep.join([str(old.parent), str(ROOT)]),
        LD_PRELOAD=str(FAKETIME),
        FAKETIME=f"+{AHEAD_S}s",
        HF_ENDPOINT=f"http://127.0.0.1:{free_port()}",
        GLOO_SOCKET_IFNAME="eth77",
    )
    return cluster.examine("ill", nodes="4", tracking__uri=f"http://127.0.0.1:{free_port()}")


def faults(tree: dict, check: str) -> list[dict]:
    return [found for found in tree["findings"] if (found["check"], found["level"]) == (check, "fault")]


def test_a_healthy_cluster_has_no_fault(healthy, cluster):
    done, tree = healthy
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    checks = {found["check"] for found in tree["findings"] if found["level"] == "ok"}
    assert checks >= {"versions", "network", "storage", "hub", "mlflow", "clock", "gpu"}
    assert set(tree["nodes"]) == {"head", "second"}
    [pair] = [pair for pair in tree["pairs"] if pair["backend"] == "gloo"]
    assert {pair["first"], pair["second"]} == {"head", "second"} and pair["bytes_per_s"] > 1e6
    assert not list(cluster.shared.iterdir()) and not (cluster.folder / "outputs").exists()


def test_each_fault_is_found_and_nobody_else_is_blamed(ill):
    done, tree = ill
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    every = [found for found in tree["findings"] if found["level"] == "fault"]
    assert sorted((found["check"], found["where"]) for found in every) == [
        ("clock", "third"),
        ("hub", "third"),
        ("mlflow", "driver"),
        ("network", "third"),
        ("node", "cluster"),
        ("storage", "third"),
        ("versions", "third"),
    ]
    assert all(found["advice"] for found in every)
    assert f"error: {len(every)} things to mend" in done.stderr


def test_another_version_of_a_package_is_found(ill):
    [found] = faults(ill[1], "versions")
    assert "transformers 5.22.0, the others have" in found["what"]


def test_storage_that_is_not_shared_is_found(ill, cluster):
    [found] = faults(ill[1], "storage")
    assert f"train.storage_path {cluster.shared} is not the driver's" in found["what"]
    assert "without the file that the driver wrote" in found["what"] and "tmpfs" in found["what"]


def test_an_mlflow_that_is_down_is_found(ill):
    [found] = faults(ill[1], "mlflow")
    assert re.search(r"http://127.0.0.1:\d+ can't be used", found["what"])


def test_a_hub_out_of_reach_is_found(ill):
    [found] = faults(ill[1], "hub")
    assert "can't be reached" in found["what"] and "HF_HUB_OFFLINE=1" in found["advice"]


def test_a_clock_that_is_ahead_is_found(ill):
    [found] = faults(ill[1], "clock")
    [ahead] = re.findall(r"the clock is ([\d.]+) s ahead", found["what"])
    assert float(ahead) == pytest.approx(AHEAD_S, abs=1)


def test_a_node_that_gloo_does_not_reach_is_found(ill):
    [found] = faults(ill[1], "network")
    assert "doesn't reach head, second over gloo" in found["what"]
    assert "GLOO_SOCKET_IFNAME=eth77 names no interface of third" in found["advice"]
    good = [pair for pair in ill[1]["pairs"] if pair["problem"] is None]
    assert [{pair["first"], pair["second"]} for pair in good] == [{"head", "second"}]


def test_a_node_that_is_missing_is_found(ill):
    [found] = faults(ill[1], "node")
    assert found["what"] == "3 nodes of the 4 that there should be: head, second, third"


def test_a_cluster_that_is_not_there_is_a_fault(tmp_path):
    nobody = f"127.0.0.1:{free_port()}"
    began = time.monotonic()
    done = complete(command("doctor", {"output_dir": str(tmp_path)}), env=environment() | {"RAY_ADDRESS": nobody})
    assert done.returncode == 1 and f"nothing answers at RAY_ADDRESS={nobody}" in done.stdout
    assert time.monotonic() - began < 60


def test_a_cluster_that_asks_for_a_token_is_a_fault_without_one(cluster, tmp_path):
    variables = cluster.variables | {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": "disabled"}
    variables["RAY_NUM_REDIS_GET_RETRIES"] = "2"  # by itself Ray goes on trying for 20 s
    done = complete(command("doctor", {"output_dir": str(tmp_path)}), env=variables)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stdout + done.stderr
    assert re.search(r"fault +ray +driver", done.stdout) and "RAY_AUTH_MODE" in done.stdout


def test_bad_settings_are_bad_input():
    done = run("doctor", timeout_s="0")
    assert (done.returncode, done.stderr) == (2, "error: timeout_s: must be above 0, got 0.0\n")
