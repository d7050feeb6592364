"""Places where jobs keep things, tried from the driver and from every node: each reads what the other wrote."""

import secrets
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dllm_ray.doctor import judge, probe
from dllm_ray.doctor.config import DoctorConfig
from dllm_ray.doctor.findings import Finding
from dllm_ray.doctor.judge import Answer, Place
from dllm_ray.doctor.nodes import answers, later, within


def places(job: DoctorConfig) -> list[Place]:
    """What the settings name, each place once for each library that jobs open it with."""
    checkpoints = job.train.storage_path
    named = [
        Place("train.storage_path", checkpoints or ""),
        Place("evaluate.cache", job.evaluate.cache or ""),
        Place("data.cache_dir", job.data.cache_dir or "", through="fsspec"),
        *(Place("storage", path) for path in job.storage),
        Place("output_dir", job.output_dir, everywhere=checkpoints is None),
    ]
    found: dict[tuple[str, str], Place] = {}
    for place in named:
        if place.path:
            path = place.path if "://" in place.path else str(Path(place.path).expanduser().absolute())
            through = place.through if "://" in path else "pyarrow"  # folders are the same through both
            found.setdefault((path, through), Place(place.setting, path, through, place.everywhere))
    return list(found.values())


def visit(place: Place, probes: Mapping[str, Any], timeout_s: float, least: float) -> list[Finding]:
    """Tries one place.

    Args:
        place: the place.
        probes: node -> its `Probe`.
        timeout_s: longest wait for each of the steps.
        least: bytes that should be free.
    """
    token = secrets.token_hex(8)
    name = f".dllm_ray_doctor_{token}"
    own = {node: f"{name}_{number}" for number, node in enumerate(probes)} if place.everywhere else {}
    made = within(timeout_s, _make, place.path)
    wrote = made if made.problem else within(timeout_s, probe.put, place.path, place.through, name, token)
    asked: dict[str, Answer] = {}
    seen: dict[str, str | None] = {}
    if wrote.problem is None:
        calls = {
            node: probes[node].visit.remote(place.path, place.through, name, token, file) for node, file in own.items()
        }
        asked = answers(calls, timeout_s)
        # side by side: a store that hangs does so for all
        looks = {node: later(_look, place, own[node], token) for node, answer in asked.items() if _wrote(answer)}
        seen = {node: wait(timeout_s).problem for node, wait in looks.items()}
        answers({node: probes[node].remove.remote(place.path, place.through, own[node]) for node in looks}, timeout_s)
        within(timeout_s, probe.remove, place.path, place.through, name)
    disk = None if "://" in place.path else _disk(place.path)
    if made.problem is None:
        within(timeout_s, _unmake, made.value)
    driver = {"write": wrote.problem, "disk": disk}
    visits = {node: answer.value for node, answer in asked.items() if answer.problem is None}
    label = partial(f"{place.setting} {{}}: {{}}".format, judge.without_credentials(place.path))
    silent = {node: Answer(answer.value, answer.problem and label(answer.problem)) for node, answer in asked.items()}
    advice = "look whether its mount hangs (`df` there), and whether the store's endpoint can be reached from there"
    lost = judge.unanswered("storage", silent, advice)
    return lost + (judge.storage(place, driver, visits, seen, least) if visits or not lost else [])


def _wrote(answer: Answer) -> bool:
    return answer.problem is None and answer.value["write"] is None


def _look(place: Place, name: str, text: str) -> None:
    if probe.get(place.path, place.through, name) != text:
        raise ValueError("it has another text")


def _disk(path: str) -> dict[str, int] | None:
    with suppress(OSError):
        usage = shutil.disk_usage(path)
        return {"total": usage.total, "free": usage.free}
    return None


def _make(path: str) -> list[Path]:
    """Makes a folder as jobs do; returns what wasn't there, the innermost first."""
    if "://" in path:
        return []
    missing = [folder for folder in (Path(path), *Path(path).parents) if not folder.exists()]
    Path(path).mkdir(parents=True, exist_ok=True)
    return missing


def _unmake(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # somebody uses it by now
            folder.rmdir()
