"""Runs programs that a model wrote, each in a process of its own that is shut in, and says how each ended.

A program gets an empty working directory, which is removed afterwards, no environment, no open files, no network and no
other process, and limits on time, memory and what it writes; `jail` says how. What it prints is thrown away. The
machine is safe from it; its own tests are not: a program that sets out to deceive them, say with objects that equal
everything, can. Knows nothing of tasks or models.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dllm_ray.errors import EvaluationError
from dllm_ray.evaluation.jail import CONFINED

_JAIL = Path(__file__).with_name("jail.py")
_MOST_ANSWER = 1 << 16  # bytes; what a verdict takes, and not what a program may send in its place
_MOST_MESSAGE = 600
_GLANCE = 0.05  # seconds between looks at what a program does
_BLOCK = 4096  # bytes that a file or folder takes beside what it holds


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Time by the clock; as much by the CPU's, rounded up."""
    memory: int = 1 << 30
    """Bytes of address space."""
    file_bytes: int = 1 << 20
    """Bytes of a file it writes."""
    folder_bytes: int = 64 << 20
    """Bytes of all files in its folder, looked at 20 times a second; it may write some more before it is stopped."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    status: Literal["passed", "failed", "timed out"]
    """passed: it ran to its end; failed: it raised, left early or was stopped."""
    message: str = ""
    """Why it did not pass: the exception, in one line."""

    @property
    def passed(self) -> bool:
        """Whether it ran to its end."""
        return self.status == "passed"


def run(programs: Sequence[str], limits: Limits | None = None, workers: int | None = None) -> list[Outcome]:
    """Runs Python programs, several at a time.

    Args:
        programs: sources; one passes if it comes to its end without an exception.
        limits: of each program; None: the defaults.
        workers: programs at a time; None: one for each core.

    Raises:
        EvaluationError: this machine can't shut programs in. None of them was run.
    """
    limits = limits or Limits()
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(lambda program: _run_one(program, limits), programs))


def check() -> None:
    """Makes sure that programs can be shut in here.

    Raises:
        EvaluationError: they can't, and why.
    """
    (outcome,) = run(["pass"], Limits(seconds=60))
    if not outcome.passed:
        raise EvaluationError(f"an empty program {outcome.status} in the sandbox: {outcome.message}")


def _run_one(program: str, limits: Limits) -> Outcome:
    token = secrets.token_hex(16)
    cpu_seconds = int(limits.seconds) + 1
    order = {"program": program, "token": token, "memory": limits.memory, "file_bytes": limits.file_bytes}
    with _empty_folder() as folder, tempfile.TemporaryFile() as request:
        request.write(json.dumps(order | {"cpu_seconds": cpu_seconds}).encode())
        request.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", str(_JAIL)],
            stdin=request,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PATH": os.defpath, **_ONE_THREAD},
            start_new_session=True,
        )
        try:
            answer, stopped = _follow(process, folder, limits)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    return stopped or _outcome(answer, token, process.returncode, limits)


@contextlib.contextmanager
def _empty_folder() -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        with contextlib.suppress(RecursionError):
            folder.cleanup()
        if os.path.lexists(folder.name):  # folders in folders in folders, too many for Python
            subprocess.run(["rm", "-rf", "--", folder.name], check=False, stderr=subprocess.DEVNULL)


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _follow(process: subprocess.Popen, folder: str, limits: Limits) -> tuple[bytes, Outcome | None]:
    """What the process says until it has ended, and how it did where it is to be stopped before."""
    answer, pipe, poll = b"", process.stdout.fileno(), select.poll()
    poll.register(pipe, select.POLLIN)
    deadline, closed, ended = time.monotonic() + limits.seconds, False, False
    while not ended:
        if closed:
            ended = _ends(process)
        elif poll.poll(_GLANCE * 1000):
            part = os.read(pipe, _MOST_ANSWER)
            answer, closed = answer + part, not part
        if _exceeds(folder, limits.folder_bytes):
            return answer, Outcome("failed", f"it wrote more than {limits.folder_bytes} bytes of files")
        if len(answer) > _MOST_ANSWER:
            return answer, Outcome("failed", "it wrote to the pipe of its verdict")
        if not ended and time.monotonic() > deadline:
            return answer, _too_late(limits)
    return answer, None


def _ends(process: subprocess.Popen) -> bool:
    try:
        process.wait(timeout=_GLANCE)
    except subprocess.TimeoutExpired:
        return False
    return True


def _exceeds(folder: str, most: int) -> bool:
    """Whether the files below a folder take more bytes than `most`; one that can't be looked into counts as if."""
    size, left = 0, [folder]
    while left:
        try:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    size += _BLOCK
                    with contextlib.suppress(FileNotFoundError):  # removed since
                        size += entry.stat(follow_symlinks=False).st_blocks * 512
                    if size > most:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        left.append(entry.path)
        except FileNotFoundError:  # removed since
            continue
        except OSError:
            return True
    return False


def _too_late(limits: Limits) -> Outcome:
    return Outcome("timed out", f"it ran for more than {limits.seconds:g} s")


def _outcome(answer: bytes, token: str, status: int, limits: Limits) -> Outcome:
    """What the jail said of a process that ended by itself; the program may have said other things."""
    confined = answer.startswith(CONFINED)
    if status == -signal.SIGXCPU:
        return _too_late(limits)
    try:
        verdict = json.loads(answer.removeprefix(CONFINED))
    except (ValueError, RecursionError):
        verdict = None
    if not isinstance(verdict, dict):
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return Outcome("failed", f"it ended before its tests did, with {how}")
    if not confined:
        raise EvaluationError(
            f"this machine can't run a model's code in a sandbox: {verdict['unconfined']}. Leave out the tasks that "
            "run code, or evaluate them on another machine"
        )
    if verdict.get("token") == token and status == 0:
        return Outcome("passed")
    message = verdict.get("message")
    message = message if message and isinstance(message, str) else "it ended before its tests did"
    return Outcome("failed", message[:_MOST_MESSAGE].encode(errors="backslashreplace").decode())
