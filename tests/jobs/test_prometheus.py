"""A Ray cluster at work, Prometheus as dashboards/prometheus sets it up, and the query of every panel.

One cluster with Ray's default authentication by token; a tiny training, then an evaluation and a server at once.
"""

import json
import math
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from dashboards_testing import DASHBOARDS, ROOT, panels, variables
from jobs_testing import HANGS_S, TINY, command, complete, environment

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="needs Debian's package prometheus"),
]
RAY = str(Path(sys.executable).parent / "ray")
STEPS = 60
WINDOW = "10s"
"""In place of Grafana's `$__rate_interval`: several scrapes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running(words: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """A process for the time of a `with` block."""
    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, **options)
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(HANGS_S)


def until(is_so, process: subprocess.Popen, log: Path) -> None:
    """Waits until something is so, as long as a process is there."""
    began = time.monotonic()
    while not is_so():
        assert process.poll() is None and time.monotonic() - began < HANGS_S, log.read_text()
        time.sleep(0.2)


def answers(url: str, body: Any = None) -> int | None:
    """The status of an answer; None: nobody answers."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            response.read()
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


class Prometheus:
    """Asks a Prometheus."""

    def __init__(self, url: str):
        self.url = url
        self.began = time.time()

    def get(self, path: str, **arguments: Any) -> Any:
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}") as response:
            return json.load(response)["data"]

    def values(self, expression: str) -> list[float]:
        """The numbers of all lines of a panel since the beginning."""
        found = self.get("query_range", query=expression, start=self.began, end=time.time(), step=1)
        values = [float(value) for line in found["result"] for _, value in line["values"]]
        return [value for value in values if math.isfinite(value)]


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory, make_lm) -> Iterator[Prometheus]:
    """A Prometheus that has watched a cluster train, evaluate and serve."""
    folder = tmp_path_factory.mktemp("dashboards")
    make_lm().save(folder / "model")  # of random weights: it writes up to the limit
    with watched(folder) as asked:
        yield asked


@contextmanager
def watched(folder: Path) -> Iterator[Prometheus]:
    """A cluster that trains, and evaluates and serves the model of a folder, with a Prometheus."""
    with ExitStack() as stack:
        ray = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp")))  # sockets: short names
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        variables = environment() | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_metrics_report_interval_ms": "1000",
        }
        port = free_port()
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": free_port(),
            "ray-client-server-port": free_port(),
            "dashboard-agent-listen-port": free_port(),
            "temp-dir": ray,
            "num-cpus": 8,
        }
        head = [RAY, "start", "--head", "--block", "--disable-usage-stats"]
        head += [f"--{name}={value}" for name, value in options.items()]
        process = stack.enter_context(running(head, folder / "head.log", env=variables, cwd=folder))
        until((ray / "prom_metrics_service_discovery.json").exists, process, folder / "head.log")

        config = (ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text()
        config = config.replace("/tmp/ray/", f"{ray}/").replace("30s", "1s").replace("10s", "1s")
        (folder / "prometheus.yml").write_text(config)
        where = f"127.0.0.1:{free_port()}"
        words = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
        words += [f"--web.listen-address={where}", "--log.level=warn"]
        process = stack.enter_context(running(words, folder / "prometheus.log"))
        asked = Prometheus(f"http://{where}")
        until(lambda: answers(f"{asked.url}/-/ready") == 200, process, folder / "prometheus.log")

        variables |= {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        settings = {"output_dir": str(folder / "run"), "train.workers": "1", "train.max_steps": str(STEPS)}
        done = complete(command("sft", TINY | settings | {"observe.sample_rows": "0"}), env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        with ThreadPoolExecutor(1) as thread:
            evaluation = thread.submit(evaluate, folder, variables)
            serve(folder, variables)
            done = evaluation.result()
        assert done.returncode == 0, done.stdout + done.stderr
        time.sleep(2)  # the last scrape
        yield asked


def evaluate(folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess:
    """Answers questions, and scores texts, in slices so small that it takes some scrapes."""
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": f"reverse {row}"}) + "\n" for row in range(40)))
    settings = {
        "model.path": str(folder / "model"),
        "output_dir": str(folder / "evaluated"),
        "evaluate.tasks": "[digits, text_file]",
        "evaluate.data_files.text_file": str(folder / "text.jsonl"),
        "evaluate.chat_template": "false",
        "evaluate.limit": "40",
        "evaluate.batch_size": "1",
        "evaluate.workers": "1",
        "evaluate.threads_per_worker": "1",
        "sampler.max_new_tokens": "32",
        "sampler.block_size": "32",
        "sampler.steps": "32",
    }
    return complete(command("evaluate", settings), env=variables)


def serve(folder: Path, variables: dict[str, str]) -> None:
    """Serves, and asks for some seconds: whole answers, streams, and what is refused."""
    port = free_port()
    settings = {"model.path": str(folder / "model"), "model.name": "tiny", "port": str(port)}
    settings |= {"model.sampler.max_new_tokens": "8", "model.threads": "1"}
    log = folder / "serve.log"
    with running(command("serve", settings), log, env=variables, cwd=ROOT) as process:
        until(lambda: "metrics " in log.read_text(), process, log)
        url = f"http://127.0.0.1:{port}/v1/completions"
        question = {"model": "tiny", "prompt": "sort 21"}
        statuses = set()
        end = time.monotonic() + 8
        while time.monotonic() < end:
            for change in ({}, {"stream": True}, {"temperature": -1}):
                statuses.add(answers(url, question | change))
            time.sleep(0.2)
        assert statuses == {200, 400}, log.read_text()


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_query_of_every_panel_returns_data(prometheus, name):
    dashboard = DASHBOARDS[name]
    known = variables(dashboard)
    empty = {}
    for panel in panels(dashboard):
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", WINDOW)
            for variable in known:
                expression = expression.replace(f"${variable}", ".*")
            assert "$" not in expression
            if not prometheus.values(expression):
                empty[panel["title"], target["refId"]] = expression
    assert empty == {}


@pytest.mark.parametrize("name", DASHBOARDS)
def test_every_variable_offers_choices(prometheus, name):
    for variable in variables(DASHBOARDS[name]).values():
        if variable["type"] != "query":
            continue
        metric, _, label = variable["query"]["query"].removeprefix("label_values(").removesuffix(")").rpartition(", ")
        for other in variables(DASHBOARDS[name]):
            metric = metric.replace(f"${other}", ".+")
        found = prometheus.get(f"label/{label}/values", **{"match[]": metric})
        assert found, variable["name"]


def test_what_is_shown_is_what_happened(prometheus):
    def most(expression: str) -> float:
        return max(prometheus.values(expression))

    assert [most(f"ray_dllm_train_{name}") for name in ("step", "planned_steps", "checkpoint_step")] == [STEPS] * 3
    for part in ("requests", "slices"):
        for kind in ("generate", "score"):
            whole = most(f'ray_dllm_bulk_{part}{{kind="{kind}"}}')
            assert most(f'ray_dllm_bulk_{part}_done{{kind="{kind}"}}') == whole > 0, (part, kind)
    assert most('sum(ray_dllm_bulk_answers_total{source="workers"})') == most("sum(ray_dllm_bulk_requests)")
    assert most('ray_dllm_bulk_workers{state="busy"}') == 1
    assert 0 < most("ray_dllm_bulk_tokens_per_forward") <= 1
    assert most("ray_dllm_bulk_noisy_sequences_total") > 40
    asked = [most(f'sum(ray_dllm_requests_total{{status="{status}"}})') for status in (200, 400)]
    assert asked[0] >= 2 * asked[1] > 0
