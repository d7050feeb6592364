"""One Ray node, in one task of a Slurm job step: the head in the first task, workers in the others.

    node.py HEAD_IP:PORT SECONDS LAUNCHER_PID

Gives Ray the CPUs, GPUs and memory that Slurm granted the task, a temporary folder of its own, and free ports. Lives
until its standard input ends, and takes all that Ray started along. Signals by which Slurm announces the end of a job
don't reach Ray, whose workers have to save first: the first task passes them on to the launcher, which interrupts the
job.
"""

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

_LONGEST_FOLDER = 40
"""Characters: below it Ray makes sockets, whose paths may have 107 in all."""
_STORE = 0.3
"""Share of a node's memory that Ray's object store may take, as it is by default of a whole machine's."""
_SMALLEST_STORE = 100 << 20
_ANNOUNCED = {signal.SIGTERM, signal.SIGUSR1}
_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_SIOCGIFADDR = 0x8915


class NodeError(Exception):
    """What a user can mend."""


def main(head, seconds, launcher):
    """Returns 0 once it was asked to end, or Ray has ended after it had begun; 1 if Ray did not begin."""
    first = os.environ["SLURM_PROCID"] == "0"
    if first:
        for number in _ANNOUNCED:
            signal.signal(number, lambda *_: _tell(int(launcher)))
    else:
        for number in _ANNOUNCED:
            signal.signal(number, lambda *_: None)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)  # what Ray's processes leave behind is ours to end
    released = threading.Event()
    threading.Thread(target=_until_released, args=(released,), daemon=True).start()
    try:
        if shutil.which("ray") is None:
            raise NodeError(f"{_name()} has no `ray` on its PATH: call sbatch in an environment that all nodes see")
        host, _, port = head.rpartition(":")
        own = host if first else _own_address(host)
        words = ["--head", f"--port={port}", *_head_ports(own)] if first else [f"--address={head}"]
        words += [f"--node-ip-address={own}", f"--dashboard-agent-listen-port={free_port(own)}", *_granted()]
        folder = _temporary_folder()
    except NodeError as error:
        return _fail(str(error))
    try:
        if not first and not _answers(host, int(port), float(seconds), released):
            return 0 if released.is_set() else _fail(f"the Ray head at {head} doesn't answer after {seconds} s")
        return _run(words, own, folder, released)
    finally:
        _end_descendants()
        _keep_logs(folder)
        shutil.rmtree(folder, ignore_errors=True)


def free_port(host):
    """A port that nobody listens on at an address of this machine."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def interface_address(name):
    """The IPv4 address of a network interface; raises OSError where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
    return socket.inet_ntoa(found[20:24])


def _run(words, own, folder, released):
    environment = {**os.environ}
    interface = os.environ.get("DLLM_RAY_INTERFACE") or _interface_of(own)
    if interface:  # or gloo goes by the host's name, which may mean loopback
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, interface)
    environment.pop("RAY_ADDRESS", None)  # a head would take it for a cluster to join
    log = folder / "start.log"
    with log.open("wb") as output:
        ray = subprocess.Popen(
            ["ray", "start", "--block", "--disable-usage-stats", f"--temp-dir={folder}", *words],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _ANNOUNCED),
        )
    while not released.wait(0.2):
        if ray.poll() is not None:
            print(f"Ray ended with status {ray.returncode}:\n{log.read_text(errors='replace')}", flush=True)
            began = any(folder.glob("session_*/sockets/raylet*"))
            return 0 if began else 1  # a job may go on without a node that it had
    return 0


def _until_released(released):
    while os.read(0, 4096):
        pass
    released.set()


def _tell(launcher):
    with contextlib.suppress(OSError):  # it may have ended
        os.kill(launcher, signal.SIGUSR1)


def _answers(host, port, seconds, released):
    """Whether the head listens before the time is over."""
    deadline = time.monotonic() + seconds
    while not released.is_set() and time.monotonic() < deadline:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return True
        except OSError:
            time.sleep(0.3)
    return False


def _own_address(head):
    """The address at which this machine talks to the head."""
    interface = os.environ.get("DLLM_RAY_INTERFACE")
    if interface:
        try:
            return interface_address(interface)
        except OSError as error:
            raise NodeError(f"DLLM_RAY_INTERFACE={interface} has no address on {_name()}: {error}") from None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((head, 9))  # sends nothing
        return probe.getsockname()[0]


def _interface_of(address):
    for _, name in socket.if_nameindex():
        try:
            if interface_address(name) == address:
                return name
        except OSError:
            continue  # without an address
    return None


def _head_ports(own):
    return [
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={free_port('127.0.0.1')}",
        f"--ray-client-server-port={free_port(own)}",
    ]


def _granted():
    """What this task may use, for `ray start`; Ray by itself would take the whole machine."""
    neighbours = _tasks_here()
    cpus = int(os.environ.get("SLURM_CPUS_PER_TASK") or int(os.environ.get("SLURM_CPUS_ON_NODE", "1")) // neighbours)
    words = [f"--num-cpus={max(cpus, 1)}"]

    visible = [os.environ[name] for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if name in os.environ]
    gpus = len([word for word in visible[0].split(",") if word not in ("", "NoDevFiles")]) if visible else 0
    if gpus and neighbours > 1 and "SLURM_GPUS_PER_TASK" not in os.environ:
        raise NodeError(
            f"{neighbours} tasks share the GPUs of {_name()}: say --ntasks-per-node=1, or --gpus-per-task in place of "
            "GPUs for the node"
        )
    words.append(f"--num-gpus={gpus}")

    megabytes = int(os.environ.get("SLURM_MEM_PER_NODE") or 0) / neighbours
    megabytes = megabytes or int(os.environ.get("SLURM_MEM_PER_CPU") or 0) * cpus
    if megabytes:  # or nothing is said of it, or all of the machine's is ours
        words.append(f"--object-store-memory={max(int(megabytes * _STORE) << 20, _SMALLEST_STORE)}")
    return words


def _tasks_here():
    """Tasks of this step on this machine, from a list such as `2(x3),1`."""
    counts = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        count, _, times = part.rstrip(")").partition("(x")
        counts += [int(count)] * int(times or 1)
    return counts[min(int(os.environ.get("SLURM_NODEID", "0")), len(counts) - 1)]


def _temporary_folder():
    """A folder on a disk of this machine; those of this job's earlier starts, which a kill left behind, go."""
    base = Path(os.environ.get("DLLM_RAY_TMP", "/tmp"))
    job = f"ray{os.environ['SLURM_JOB_ID']}."
    start = f"{job}{os.environ.get('SLURM_RESTART_COUNT', '0')}-"
    for left in base.glob(f"{job}*"):
        if not left.name.startswith(start) and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder = Path(tempfile.mkdtemp(prefix=start, dir=base))
    except OSError as error:
        raise NodeError(f"no temporary folder can be made on {_name()}: {error}; DLLM_RAY_TMP names a place") from None
    if len(str(folder)) > _LONGEST_FOLDER:
        folder.rmdir()
        raise NodeError(f"{base} is too long a path for Ray's sockets: name a shorter one in DLLM_RAY_TMP")
    return folder


def _keep_logs(folder):
    """Copies Ray's logs to shared storage, where that is wanted."""
    if not os.environ.get("DLLM_RAY_LOGS"):
        return
    start = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    target = Path(os.environ["DLLM_RAY_LOGS"], start, f"{_name()}-{os.environ['SLURM_PROCID']}")
    for logs in folder.glob("session_2*/logs"):
        shutil.copytree(logs, target, dirs_exist_ok=True, ignore_dangling_symlinks=True)


def _end_descendants():
    """Ends every process below this one, also those that lost their parent."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        alive = _descendants(os.getpid())
        if not alive:
            return
        for process in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.05)


def _descendants(ancestor):
    """Ids of living processes below one; reaps its own that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    children = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
        except OSError:
            continue  # it has ended
        if state != "Z":
            children.setdefault(int(parent), []).append(int(folder.name))
    found, ancestors = [], [ancestor]
    while ancestors:
        below = children.get(ancestors.pop(), [])
        found += below
        ancestors += below
    return found


def _name():
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _fail(message):
    print(f"error: {message}", file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
