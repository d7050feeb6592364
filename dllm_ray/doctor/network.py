"""Process groups of two between all pairs of nodes: in rounds, in each of which every node has at most one partner."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray

from dllm_ray.doctor.judge import Answer, Pair
from dllm_ray.doctor.nodes import Node, answers, start
from dllm_ray.doctor.probe import Peer

_BYTES = {"gloo": 4 << 20, "nccl": 64 << 20}
_GIVEN_UP = 3  # partners in vain after which a node is asked no more
_LATER_S = 10.0  # how much longer than a group's own patience its processes are waited for


def rounds(names: Sequence[str]) -> list[list[tuple[str, str]]]:
    """All pairs of names in the fewest rounds, each name at most once in a round; of a single name, it with itself."""
    if len(names) == 1:
        return [[(names[0], names[0])]]
    circle: list[str | None] = [*names, *[None] * (len(names) % 2)]
    found = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        found.append([(first, second) for first, second in facing if first is not None and second is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


class Peers:
    """A process for groups on each node, replaced when it dies or hangs. Used in a `with` block.

    Args:
        nodes: the nodes. A single one gets two processes.
    """

    def __init__(self, nodes: Sequence[Node]):
        self._nodes = {node.name: node for node in nodes}
        self._seats = [(node.name, 0) for node in nodes] + [(node.name, 1) for node in nodes] * (len(nodes) == 1)
        self._actors: dict[tuple[str, int], Any] = {}
        self._looking: dict[tuple[str, int], ray.ObjectRef] = {}

    def __enter__(self) -> "Peers":
        for seat in self._seats:
            self._fill(seat)
            self._looking[seat] = self._actors[seat].devices.remote()  # they import torch while others are asked
        return self

    def __exit__(self, *_error) -> None:
        for actor in self._actors.values():
            ray.kill(actor)

    def devices(self, timeout_s: float) -> dict[str, Answer]:
        """`Peer.devices` of each node. A process that doesn't answer is replaced."""
        found = answers(self._looking, timeout_s)
        for seat, answer in found.items():
            if answer.problem is not None:
                self._fill(seat)
        return {name: found[name, 0] for name in self._nodes}

    def reach(
        self, backends: Callable[[str, str], Sequence[str]], timeout_s: float, skip: Sequence[str] = ()
    ) -> list[Pair]:
        """Tries all pairs.

        Args:
            backends: which of gloo and nccl to try between two nodes.
            timeout_s: a group's patience.
            skip: nodes that are left out.
        """
        found: list[Pair] = []
        failures: Counter[str] = Counter()
        reached: set[str] = set()
        names = [name for name in self._nodes if name not in skip]
        for pairs in rounds(names) if len(names) > 1 or len(self._nodes) == 1 else ():
            for backend in ("gloo", "nccl"):
                mine = [pair for pair in pairs if backend in backends(*pair)]
                given_up = {name for name, count in failures.items() if count >= _GIVEN_UP and name not in reached}
                tried = self._round(backend, [pair for pair in mine if not given_up & {*pair}], timeout_s)
                for pair in mine:
                    if given_up & {*pair}:
                        tried.append(Pair(backend, *pair, problem="not tried, after others in vain: no answer"))
                for pair in tried:
                    if pair.problem is None:
                        reached |= {pair.first, pair.second}
                    else:
                        failures.update({pair.first, pair.second})
                found += tried
        return found

    def _round(self, backend: str, pairs: Sequence[tuple[str, str]], timeout_s: float) -> list[Pair]:
        hosts = {pair: self._nodes[pair[0]].address for pair in pairs}
        seats = {pair: ((pair[0], 0), (pair[1], int(pair[0] == pair[1]))) for pair in pairs}
        opening = {pair: self._actors[seats[pair][0]].open.remote(hosts[pair], timeout_s) for pair in pairs}
        ports = answers(opening, timeout_s + _LATER_S)
        calls = {}
        for pair, port in ports.items():
            if port.problem is None:
                for rank in (0, 1):
                    ask = self._actors[seats[pair][rank]].reduce
                    gpu = seats[pair][rank][1]  # two processes of one node take one each
                    arguments = (backend, hosts[pair], port.value, rank, _BYTES[backend], timeout_s, gpu)
                    calls[pair, rank] = ask.remote(*arguments)
        told = answers(calls, timeout_s + _LATER_S)
        found = []
        for pair in pairs:
            parts = [told[pair, rank] for rank in (0, 1)] if ports[pair].problem is None else [ports[pair]]
            for rank, answer in enumerate(parts):
                if answer.problem is not None and _is_lost(answer.problem):
                    ray.kill(self._actors[seats[pair][rank]])
                    self._fill(seats[pair][rank])
            found.append(_pair(backend, pair, parts))
        return found

    def _fill(self, seat: tuple[str, int]) -> None:
        self._actors[seat] = start(Peer, self._nodes[seat[0]])


def backends(devices: Mapping[str, Mapping], boots: Mapping[str, str]) -> Callable[[str, str], Sequence[str]]:
    """Which backends two nodes should reach each other over: nccl where both have GPUs, and not the same one.

    Args:
        devices: node -> `Peer.devices`.
        boots: node -> id of its machine's boot.
    """

    def between(first: str, second: str) -> Sequence[str]:
        there = [devices.get(name, {}).get("gpus", []) for name in (first, second)]
        if not all(there) or any(gpus[0]["problem"] for gpus in there):
            return ("gloo",)
        if first == second:
            return ("gloo", "nccl") if len(there[0]) > 1 else ("gloo",)
        is_same = there[0][0]["uuid"] == there[1][0]["uuid"] and boots.get(first) == boots.get(second)
        return ("gloo",) if is_same else ("gloo", "nccl")

    return between


def _is_lost(problem: str) -> bool:
    return problem.startswith(("no answer", "ActorDied", "ActorUnavailable", "RayActorError"))


def _pair(backend: str, pair: tuple[str, str], parts: Sequence[Answer]) -> Pair:
    problems = [answer.problem for answer in parts if answer.problem is not None]
    if problems:
        # who fails at once says why; the other one only that nobody came
        told = min(problems, key=lambda text: "imeout" in text or "timed out" in text or "no answer" in text)
        return Pair(backend, *pair, problem=told)
    return Pair(backend, *pair, bytes_per_s=_BYTES[backend] / max(answer.value for answer in parts))
