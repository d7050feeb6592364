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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dllm_ray.errors import EvaluationError

_JAIL = Path(__file__).with_name("jail.py")
_MOST_ANSWER = 1 << 16  # bytes; what a verdict takes, and not what a program may send in its place
_MOST_MESSAGE = 600


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    seconds: float = 10.0
    """Time by the clock; as much by the CPU's, rounded up."""
    memory: int = 1 << 30
    """Bytes of address space."""
    file_bytes: int = 1 << 20
    """Bytes of a file it writes."""


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
            answer = _read(process.stdout.fileno(), time.monotonic() + limits.seconds)
            in_time = answer is not None and _ended(process)
        finally:
            _kill(process)
            process.stdout.close()
    return _outcome(answer if in_time else None, token, process.returncode, limits)


def _empty_folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True)


_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def _read(pipe: int, deadline: float) -> bytes | None:
    """What the process says until it closes the pipe; None if it doesn't in time."""
    answer, poll = b"", select.poll()
    poll.register(pipe, select.POLLIN)
    while len(answer) <= _MOST_ANSWER:
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            return None
        part = os.read(pipe, _MOST_ANSWER)
        if not part:
            break
        answer += part
    return answer


def _ended(process: subprocess.Popen) -> bool:
    """Whether the process ends now that it closed its pipe."""
    try:
        process.wait(timeout=1)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _outcome(answer: bytes | None, token: str, status: int, limits: Limits) -> Outcome:
    if answer is None or status == -signal.SIGXCPU:
        return Outcome("timed out", f"it ran for more than {limits.seconds:g} s")
    try:
        verdict = json.loads(answer)
    except ValueError:
        verdict = None
    if not isinstance(verdict, dict):
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return Outcome("failed", f"it ended before its tests did, with {how}")
    if "unconfined" in verdict:
        raise EvaluationError(
            f"this machine can't run a model's code in a sandbox: {verdict['unconfined']}. Leave out the tasks that "
            "run code, or evaluate them on another machine"
        )
    if verdict.get("token") == token and status == 0:
        return Outcome("passed")
    return Outcome("failed", str(verdict.get("message") or "it ended before its tests did")[:_MOST_MESSAGE])
