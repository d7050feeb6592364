"""The nodes of a cluster, and what they answer within a time."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dllm_ray.doctor import probe
from dllm_ray.doctor.judge import Answer
from dllm_ray.errors import first_line

_CLOCK_SAMPLES = 7
_THREADS = 8


@dataclass(frozen=True)
class Node:
    """A node that is alive."""

    node_id: str
    name: str
    """The name it was started with or its address, with the beginning of its id where others have the same."""
    address: str
    resources: Mapping[str, float]
    temporary: str | None
    """Ray's temporary folder on it."""


def alive() -> list[Node]:
    """The nodes of the connected cluster, in the order of their names."""
    rows = [row for row in ray.nodes() if row["Alive"]]
    called = [_name(row) for row in rows]
    found = []
    for row, name in zip(rows, called, strict=True):
        label = name if called.count(name) == 1 else f"{name} ({row['NodeID'][:8]})"
        # SESSION/sockets/plasma_store
        socket = Path(row.get("ObjectStoreSocketName") or "")
        temporary = str(socket.parents[2]) if len(socket.parents) > 2 else None
        found.append(Node(row["NodeID"], label, row["NodeManagerAddress"], dict(row["Resources"]), temporary))
    return sorted(found, key=lambda node: node.name)


def dead() -> dict[str, str]:
    """Nodes that went without being told to: name -> why, in Ray's words."""
    lost = {}
    for row in ray.nodes():
        why = row.get("DeathReasonMessage") or ""
        if not row["Alive"] and row.get("DeathReason") not in _ON_PURPOSE:
            lost[f"{_name(row)} ({row['NodeID'][:8]})"] = first_line(ValueError(why)) if why else "Ray doesn't know why"
    return lost


_ON_PURPOSE = (1, 4)  # expected termination; drained because it was idle


def _name(row: Mapping[str, Any]) -> str:
    return row.get("NodeName") or row["NodeManagerAddress"]


@contextmanager
def actors(kind: type, nodes: list[Node], threads: int = _THREADS) -> Iterator[dict[str, Any]]:
    """A process of `kind` on each node, for the time of a `with` block; they reserve nothing, so a busy cluster has
    room for them.

    Yields:
        Name of the node -> handle.
    """
    started: dict[str, Any] = {}
    try:
        for node in nodes:
            started[node.name] = start(kind, node, threads)
        yield started
    finally:
        for actor in started.values():
            ray.kill(actor)


def start(kind: type, node: Node, threads: int = 1):
    """Starts one process of `kind` on a node."""
    # the class travels as it is here: nodes may have another one, or none
    ray.cloudpickle.register_pickle_by_value(probe)
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
    options = {"num_cpus": 0, "max_concurrency": threads, "scheduling_strategy": there}
    return ray.remote(kind).options(**options).remote()


def answers(calls: Mapping[Any, ray.ObjectRef], timeout_s: float) -> dict[Any, Answer]:
    """What calls return within a time, or why they don't."""
    if not calls:
        return {}
    done, _ = ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    finished = set(done)
    return {
        key: _answer(call) if call in finished else Answer(problem=f"no answer within {timeout_s:g} s")
        for key, call in calls.items()
    }


def _answer(call: ray.ObjectRef) -> Answer:
    try:
        return Answer(ray.get(call))
    except RayTaskError as error:
        cause = error.cause or error
        return Answer(problem=f"{type(cause).__name__}: {first_line(cause)}"[:400])
    except Exception as error:  # Ray has many for a process or node that is gone
        return Answer(problem=f"{type(error).__name__}: {first_line(error)}"[:400])


def within(timeout_s: float, function: Callable[..., Any], *arguments: Any) -> Answer:
    """What a call in this process returns within a time, or why it doesn't; one that hangs is left to itself."""
    return later(function, *arguments)(timeout_s)


def later(function: Callable[..., Any], *arguments: Any) -> Callable[[float], Answer]:
    """Begins a call in this process; what is returned waits for its answer, so many seconds."""
    box: list[Answer] = []

    def work() -> None:
        try:
            box.append(Answer(function(*arguments)))
        except Exception as error:
            box.append(Answer(problem=first_line(error)))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()

    def wait(timeout_s: float) -> Answer:
        thread.join(timeout_s)
        return box[0] if box else Answer(problem=f"no answer within {timeout_s:g} s")

    return wait


def offset(actor: Any, timeout_s: float) -> tuple[float, float]:
    """Seconds that a node's clock is ahead of ours, and how far that may be off: half of the quickest round trip.

    Raises:
        Exception: Ray's, where there is no answer in time.
    """
    best = (0.0, float("inf"))
    for _ in range(_CLOCK_SAMPLES):
        asked, began = time.time(), time.perf_counter()
        there = ray.get(actor.clock.remote(), timeout=timeout_s)
        took = time.perf_counter() - began
        best = min(best, (there - asked - took / 2, took / 2), key=lambda sample: sample[1])
    return best
