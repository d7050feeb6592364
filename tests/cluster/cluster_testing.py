"""The files of `cluster/` as tests read them."""

import io
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
IN_IMAGE = "/opt/dllm_ray"
"""Where the image has the repository's `jobs/` and `configs/`."""
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

_JOB = re.compile(rf"^(?:{IN_IMAGE}/)?jobs/(\w+)\.py$")


def documents(path: Path) -> list[dict[str, Any]]:
    """The objects of a YAML file."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def values(tree: Any, key: str) -> Iterator[Any]:
    """Everything that stands under a key, however deep."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values(value, key)


def check_job(words: list[str]) -> str:
    """Runs a command `python jobs/NAME.py ...` as far as its settings, which the job prints, and returns NAME. What
    takes a job as its arguments may stand in place of `python`.

    Raises:
        AssertionError: there is no such job, or it doesn't take these options.
    """
    assert words[0] in ("python", "cluster/slurm/job.sbatch"), words
    found = _JOB.match(words[1])
    assert found, f"{words[1]} is no job"
    path = ROOT / "jobs" / f"{found[1]}.py"
    assert path.is_file(), f"{path} is not there"
    argv = [word.replace(IN_IMAGE, str(ROOT)) for word in words[2:]]
    said, kept, was = io.StringIO(), list(sys.path), sys.argv
    sys.argv = [str(path), *argv, "--print_config"]
    try:
        with redirect_stdout(said), redirect_stderr(said), pytest.raises(SystemExit) as stop:
            runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv, sys.path[:] = was, kept
    assert stop.value.code == 0, said.getvalue()
    return found[1]


def after_submission(entrypoint: str) -> list[str]:
    """The words that a job is started with, when its entrypoint went through KubeRay's shell, `ray job submit`, and the
    shell on the head."""
    return shlex.split(subprocess.list2cmdline(shlex.split(entrypoint)))


def commands(page: Path) -> Iterator[list[str]]:
    """The commands of a page's shell blocks, in words."""
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words
