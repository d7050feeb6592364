"""A PostgreSQL of Debian's package, on loopback, for the time of some tests."""

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_VERSIONS = Path("/usr/lib/postgresql")


@contextmanager
def postgres() -> Iterator[str]:
    """Gives the address of a new, empty database."""
    if shutil.which("pg_ctlcluster") is None or os.geteuid():
        pytest.skip("needs Debian's package postgresql, and root to start a cluster of its own")
    version = max((folder.name for folder in _VERSIONS.iterdir()), key=float)
    name, password = f"dllm-ray-{secrets.token_hex(4)}", secrets.token_hex(8)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    _do("pg_createcluster", version, name, "--port", port, "--start-conf", "manual")
    try:
        _do("pg_ctlcluster", version, name, "start")
        as_owner = ("runuser", "-u", "postgres", "--", "psql", "--port", port, "--quiet", "--command")
        _do(*as_owner, f"CREATE ROLE lab LOGIN PASSWORD '{password}'")
        _do(*as_owner, "CREATE DATABASE mlflow OWNER lab")
        yield f"postgresql://lab:{password}@127.0.0.1:{port}/mlflow"
    finally:
        _do("pg_dropcluster", "--stop", version, name)


def _do(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr
