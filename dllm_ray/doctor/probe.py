"""What a node is asked: facts of its environment, storage, hub, devices, and a group with another node.

It is sent to the nodes as it stands here, and imports nothing of this package: there the package may be missing or of
another version, which is one of the things to find. Knows nothing of Ray, and judges nothing.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "HF_ENDPOINT", "HF_HUB_OFFLINE"),
    *("RAY_AUTH_MODE", "TRANSFORMERS_OFFLINE"),
)
"""Environment variables whose values are facts; none holds a secret."""
_ADDRESS_OF = 0x8915  # SIOCGIFADDR
_SUM_ROUNDS = 3
_READ_AGAIN_S = 5.0  # how long a shared file system may take to show what was written elsewhere


class Probe:
    """Answers for one node, or for the driver's machine, several questions at a time."""

    def facts(self, packages: Sequence[str], temporary: str | None = None) -> dict[str, Any]:
        """Versions, limits, disks and network of the node.

        Args:
            packages: distributions whose versions are told; None for those that aren't there.
            temporary: Ray's temporary folder.
        """
        name = socket.gethostname()
        return {
            "python": platform.python_version(),
            "packages": {package: _version(package) for package in packages},
            "source": _source("dllm_ray"),
            "host": name,
            "host_address": _resolved(name),
            "boot": _text("/proc/sys/kernel/random/boot_id"),
            "interfaces": _interfaces(),
            "variables": {key: os.environ[key] for key in VARIABLES if key in os.environ},
            "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
            "shared_memory": _disk("/dev/shm"),
            "temporary": _disk(temporary) if temporary else None,
            "driver": _nvidia(),
        }

    def clock(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def visit(self, place: str, through: str, name: str, text: str, own: str) -> dict[str, Any]:
        """Reads a file that the driver wrote, and writes one for the driver to read.

        Args:
            place: folder or URL.
            through: library that jobs open it with, `pyarrow` or `fsspec`.
            name, text: of the driver's file.
            own: name of the node's file; its text is the same.

        Returns:
            `read`, `write`: what went wrong, or None; `mount`, `disk`: of a folder.
        """
        found: dict[str, Any] = {"mount": None, "disk": None}
        if "://" not in place:
            found |= {"mount": _mount(place), "disk": _disk(place)}
        found["read"] = _problem(_expect, place, through, name, text)
        found["write"] = _problem(put, place, through, own, text)
        return found

    def remove(self, place: str, through: str, name: str) -> None:
        """Deletes a file of `visit`."""
        remove(place, through, name)

    def hub(self, timeout_s: float) -> dict[str, Any]:
        """How the Hugging Face hub is set up on the node, and whether it answers.

        Returns:
            `endpoint`, `offline`, `token` (whether there is one), `cache`, `cache_problem`, `disk`; and of an answer
            `status` and `seconds`, or `problem`.
        """
        from huggingface_hub import constants, get_token
        from huggingface_hub.utils import get_session

        token = get_token()
        cache = Path(constants.HF_HUB_CACHE).expanduser()
        found: dict[str, Any] = {
            "endpoint": constants.ENDPOINT,
            "offline": constants.HF_HUB_OFFLINE,
            "token": bool(token),
            "cache": str(cache),
            "cache_problem": _problem(_writable, cache),
            "disk": _disk(str(cache)),
        }
        if not constants.HF_HUB_OFFLINE:
            asked = constants.ENDPOINT + ("/api/whoami-v2" if token else "/api/models?limit=1")
            headers = {"authorization": f"Bearer {token}"} if token else {}
            began = time.perf_counter()
            try:
                answer = get_session().get(asked, headers=headers, timeout=timeout_s)
                found |= {"status": answer.status_code, "seconds": time.perf_counter() - began}
            except Exception as error:  # of the HTTP library in use
                found["problem"] = _said(error)
        return found


class Peer:
    """A process that computes on the node's devices and joins groups; it may hang or die of either."""

    def __init__(self):
        self._store = None

    def devices(self) -> dict[str, Any]:
        """What torch was built for and sees, and whether each GPU computes.

        Returns:
            `torch`, `cuda`, `hip`, `problem` (why torch can't use its GPUs, or None), `gpus` (`name`, `uuid`,
            `problem` and `seconds` of a small matrix product).
        """
        import torch

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            usable = torch.cuda.is_available()
        found = {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": []}
        found["problem"] = None if usable or not said else _first_line(str(said[0].message))
        for index in range(torch.cuda.device_count() if usable else 0):
            began = time.perf_counter()
            problem = _problem(_multiply, index)
            gpu: dict[str, Any] = {"problem": problem, "seconds": time.perf_counter() - began}
            if problem is None:
                facts = torch.cuda.get_device_properties(index)
                gpu |= {"name": facts.name, "uuid": str(facts.uuid)}
            found["gpus"].append(gpu)
        return found

    def open(self, host: str, timeout_s: float) -> int:
        """Lets another process find this one; returns the port to ask at."""
        from torch.distributed import TCPStore

        self._store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
        return self._store.port

    def reduce(self, backend: str, host: str, port: int, rank: int, size: int, timeout_s: float, gpu: int = 0) -> float:
        """Forms a group of two, and adds up a tensor over it.

        Args:
            backend: gloo or nccl.
            host, port: of the first one, which `open` told.
            rank: 0 or 1.
            size: bytes of the tensor.
            timeout_s: longest wait for the other.
            gpu: index of the GPU that nccl takes.

        Returns:
            The seconds that the fastest of a few sums took.

        Raises:
            Exception: the group can't be formed, or the sum is wrong.
        """
        import torch
        import torch.distributed as dist

        patience = timedelta(seconds=timeout_s)
        store, self._store = self._store, None
        if rank:
            store = dist.TCPStore(host, port, is_master=False, timeout=patience)
        device = torch.device("cuda", gpu) if backend == "nccl" else torch.device("cpu")
        bound = {"device_id": device} if backend == "nccl" else {}
        dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=patience, **bound)
        try:
            fastest = float("inf")
            for _ in range(_SUM_ROUNDS):
                values = torch.full((size // 4,), float(rank + 1), device=device)
                began = time.perf_counter()
                dist.all_reduce(values)
                right = bool((values == 3).all())
                fastest = min(fastest, time.perf_counter() - began)
                if not right:
                    raise RuntimeError("the sum of 1 and 2 over the group is not 3 everywhere")
            return fastest
        finally:
            dist.destroy_process_group()


def put(place: str, through: str, name: str, text: str) -> None:
    """Writes a file into a folder that is there, or below a URL."""
    if through == "pyarrow":
        from pyarrow.fs import FileSystem

        files, root = FileSystem.from_uri(place)
        with files.open_output_stream(f"{root}/{name}") as file:
            file.write(text.encode())
    else:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(place)
        files.pipe_file(f"{root}/{name}", text.encode())


def get(place: str, through: str, name: str) -> str:
    """The text of a file in a folder or below a URL."""
    if through == "pyarrow":
        from pyarrow.fs import FileSystem

        files, root = FileSystem.from_uri(place)
        with files.open_input_stream(f"{root}/{name}") as file:
            return file.read().decode()
    from fsspec.core import url_to_fs

    files, root = url_to_fs(place)
    return files.cat_file(f"{root}/{name}").decode()


def remove(place: str, through: str, name: str) -> None:
    """Deletes a file in a folder or below a URL."""
    if through == "pyarrow":
        from pyarrow.fs import FileSystem

        files, root = FileSystem.from_uri(place)
        files.delete_file(f"{root}/{name}")
    else:
        from fsspec.core import url_to_fs

        files, root = url_to_fs(place)
        files.rm_file(f"{root}/{name}")


def _expect(place: str, through: str, name: str, text: str) -> None:
    """Reads a file until it says what is expected, for some seconds."""
    if "://" not in place and not Path(place).is_dir():
        raise FileNotFoundError("there is no such folder")
    until = time.monotonic() + _READ_AGAIN_S
    while True:
        try:
            if get(place, through, name) == text:
                return
            problem: Exception = ValueError("the file has another text")
        except FileNotFoundError:
            problem = FileNotFoundError("the folder is there, without the file that the driver wrote into it")
        if time.monotonic() > until:
            raise problem
        time.sleep(0.5)


def _problem(function, *arguments) -> str | None:
    """What a call raises, in a line; None: nothing."""
    try:
        function(*arguments)
    except Exception as error:
        return _said(error)
    return None


def _said(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _first_line(str(error)) or type(error).__name__


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:300]


def _multiply(index: int) -> None:
    import torch

    ones = torch.ones(1024, 1024, device=torch.device("cuda", index))
    if not bool((ones @ ones == 1024).all()):
        raise RuntimeError("a product of matrices is wrong")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source(package: str) -> dict[str, str] | None:
    """Where a package would be imported from, and a digest of its files; None: it can't be imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".py", ".yaml"):
            digest.update(f"{path.relative_to(folder)}\0".encode() + path.read_bytes())
    return {"folder": str(folder), "digest": digest.hexdigest()[:8]}


def _resolved(name: str) -> str | None:
    try:
        return socket.gethostbyname(name)
    except OSError:
        return None


def _interfaces() -> dict[str, str]:
    """Network interfaces with their IPv4 addresses; empty where they have none."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _ADDRESS_OF, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:
                found[name] = ""
    return found


def _disk(path: str) -> dict[str, int] | None:
    """Total and free bytes of the file system that a path is on, or would be."""
    folder = Path(path)
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return {"total": usage.total, "free": usage.free}


def _mount(path: str) -> dict[str, str] | None:
    """The file system that a path is on: its type, source and mount point."""
    real, best = os.path.realpath(path), None
    for line in _text("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode().decode("unicode_escape")
        inside = point == "/" or real == point or real.startswith(f"{point}/")
        if inside and (best is None or len(point) >= len(best["point"])):
            kind, source = after.split()[:2]
            best = {"type": kind, "source": source, "point": point}
    return best


def _writable(folder: Path) -> None:
    """Tries to write into a folder, or into the nearest one above that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    with tempfile.NamedTemporaryFile(dir=folder):
        pass


def _nvidia() -> dict[str, Any] | None:
    """GPUs, version and CUDA level of NVIDIA's driver; None: there is no driver."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        listed = subprocess.run(asked, capture_output=True, text=True, timeout=20)
        shown = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"problem": "nvidia-smi doesn't answer", "gpus": []} if not isinstance(error, OSError) else None
    if listed.returncode:
        return {"problem": _first_line(listed.stdout + listed.stderr), "gpus": []}
    rows = [line.rpartition(",") for line in listed.stdout.splitlines() if line.strip()]
    level = shown.stdout.partition("CUDA Version:")[2].split()
    return {
        "problem": None,
        "gpus": [name.strip() for name, _, _ in rows],
        "version": rows[0][2].strip() if rows else "",
        "cuda": level[0] if level else "",
    }


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
