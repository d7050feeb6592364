"""Several hosts on one machine, with a Ray node on each: a head and two workers, whose cables can be pulled.

Hosts are network namespaces joined by a switch, so that each has an address of its own and nothing else in common but
the disk, which stands in for a shared folder. Where namespaces aren't allowed, they are the nodes of a
`ray.cluster_utils.Cluster`, and a node whose cable is pulled is killed.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

HEAD, WORKERS = "head", ("one", "two")
HEAD_CPUS, WORKER_CPUS = 1, 2
"""Data tasks fit on every host, what asks for more than one CPU on the workers' only."""
_HEALTH = {  # Ray takes an unreachable node for dead within 9 seconds; by itself within 65
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}
_STORE_BYTES = 100_000_000
_START_S, _END_S = 120.0, 10.0


class Hosts:
    """A head and workers. `open_hosts` makes them.

    Args:
        environment: variables of the nodes, and of the jobs that join them.
        folder: a new one with a short path, for what nodes write.
    """

    def __init__(self, environment: dict[str, str], folder: Path):
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        self.folder = folder
        self.environment = environment | _HEALTH | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        self.address = ""
        """Of the head."""
        self._nodes: dict[str, psutil.Process] = {}

    def on_head(self, words: list[str]) -> list[str]:
        """A command line that runs a command on the head."""
        return words

    def job_environment(self) -> dict[str, str]:
        """The environment of a job that joins the cluster."""
        return self.environment | {"RAY_ADDRESS": self.address}

    def running(self, title: str) -> dict[str, list[psutil.Process]]:
        """Host -> the processes of its node whose title holds some words, e.g. `ray::RayTrainWorker`; only hosts that
        have some."""
        found = {}
        for name, node in self._nodes.items():
            own = [process for process in _below(node) if title in _title(process)]
            if own:
                found[name] = own
        return found

    def cut(self, name: str) -> None:
        """Pulls the cable of a host: from now on nothing reaches it, and nothing comes from it."""
        raise NotImplementedError

    def heal(self, name: str) -> None:
        """Plugs the cable in again, and starts a new Ray node on the host."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends all nodes and takes the hosts away."""
        raise NotImplementedError


class Namespaces(Hosts):
    """Network namespaces as hosts: `ip netns`, veth pairs, and a bridge in a namespace of its own as the switch."""

    def __init__(self, environment: dict[str, str], folder: Path):
        super().__init__(environment, folder)
        self._prefix = f"dllm-{os.getpid()}"
        names = (HEAD, *WORKERS)
        self._addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, start=1)}
        self._made: list[str] = []
        self._begun = 0
        try:
            self._make("switch")
            self._switch("link", "add", "name", "bridge", "type", "bridge")
            self._switch("link", "set", "dev", "bridge", "up")
            for name in names:
                self._plug_in(name)
            self.address = f"{self._addresses[HEAD]}:6379"
            self._start(HEAD)
            self._start(*WORKERS)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def allowed() -> bool:
        """Whether namespaces can be made and joined here."""
        if shutil.which("ip") is None:
            return False
        name = f"dllm-{os.getpid()}-probe"
        if subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode:
            return False
        try:
            joined = ["ip", "-n", name, "link", "add", "name", "port", "type", "veth", "peer", "name", "lan"]
            bridge = ["ip", "-n", name, "link", "add", "name", "bridge", "type", "bridge"]
            return not any(subprocess.run(words, capture_output=True).returncode for words in (joined, bridge))
        finally:
            _ip("netns", "delete", name)

    def on_head(self, words: list[str]) -> list[str]:
        return ["ip", "netns", "exec", self._space(HEAD), *words]

    def cut(self, name: str) -> None:
        self._switch("link", "set", "dev", name, "down")

    def heal(self, name: str) -> None:
        self._end(name)  # Ray has taken the node for dead, and takes no such node back
        self._switch("link", "set", "dev", name, "up")
        self._start(name)

    def close(self) -> None:
        for name in self._made:
            self._end(name)
        for name in self._made:
            _ip("netns", "delete", self._space(name))  # with its interfaces
        self._made.clear()

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _make(self, name: str) -> None:
        _ip("netns", "add", self._space(name))
        self._made.append(name)

    def _end(self, name: str) -> None:
        """Ends all processes on a host."""
        self._nodes.pop(name, None)
        _kill(map(int, _ip("netns", "pids", self._space(name)).split()))

    def _switch(self, *words: str) -> None:
        _ip("-n", self._space("switch"), *words)

    def _plug_in(self, name: str) -> None:
        self._make(name)
        space = self._space(name)
        self._switch("link", "add", "name", name, "type", "veth", "peer", "name", "lan", "netns", space)
        self._switch("link", "set", "dev", name, "master", "bridge", "up")
        _ip("-n", space, "address", "add", f"{self._addresses[name]}/24", "dev", "lan")
        for interface in ("lo", "lan"):
            _ip("-n", space, "link", "set", "dev", interface, "up")
        _ip("-n", space, "route", "add", "default", "dev", "lan")  # Ray asks for the address that leads outside

    def _start(self, *names: str) -> None:
        """Starts hosts' nodes, and waits until they have joined the cluster. Ray gives up on one that takes longer than
        half a minute, as may happen on a busy machine: it is started again."""
        until = time.monotonic() + _START_S
        logs = {name: self._begin(name) for name in names}
        while logs:
            for name, log in list(logs.items()):
                if "Ray runtime started" in log.read_text():
                    del logs[name]
                elif time.monotonic() > until:
                    raise RuntimeError(f"the node on host {name} doesn't start: {log.read_text()}")
                elif self._nodes[name].status() == psutil.STATUS_ZOMBIE:
                    logs[name] = self._begin(name)
            time.sleep(0.05)

    def _begin(self, name: str) -> Path:
        """Starts a host's node; returns its log."""
        self._begun += 1
        place = self.folder / str(self._begun)
        words = [str(Path(sys.executable).parent / "ray"), "start", "--block", "--disable-usage-stats"]
        words += [f"--node-ip-address={self._addresses[name]}", f"--temp-dir={place}"]
        words += [f"--object-store-memory={_STORE_BYTES}"]
        if name == HEAD:
            words += ["--head", "--port=6379", "--include-dashboard=false", f"--num-cpus={HEAD_CPUS}"]
        else:
            words += [f"--address={self.address}", f"--num-cpus={WORKER_CPUS}"]
        log = place.with_suffix(".log")
        with log.open("w") as file:
            started = subprocess.Popen(
                ["ip", "netns", "exec", self._space(name), *words],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self._nodes[name] = psutil.Process(started.pid)
        return log


class Nodes(Hosts):
    """Nodes of Ray's own cluster for tests as hosts, in a process beside this one."""

    def __init__(self, environment: dict[str, str], folder: Path):
        super().__init__(environment, folder)
        self._cluster = subprocess.Popen(
            [sys.executable, "-c", _CLUSTER],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._cluster.stdout.readline().strip()
        self._tell(f"add {HEAD}")
        for name in WORKERS:
            self.heal(name)

    def cut(self, name: str) -> None:
        del self._nodes[name]
        self._tell(f"remove {name}")

    def heal(self, name: str) -> None:
        self._tell(f"add {name}")

    def close(self) -> None:
        left = [process.pid for node in self._nodes.values() for process in (node, *_below(node))]
        self._cluster.communicate()
        _kill(left)

    def _tell(self, what: str) -> None:
        self._cluster.stdin.write(what + "\n")
        self._cluster.stdin.flush()
        said = json.loads(self._cluster.stdout.readline())
        if said is not None:
            self._nodes[what.split()[1]] = psutil.Process(said)


_CLUSTER = f"""
import json, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={{"num_cpus": {HEAD_CPUS}, "include_dashboard": False}})
nodes = {{"{HEAD}": cluster.head_node}}
print(cluster.address, flush=True)
for line in sys.stdin:
    what, name = line.split()
    pid = None
    if what == "remove":
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
    else:
        if name not in nodes:
            nodes[name] = cluster.add_node(num_cpus={WORKER_CPUS})
        (raylet,) = nodes[name].all_processes["raylet"]
        pid = raylet.process.pid
    print(json.dumps(pid), flush=True)
cluster.shutdown()
"""


@contextmanager
def open_hosts(environment: dict[str, str]) -> Iterator[Hosts]:
    """A head and two workers for the time of a `with` block; nothing of them is left behind it.

    Args:
        environment: variables of the nodes, and of the jobs that join them.
    """
    folder = Path(tempfile.mkdtemp(prefix="dr", dir="/tmp"))  # paths of sockets have 107 bytes at most
    try:
        hosts = (Namespaces if Namespaces.allowed() else Nodes)(environment, folder)
        try:
            yield hosts
        finally:
            hosts.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return ""


def _kill(pids: Iterable[int]) -> None:
    """Ends processes, and waits until they are gone."""
    killed = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            process.kill()
            killed.append(process)
    psutil.wait_procs(killed, timeout=_END_S)
