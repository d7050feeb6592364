"""From facts to findings: what is right, wrong or doubtful about what nodes answered. Pure functions.

Nodes go by their names; `driver` is the process that asks. Each function returns one finding for all places where all
is well, and one for each thing that isn't.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from packaging.requirements import Requirement
from packaging.version import Version

from dllm_ray.config import without_credentials
from dllm_ray.doctor.findings import Finding, names, number

DRIVER = "driver"

_PACKAGE = "dllm-ray"
_SAME = ("ray", "torch", "transformers", "tokenizers", "numpy", "pyarrow", "accelerate", "deepspeed", "peft", "lm-eval")
"""Packages whose objects travel between nodes, or whose parts on several nodes compute together."""
_SHOWN = ("ray", "torch", "transformers")
_OPEN_FILES = 8192
_FULL, _NEARLY_FULL = 0.95, 0.9  # Ray takes nothing more on a disk that is fuller than the first
_SLOW = 0.1  # of the usual speed between two nodes
_GB = 1e9


@dataclass(frozen=True)
class Answer:
    """What came back from a node."""

    value: Any = None
    problem: str | None = None
    """Why there is no value."""


@dataclass(frozen=True)
class Pair:
    """How two nodes, or two processes of one, reached each other."""

    backend: str
    """gloo or nccl."""
    first: str
    second: str
    problem: str | None = None
    """Why they didn't."""
    bytes_per_s: float = 0.0
    """Of a tensor that was added up over both."""


@dataclass(frozen=True)
class Place:
    """Where jobs keep things."""

    setting: str
    """The setting that names it."""
    path: str
    """Absolute path of a folder, or URL."""
    through: str = "pyarrow"
    """Library that jobs open it with."""
    everywhere: bool = True
    """Whether every node must reach it; else the driver alone."""


def unanswered(check: str, answers: Mapping[str, Answer], advice: str) -> list[Finding]:
    """The nodes that a check got no answer from."""
    return [
        Finding(check, "fault", names(where), problem, advice)
        for problem, where in _by(
            {name: answer.problem for name, answer in answers.items() if answer.problem is not None}
        ).items()
    ]


def versions(facts: Mapping[str, Mapping], requirements: Sequence[str], python: str) -> list[Finding]:
    """Whether all places have the same versions, within bounds.

    Args:
        facts: place -> `Probe.facts`; the driver's count as any other's.
        requirements: what this package needs, e.g. `torch>=2.8,<2.14`.
        python: versions of Python that it runs on, e.g. `>=3.11,<3.14`.
    """
    found = _python(facts, python)
    for text in requirements:
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        found += _package(need, {name: fact["packages"].get(need.name) for name, fact in facts.items()})
    found += _source(facts)
    if found:
        return found
    any_facts = facts.get(DRIVER) or next(iter(facts.values()))
    shown = ", ".join(f"{name} {any_facts['packages'].get(name)}" for name in _SHOWN)
    source = (any_facts["source"] or {}).get("digest", "?")
    what = f"Python {any_facts['python']}, {shown}, {_PACKAGE} {any_facts['packages'].get(_PACKAGE) or ''} ({source})"
    return [Finding("versions", "ok", _everywhere(facts), what.replace("  ", " "))]


def _python(facts: Mapping[str, Mapping], python: str) -> list[Finding]:
    found, have = [], {name: fact["python"] for name, fact in facts.items()}
    usual = _usual(have)
    for version, where in _by(have).items():
        if not Requirement(f"python{python}").specifier.contains(version, prereleases=True):
            advice = f"install Python {python} there"
            found.append(Finding("versions", "fault", names(where), f"Python {version}", advice))
        elif version != usual:
            same_minor = version.split(".")[:2] == usual.split(".")[:2]
            what = f"Python {version}, the others have {usual}"
            advice = "the same Python everywhere: Ray joins no two minor versions, and warns of different patches"
            found.append(Finding("versions", "warning" if same_minor else "fault", names(where), what, advice))
    return found


def _package(need: Requirement, have: Mapping[str, str | None]) -> list[Finding]:
    found, usual = [], _usual({name: version and Version(version).public for name, version in have.items()})
    by_version = _by({name: version and Version(version).public for name, version in have.items()})
    for version, where in by_version.items():
        advice = f"pip install '{need}' there, or start all nodes from one image"
        if version is None:
            found.append(Finding("versions", "fault", names(where), f"{need.name} is not installed", advice))
            continue
        outside = not need.specifier.contains(version, prereleases=True)
        differs = version != usual
        if not (outside or differs):
            continue
        what = f"{need.name} {version}"
        if differs:
            what += f", the others have {usual or 'none'}"
            advice = advice if outside else f"pip install {need.name}=={usual} there, or start all nodes from one image"
        if outside:
            what += f"; {_PACKAGE} needs {need.specifier}"
        level = "fault" if outside or need.name in _SAME else "warning"
        found.append(Finding("versions", level, names(where), what, advice))
    return found


def _source(facts: Mapping[str, Mapping]) -> list[Finding]:
    found, digests = [], {name: fact["source"] and fact["source"]["digest"] for name, fact in facts.items()}
    usual = digests.get(DRIVER) or _usual(digests)
    for digest, where in _by(digests).items():
        if digest is None:
            what = f"{_PACKAGE} can't be imported"
            advice = "install it there, or start jobs with `ray job submit --working-dir .`"
        elif digest != usual:
            folder = facts[where[0]]["source"]["folder"]
            what = f"another revision of {_PACKAGE} than the driver's: source {digest} in {folder}, not {usual}"
            advice = "install the same revision there, or start jobs with `ray job submit --working-dir .`"
        else:
            continue
        found.append(Finding("versions", "fault", names(where), what, advice))
    return found


def nodes(
    facts: Mapping[str, Mapping], counted: Mapping[str, Mapping], dead: Mapping[str, str], expected: int | None
) -> list[Finding]:
    """Whether all nodes are there, with the memory, disk and limits that Ray needs.

    Args:
        facts: node -> `Probe.facts`.
        counted: node -> Ray's resources of it.
        dead: node that was lost -> why.
        expected: how many there should be.
    """
    found = []
    if expected is not None and len(counted) < expected:
        what = f"{len(counted)} nodes of the {expected} that there should be: {names(list(counted))}"
        advice = (
            "read the output of `ray start` on the missing ones: the head's address and port, RAY_AUTH_MODE and the "
        )
        found.append(Finding("node", "fault", "cluster", what, advice + "token must be the head's"))
    for name, why in dead.items():
        advice = f"if it wasn't stopped on purpose: its kernel log (out of memory?), and Ray's logs of {name}"
        found.append(Finding("node", "warning", name, f"was lost: {why}", advice))
    for name, fact in facts.items():
        found += _limits(name, fact, counted.get(name, {}))
    if not any(finding.where != "cluster" and finding.where in facts for finding in found) and facts:
        cpus = sum(resources.get("CPU", 0) for resources in counted.values())
        memory = sum(resources.get("object_store_memory", 0) for resources in counted.values())
        what = f"{cpus:g} CPUs and {memory / _GB:.1f} GB of object store by Ray's count; "
        what += "open files, /dev/shm and disks suffice"
        found.append(Finding("node", "ok", _everywhere(facts), what))
    return found


def _limits(name: str, fact: Mapping, counted: Mapping) -> list[Finding]:
    found = []
    store, shared = counted.get("object_store_memory", 0), fact["shared_memory"]
    if shared is None or shared["total"] < store:
        has = "none" if shared is None else f"{shared['total'] / _GB:.1f} GB"
        what = f"/dev/shm has {has}, the object store {store / _GB:.1f} GB, which then lies on disk"
        advice = "a larger /dev/shm (`docker run --shm-size`, an emptyDir of medium Memory), or a smaller "
        found.append(Finding("node", "warning", name, what, advice + "--object-store-memory"))
    if 0 <= fact["open_files"] < _OPEN_FILES:
        what = f"processes may open {fact['open_files']} files"
        found.append(Finding("node", "warning", name, what, "`ulimit -n 65536` before `ray start`"))
    disk = fact["temporary"]
    used = 0.0 if disk is None else 1 - disk["free"] / disk["total"]
    if used > _NEARLY_FULL:
        level = "fault" if used > _FULL else "warning"
        what = f"the disk of Ray's temporary folder is {used:.0%} full, {disk['free'] / _GB:.1f} GB are free"
        advice = f"make room, or `ray start --temp-dir` on another disk: above {_FULL:.0%} Ray takes no more objects"
        found.append(Finding("node", level, name, what, advice))
    return found


def gpus(devices: Mapping[str, Mapping], facts: Mapping[str, Mapping], counted: Mapping[str, Mapping]) -> list[Finding]:
    """Whether Ray, the driver of the devices and torch agree, and every GPU computes.

    Args:
        devices: node -> `Peer.devices`.
        facts: node -> `Probe.facts`.
        counted: node -> Ray's resources of it.
    """
    said: dict[tuple, list[str]] = defaultdict(list)
    for name, device in devices.items():
        for level, what, advice in _gpus_of(device, facts[name], int(counted.get(name, {}).get("GPU", 0))):
            said[level, what, advice].append(name)
    found = [Finding("gpu", level, names(where), what, advice) for (level, what, advice), where in said.items()]
    drivers = {name: (facts[name]["driver"] or {}).get("version") for name in devices}
    having = {name: version for name, version in drivers.items() if version}
    if len(set(having.values())) > 1:
        usual = _usual(having)
        for version, where in _by(having).items():
            if version != usual:
                what = f"NVIDIA driver {version}, the others have {usual}"
                found.append(
                    Finding("gpu", "warning", names(where), what, "the same driver everywhere spares surprises")
                )
    return found


def _gpus_of(device: Mapping, fact: Mapping, counted: int) -> list[tuple[str, str, str]]:
    driver, reached = fact["driver"], len(device["gpus"])
    there = max(len((driver or {}).get("gpus", ())), counted)
    found = []
    if driver is not None and driver["problem"]:
        advice = "install or reload NVIDIA's driver; in a container, start it with the NVIDIA runtime"
        found.append(("fault", f"NVIDIA's driver says: {driver['problem']}", advice))
    if there and device["cuda"] is None and device["hip"] is None:
        advice = "install a torch built for CUDA there"
        return found + [
            ("fault", f"torch {device['torch']} is built for CPUs only, and there are {there} GPUs", advice)
        ]
    if there and not reached:
        built = device["cuda"] or device["hip"]
        what = f"torch {device['torch']}, built for CUDA {built}, reaches none of {there} GPUs"
        what += f": {device['problem']}" if device["problem"] else ""
        level = (driver or {}).get("cuda", "")
        advice = "a container needs the NVIDIA runtime, and CUDA_VISIBLE_DEVICES must not hide them"
        if level and built and Version(level) < Version(built):
            advice = (
                f"the driver ({driver['version']}) goes up to CUDA {level}: a newer driver, or torch for CUDA {level}"
            )
        return found + [("fault", what, advice)]
    hidden = fact["variables"].get("CUDA_VISIBLE_DEVICES")
    if counted > reached:
        what = f"Ray counts {counted} GPUs, torch reaches {reached}"
        found.append(("fault", what, f"`ray start --num-gpus {reached}`, or mend what hides the others"))
    elif reached > counted:
        what = f"Ray counts {counted} GPUs, torch reaches {reached}: no job gets the others"
        found.append(("warning", what, "leave --num-gpus out of `ray start`, unless that is meant"))
    elif there > reached:
        why = f" (CUDA_VISIBLE_DEVICES={hidden})" if hidden is not None else ""
        found.append(
            ("warning", f"the driver lists {there} GPUs, torch reaches {reached}{why}", "unless that is meant")
        )
    for index, gpu in enumerate(device["gpus"]):
        if gpu["problem"]:
            advice = "other processes on it? `nvidia-smi`, and the kernel log for Xid errors; restart the node"
            found.append(("fault", f"GPU {index} doesn't compute: {gpu['problem']}", advice))
    if found:
        return found
    if not there:
        return [("ok", f"no GPU; torch {device['torch']}", "")]
    kinds = Counter(gpu["name"] for gpu in device["gpus"])
    what = ", ".join(f"{number} x {kind}" for kind, number in kinds.items())
    return [("ok", f"{what} compute; torch {device['torch']}, driver {(driver or {}).get('version', '?')}", "")]


def network(pairs: Sequence[Pair], facts: Mapping[str, Mapping], addresses: Mapping[str, str]) -> list[Finding]:
    """Whether all pairs of nodes reach each other, and about equally fast.

    Args:
        pairs: what was tried.
        facts: node -> `Probe.facts`.
        addresses: node -> the address that Ray knows it by.
    """
    found = []
    for backend in dict.fromkeys(pair.backend for pair in pairs):
        tried = [pair for pair in pairs if pair.backend == backend]
        failed = [pair for pair in tried if pair.problem is not None]
        found += _unreached(backend, tried, failed, facts, addresses)
        speeds = [pair.bytes_per_s for pair in tried if pair.problem is None]
        usual = median(speeds) if speeds else 0.0
        for pair in tried:
            if pair.problem is None and len(speeds) > 2 and pair.bytes_per_s < _SLOW * usual:
                what = f"{backend} moves {_speed(pair.bytes_per_s)}, other pairs {_speed(usual)}"
                advice = f"look at their cards and cables, and at {backend.upper()}_SOCKET_IFNAME"
                found.append(Finding("network", "warning", f"{pair.first} and {pair.second}", what, advice))
        if not failed:
            within = all(pair.first == pair.second for pair in tried)
            places = "two processes of the node" if within else f"{number(len(tried), 'pair')} of nodes"
            what = f"{backend} joins {places}, sums are right, {_speed(min(speeds))} at the least"
            where = tried[0].first if within else "cluster"
            found.append(Finding("network", "ok", where, what))
    return found


def _unreached(backend, tried, failed, facts, addresses) -> list[Finding]:
    """One finding for a node that reaches no other, one for each other pair."""
    partners = Counter(name for pair in tried for name in {pair.first, pair.second})
    lost = Counter(name for pair in failed for name in {pair.first, pair.second})
    alone = [name for name in lost if lost[name] == partners[name]]
    if len(alone) == len(partners):  # one of two nodes, or all: the one whose own set-up is wrong, if any is
        odd = [name for name in alone if _interface_trouble(backend, name, facts, addresses)]
        alone = odd or (alone if len(partners) > 2 else [])
    found, told = [], set()
    for name in alone:
        mine = [pair for pair in failed if name in (pair.first, pair.second)]
        told |= {id(pair) for pair in mine}
        others = [pair.second if pair.first == name else pair.first for pair in mine]
        reached = (
            "two processes of it don't reach each other"
            if others == [name]
            else f"doesn't reach {names(sorted(others))}"
        )
        what = f"{reached} over {backend}: {_clearest(mine)}"
        found.append(Finding("network", "fault", name, what, _advice(backend, [name], facts, addresses)))
    for pair in failed:
        if id(pair) not in told:
            where = [pair.first, pair.second]
            what = f"don't reach each other over {backend}: {pair.problem}"
            advice = _advice(backend, where, facts, addresses)
            found.append(Finding("network", "fault", " and ".join(where), what, advice))
    return found


def _clearest(failed: Sequence[Pair]) -> str:
    """The problem that says most: the other side of one only sees that nobody comes."""
    problems = [pair.problem or "" for pair in failed]
    return min(problems, key=lambda text: "no answer" in text or "imeout" in text or "timed out" in text)


def _advice(backend: str, where: Sequence[str], facts, addresses) -> str:
    troubles = [text for name in where if (text := _interface_trouble(backend, name, facts, addresses))]
    if troubles:
        return "; ".join(troubles)
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    return (
        f"let all TCP ports through between the nodes, and set {variable} in the environment of `ray start` to the "
        "interface that they share"
    )


def _interface_trouble(backend: str, name: str, facts, addresses) -> str:
    """What is wrong with the interface that a node would use; empty where nothing is seen."""
    fact, address = facts.get(name), addresses.get(name, "")
    if fact is None:
        return ""
    variable = f"{backend.upper()}_SOCKET_IFNAME"
    has = {interface: at for interface, at in fact["interfaces"].items() if at}
    right = next((interface for interface, at in has.items() if at == address), None)
    to_set = f"set {variable}={right} in the environment of `ray start` on {name}" if right else ""
    chosen = fact["variables"].get(variable)
    # nccl's may be several, with a prefix, `=` or `^`
    if chosen is not None and backend == "gloo" and chosen not in fact["interfaces"]:
        listed = ", ".join(f"{interface} ({at})" for interface, at in has.items())
        return f"{variable}={chosen} names no interface of {name}, which has {listed}" + (
            f": {to_set}" if right else ""
        )
    resolved = fact["host_address"] or ""
    if chosen is None and backend == "gloo" and not address.startswith("127."):
        if resolved.startswith("127."):
            return f"{name}'s host name {fact['host']} means {resolved}, where no other node gets to: {to_set}"
        if not resolved:
            return f"{name}'s host name {fact['host']} has no address: {to_set}"
    return ""


def storage(
    place: Place,
    driver: Mapping[str, str | None],
    visits: Mapping[str, Mapping],
    seen: Mapping[str, str | None],
    least: float,
) -> list[Finding]:
    """Whether a place is one and the same from everywhere.

    Args:
        place: what was tried.
        driver: `write`: what went wrong when the driver wrote, or None; `disk`.
        visits: node -> `Probe.visit`.
        seen: node -> why the driver doesn't see what the node wrote; None: it does.
        least: bytes that should be free.
    """
    label = f"{place.setting} {without_credentials(place.path)}"
    is_url = "://" in place.path
    rights = "the endpoint and keys in the environment of `ray start`" if is_url else "its owner, rights and mount"
    if driver["write"] is not None:
        what = f"{label} can't be written: {driver['write']}"
        return [Finding("storage", "fault", DRIVER, what, f"mend {rights}, or name another place in {place.setting}")]
    found, told = [], set()
    for name, visit in visits.items():
        told.add(name)
        if visit["read"] is not None:
            mount = visit["mount"]
            lies = (
                f" (there it lies on {mount['type']} {mount['source']}, mounted at {mount['point']})" if mount else ""
            )
            what = f"{label} is not the driver's: {visit['read']}{lies}"
            advice = f"mend {rights}" if is_url else "mount the same file system there on every node"
            advice += f", or name a place in {place.setting} that all nodes reach"
            found.append(Finding("storage", "fault", name, what, advice))
        elif visit["write"] is not None:
            what = f"{label} can be read, not written: {visit['write']}"
            found.append(Finding("storage", "fault", name, what, f"mend {rights}"))
        elif seen.get(name) is not None:
            what = f"{label}: the driver doesn't see what is written here: {seen[name]}"
            found.append(Finding("storage", "fault", name, what, "mount the same file system everywhere"))
        else:
            told.discard(name)
    disks = {DRIVER: driver["disk"], **{name: visit["disk"] for name, visit in visits.items() if name not in told}}
    low = {name: disk["free"] for name, disk in disks.items() if disk and disk["free"] < least}
    if low:
        what = f"{label} has {min(low.values()) / _GB:.1f} GB free"
        found.append(
            Finding("storage", "warning", names(list(low)), what, "make room: checkpoints need several times a model")
        )
    if not found:
        free = [disk["free"] for disk in disks.values() if disk]
        room = f", {min(free) / _GB:.0f} GB free" if free else ""
        reach = "written and read from everywhere" if visits else "can be written"
        found.append(Finding("storage", "ok", _everywhere(visits) if visits else DRIVER, f"{label}: {reach}{room}"))
    return found


def hub(answers: Mapping[str, Mapping], least: float) -> list[Finding]:
    """Whether models and data sets can be had from the hub, or from its cache.

    Args:
        answers: place -> `Probe.hub`.
        least: bytes that should be free for the cache.
    """
    said: dict[tuple, list[str]] = defaultdict(list)
    for name, answer in answers.items():
        for line in _hub_of(answer, least):
            said[line].append(name)
    return [Finding("hub", level, names(where), what, advice) for (level, what, advice), where in said.items()]


def _hub_of(answer: Mapping, least: float) -> list[tuple[str, str, str]]:
    found, endpoint = [], without_credentials(answer["endpoint"])
    token = "a token for gated models" if answer["token"] else "no token, so no gated models"
    if answer["offline"]:
        status = ("ok", f"offline (HF_HUB_OFFLINE): models and data come from the cache, {answer['cache']}", "")
    elif answer.get("problem"):
        advice = (
            "HF_ENDPOINT, proxy and firewall; where only local models are used: HF_HUB_OFFLINE=1 in the environment"
        )
        status = ("fault", f"{endpoint} can't be reached: {without_credentials(answer['problem'])}", f"mend {advice}")
    elif answer["status"] in (401, 403):
        what = (
            f"{endpoint} refuses the token (HTTP {answer['status']})"
            if answer["token"]
            else f"{endpoint} wants a token"
        )
        status = ("fault", what, "a valid HF_TOKEN in the environment of `ray start`, or `hf auth login` there")
    elif answer["status"] >= 400:
        status = ("fault", f"{endpoint} answers with HTTP {answer['status']}", "look whether HF_ENDPOINT is a hub")
    else:
        status = ("ok", f"{endpoint} answers; {token}", "")
    found.append(status)
    if answer["cache_problem"]:
        advice = "set HF_HOME to a folder that can be written"
        found.append(("fault", f"the cache {answer['cache']} can't be written: {answer['cache_problem']}", advice))
    elif not answer["offline"] and answer["disk"] and answer["disk"]["free"] < least:
        advice = "make room, or set HF_HOME to a larger disk"
        found.append(("warning", f"the cache {answer['cache']} has {answer['disk']['free'] / _GB:.0f} GB free", advice))
    return found


def clocks(offsets: Mapping[str, tuple[float, float]], most: float) -> list[Finding]:
    """Whether the nodes' clocks agree.

    Args:
        offsets: place -> seconds ahead of the driver, and how far that may be off.
        most: seconds that a clock may be off.
    """
    usual = median(offset for offset, _ in offsets.values())
    found = []
    for name, (offset, error) in offsets.items():
        off = offset - usual
        if abs(off) - error > most:
            what = f"the clock is {abs(off):.1f} s {'ahead' if off > 0 else 'behind'} (known to {error * 1e3:.0f} ms)"
            advice = "start a time service there (chrony, systemd-timesyncd): S3 and TLS refuse clocks that are off"
            found.append(Finding("clock", "fault", name, what, advice))
    if not found:
        worst = max(abs(offset - usual) for offset, _ in offsets.values())
        blur = max(error for _, error in offsets.values())
        what = f"at most {worst * 1e3:.1f} ms apart (known to {blur * 1e3:.1f} ms)"
        found.append(Finding("clock", "ok", _everywhere(offsets), what))
    return found


def mlflow(answer: Answer, uri: str | None) -> list[Finding]:
    """Whether runs can be recorded.

    Args:
        answer: of `tracking.probe`.
        uri: of the store.
    """
    if uri is None:
        what = "tracking.uri is not set: each job records in mlruns.db of its output folder"
        return [Finding("mlflow", "ok", DRIVER, what)]
    shown = without_credentials(uri)
    if answer.problem is not None:
        advice = "start `mlflow server` there or mend tracking.uri; its name and password: MLFLOW_TRACKING_USERNAME, "
        return [Finding("mlflow", "fault", DRIVER, answer.problem, advice + "MLFLOW_TRACKING_PASSWORD")]
    found, value = [], answer.value
    if value["is_new"]:
        what = f"{shown} is no database yet; its folder can be written"
        return [Finding("mlflow", "ok", DRIVER, what)]
    server, client = value["server"], value["client"]
    if value["artifacts"] is not None:
        what = f"{shown} takes runs, but no artifacts in {without_credentials(value['where'])}: {value['artifacts']}"
        advice = (
            "mend rights and keys of that place, or let the server keep artifacts (`mlflow server --serve-artifacts`)"
        )
        found.append(Finding("mlflow", "fault", DRIVER, what, advice))
    if server and Version(server).major != Version(client).major:
        what = f"{shown} is MLflow {server}, here is {client}"
        found.append(Finding("mlflow", "warning", DRIVER, what, "the same major version on both sides"))
    if not found:
        of = f" {server}" if server else ""
        what = f"{shown}{of} took a run and an artifact of MLflow {client}, and deleted it"
        found.append(Finding("mlflow", "ok", DRIVER, what))
    return found


def _usual(have: Mapping[str, Any]) -> Any:
    """What most have; of two that are as many, the driver's."""
    counted = Counter(value for value in have.values() if value is not None)
    if not counted:
        return None
    most = max(counted.values())
    best = [value for value, number in counted.items() if number == most]
    return have[DRIVER] if have.get(DRIVER) in best else best[0]


def _by(have: Mapping[str, Any]) -> dict[Any, list[str]]:
    """Value -> the places that have it."""
    grouped = defaultdict(list)
    for name, value in have.items():
        grouped[value].append(name)
    return dict(grouped)


def _everywhere(places: Mapping[str, Any]) -> str:
    here = [name for name in places if name != DRIVER]
    return names(here) if here else DRIVER


def _speed(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:.2f} GB/s" if bytes_per_s >= 1e8 else f"{bytes_per_s / 1e6:.1f} MB/s"
