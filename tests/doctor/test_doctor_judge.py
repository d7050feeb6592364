"""What the doctor makes of facts: each fault is named with its place and what to do, and nothing else is blamed."""

import itertools
from collections import Counter

import pytest

from dllm_ray.doctor import judge
from dllm_ray.doctor.findings import Finding, lines, tree
from dllm_ray.doctor.judge import DRIVER, Answer, Pair, Place
from dllm_ray.doctor.network import backends, rounds
from dllm_ray.doctor.run import requirements

NEEDS = ["torch>=2.13.0,<=2.13.0", "transformers>=5.23,<5.24", "rich>=15,<16", "tomli>=2; python_version < '3.0'"]
PYTHON = ">=3.11,<3.14"
PACKAGES = {"torch": "2.13.0+cpu", "transformers": "5.23.0", "rich": "15.0.0", "ray": "2.60.0", "dllm-ray": "0.1.0"}
ADDRESSES = {"a": "10.0.0.1", "b": "10.0.0.2", "c": "10.0.0.3"}


def facts(name: str, **changes) -> dict:
    """Of a healthy node."""
    return {
        "python": "3.11.9",
        "packages": PACKAGES,
        "source": {"folder": "/app/dllm_ray", "digest": "0123abcd"},
        "host": name,
        "host_address": ADDRESSES.get(name),
        "boot": name,
        "interfaces": {"lo": "127.0.0.1", "eth0": ADDRESSES.get(name, "10.0.0.9")},
        "variables": {},
        "open_files": 65536,
        "shared_memory": {"total": 8e9, "free": 8e9},
        "temporary": {"total": 1e11, "free": 5e10},
        "driver": None,
    } | changes


def cluster(**changes) -> dict:
    """The driver and three nodes; changes to a node's facts by its name."""
    return {name: facts(name, **changes.get(name, {})) for name in (DRIVER, "a", "b", "c")}


def faults(found: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.where, finding.what) for finding in found if finding.level == "fault"]


def test_equal_versions_within_bounds_are_one_line():
    [found] = judge.versions(cluster(), NEEDS, PYTHON)
    assert (found.level, found.where) == ("ok", "a, b, c")
    assert found.what == ("Python 3.11.9, ray 2.60.0, torch 2.13.0+cpu, transformers 5.23.0, dllm-ray 0.1.0 (0123abcd)")


def test_the_node_with_another_version_is_named():
    [found] = judge.versions(cluster(b={"packages": PACKAGES | {"transformers": "5.22.1"}}), NEEDS, PYTHON)
    assert (found.level, found.where) == ("fault", "b")
    assert found.what == "transformers 5.22.1, the others have 5.23.0; dllm-ray needs <5.24,>=5.23"
    assert "pip install" in found.advice


@pytest.mark.parametrize(
    ("change", "level", "what"),
    [
        ({"packages": PACKAGES | {"rich": "15.1.0"}}, "warning", "rich 15.1.0, the others have 15.0.0"),
        ({"packages": PACKAGES | {"torch": None}}, "fault", "torch is not installed"),
        ({"python": "3.11.4"}, "warning", "Python 3.11.4, the others have 3.11.9"),
        ({"python": "3.12.1"}, "fault", "Python 3.12.1, the others have 3.11.9"),
        ({"python": "3.9.1"}, "fault", "Python 3.9.1"),
        ({"source": None}, "fault", "dllm-ray can't be imported"),
        (
            {"source": {"folder": "/old", "digest": "ffff0000"}},
            "fault",
            "another revision of dllm-ray than the driver's: source ffff0000 in /old, not 0123abcd",
        ),
    ],
)
def test_what_a_node_has_that_others_have_not(change, level, what):
    [found] = judge.versions(cluster(c=change), NEEDS, PYTHON)
    assert (found.level, found.where, found.what) == (level, "c", what)


def test_a_build_for_another_device_is_no_other_version():
    [found] = judge.versions(cluster(c={"packages": PACKAGES | {"torch": "2.13.0+cu130"}}), NEEDS, PYTHON)
    assert found.level == "ok"


def test_a_version_out_of_bounds_everywhere_is_found():
    old = {"packages": PACKAGES | {"transformers": "5.22.0"}}
    [found] = judge.versions(cluster(driver=old, a=old, b=old, c=old), NEEDS, PYTHON)
    assert faults([found]) == [("driver, a, b, c", "transformers 5.22.0; dllm-ray needs <5.24,>=5.23")]


def test_the_bounds_are_those_of_the_package():
    needs, python = requirements()
    assert any(text.startswith("torch>=") for text in needs) and python.startswith(">=3.")


def test_limits_and_disks_of_a_node():
    nodes = {name: fact for name, fact in cluster().items() if name != DRIVER}
    counted = {name: {"CPU": 2, "object_store_memory": 4e9} for name in nodes}
    [fine] = judge.nodes(nodes, counted, {}, 3)
    assert fine.level == "ok" and "6 CPUs and 12.0 GB" in fine.what
    nodes["a"] = facts("a", shared_memory={"total": 64e6, "free": 64e6})
    nodes["b"] = facts("b", open_files=1024, temporary={"total": 1e11, "free": 3e9})
    found = judge.nodes(nodes, counted, {"d (1a2b)": "health check failed"}, 5)
    assert [(finding.level, finding.where) for finding in found] == [
        ("fault", "cluster"),
        ("warning", "d (1a2b)"),
        ("warning", "a"),
        ("warning", "b"),
        ("fault", "b"),
    ]
    assert "3 nodes of the 5" in found[0].what and "97% full" in found[4].what


def gpu(**changes) -> dict:
    return {"name": "H200", "uuid": "u1", "problem": None, "seconds": 0.1} | changes


def torch(**changes) -> dict:
    return {"torch": "2.13.0+cu130", "cuda": "13.0", "hip": None, "problem": None, "gpus": [gpu(), gpu()]} | changes


SMI = {"problem": None, "gpus": ["H200", "H200"], "version": "580.1", "cuda": "13.0"}


@pytest.mark.parametrize(
    ("device", "driver", "counted", "level", "what"),
    [
        (torch(), SMI, 2, "ok", "2 x H200 compute"),
        (torch(cuda=None, gpus=[]), SMI, 2, "fault", "built for CPUs only, and there are 2 GPUs"),
        (torch(cuda=None, gpus=[]), None, 4, "fault", "built for CPUs only, and there are 4 GPUs"),
        (
            torch(gpus=[], problem="driver too old"),
            SMI | {"cuda": "12.4"},
            2,
            "fault",
            "none of 2 GPUs: driver too old",
        ),
        (torch(), SMI, 4, "fault", "Ray counts 4 GPUs, torch reaches 2"),
        (torch(), SMI, 1, "warning", "Ray counts 1 GPUs, torch reaches 2"),
        (torch(gpus=[gpu()]), SMI, 1, "warning", "the driver lists 2 GPUs, torch reaches 1"),
        (torch(gpus=[gpu(), gpu(problem="out of memory")]), SMI, 2, "fault", "GPU 1 doesn't compute: out of memory"),
        (torch(gpus=[]), SMI | {"problem": "Driver/library version mismatch"}, 0, "fault", "version mismatch"),
        (torch(cuda=None, gpus=[]), None, 0, "ok", "no GPU"),
    ],
)
def test_gpus(device, driver, counted, level, what):
    found = judge.gpus({"a": device}, {"a": facts("a", driver=driver)}, {"a": {"GPU": counted}})
    assert next((finding.level, finding.where) for finding in found) == (level, "a")
    assert what in found[0].what
    if driver and driver["cuda"] == "12.4":
        assert "goes up to CUDA 12.4" in found[0].advice


def test_other_drivers_are_told():
    have = {name: facts(name, driver=SMI | {"version": version}) for name, version in zip("abc", "112", strict=True)}
    found = judge.gpus(dict.fromkeys("abc", torch()), have, {key: {"GPU": 2} for key in "abc"})
    assert [(item.level, item.where) for item in found] == [("ok", "a, b"), ("ok", "c"), ("warning", "c")]


@pytest.mark.parametrize("count", range(2, 10))
def test_rounds_hold_every_pair_once_and_every_node_at_most_once_a_round(count):
    names = [str(number) for number in range(count)]
    found = rounds(names)
    assert len(found) == count - 1 + count % 2
    assert Counter(frozenset(pair) for pairs in found for pair in pairs) == Counter(
        frozenset(pair) for pair in itertools.combinations(names, 2)
    )
    assert all(len({*itertools.chain(*pairs)}) == 2 * len(pairs) for pairs in found)


def test_a_single_node_is_its_own_partner():
    assert rounds(["a"]) == [[("a", "a")]]


def pairs(broken: set[str], problem: str = "connection refused") -> list[Pair]:
    """All pairs of three nodes; those that one of `broken` is part of fail."""
    every = itertools.combinations("abc", 2)
    return [Pair("gloo", *pair, problem if broken & {*pair} else None, 1e9) for pair in every]


def test_healthy_pairs_are_one_line():
    [found] = judge.network(pairs(set()), cluster(), ADDRESSES)
    assert (found.level, found.where) == ("ok", "cluster")
    assert "3 pairs" in found.what and "1.00 GB/s" in found.what


def test_a_node_that_reaches_nobody_is_blamed_alone():
    [found] = judge.network(pairs({"c"}), cluster(), ADDRESSES)
    assert faults([found]) == [("c", "doesn't reach a, b over gloo: connection refused")]
    assert "GLOO_SOCKET_IFNAME" in found.advice


def test_a_broken_link_is_blamed_on_both_its_ends():
    tried = [
        pair if {pair.first, pair.second} != {"a", "b"} else Pair("gloo", "a", "b", "refused") for pair in pairs(set())
    ]
    [found] = judge.network(tried, cluster(), ADDRESSES)
    assert found.where == "a and b" and "refused" in found.what


def test_the_advice_knows_interfaces_that_are_wrong():
    wrong = cluster(c={"variables": {"GLOO_SOCKET_IFNAME": "eth7"}})
    [found] = judge.network(pairs({"c"}), wrong, ADDRESSES)
    assert "GLOO_SOCKET_IFNAME=eth7 names no interface of c" in found.advice
    assert "set GLOO_SOCKET_IFNAME=eth0" in found.advice
    loopback = cluster(c={"host_address": "127.0.1.1"})
    [found] = judge.network(pairs({"c"}), loopback, ADDRESSES)
    assert "host name c means 127.0.1.1" in found.advice and "GLOO_SOCKET_IFNAME=eth0" in found.advice


def test_of_two_nodes_that_part_the_one_with_a_wrong_interface_is_blamed():
    wrong = cluster(b={"variables": {"GLOO_SOCKET_IFNAME": "eth7"}})
    [found] = judge.network([Pair("gloo", "a", "b", "no such interface")], wrong, ADDRESSES)
    assert found.where == "b"
    [found] = judge.network([Pair("gloo", "a", "b", "refused")], cluster(), ADDRESSES)
    assert found.where == "a and b"


def test_a_slow_pair_is_a_warning():
    tried = pairs(set())
    tried[0] = Pair("gloo", "a", "b", bytes_per_s=1e7)
    found = judge.network(tried, cluster(), ADDRESSES)
    assert [(item.level, item.where) for item in found] == [("warning", "a and b"), ("ok", "cluster")]


def test_nccl_is_tried_between_different_gpus_only():
    devices = {"a": {"gpus": [gpu()]}, "b": {"gpus": [gpu()]}, "c": {"gpus": [gpu(uuid="u2")]}, "d": {"gpus": []}}
    between = backends(devices, {"a": "1", "b": "1", "c": "1", "d": "1"})
    assert between("a", "b") == ("gloo",) == between("a", "d")
    assert between("a", "c") == ("gloo", "nccl")
    assert backends({"a": {"gpus": [gpu(), gpu()]}}, {})("a", "a") == ("gloo", "nccl")
    assert between("a", "a") == ("gloo",)


def seen_by(**changes) -> dict:
    return {"read": None, "write": None, "mount": None, "disk": {"total": 1e12, "free": 5e11}} | changes


PLACE = Place("train.storage_path", "/shared/checkpoints")
HERE = {"write": None, "disk": {"total": 1e12, "free": 5e11}}


def test_a_place_that_is_shared():
    visits = {"a": seen_by(), "b": seen_by()}
    [found] = judge.storage(PLACE, HERE, visits, {"a": None, "b": None}, 1e10)
    assert (found.level, found.where) == ("ok", "a, b") and "500 GB free" in found.what
    [low] = judge.storage(PLACE, HERE, visits, {"a": None, "b": None}, 1e12)
    assert low.level == "warning" and "500.0 GB free" in low.what


@pytest.mark.parametrize(
    ("visit", "seen", "what"),
    [
        (
            seen_by(read="no such file", mount={"type": "ext4", "source": "/dev/sda1", "point": "/"}),
            None,
            "is not the driver's: no such file (there it lies on ext4 /dev/sda1, mounted at /)",
        ),
        (seen_by(write="Read-only file system"), None, "can be read, not written: Read-only file system"),
        (seen_by(), "no such file", "the driver doesn't see what is written here: no such file"),
    ],
)
def test_a_place_that_is_another_on_one_node(visit, seen, what):
    found = judge.storage(PLACE, HERE, {"a": seen_by(), "b": visit}, {"a": None, "b": seen}, 1e10)
    [(where, said)] = faults(found)
    assert where == "b" and what in said and "/shared/checkpoints" in said


def test_a_place_that_the_driver_cant_write():
    there = Place("data.cache_dir", "s3://user:hush@bucket/rows")
    [found] = judge.storage(there, {"write": "access denied", "disk": None}, {}, {}, 0)
    assert (found.level, found.where) == ("fault", DRIVER)
    assert "access denied" in found.what and "hush" not in str(found)


def test_the_hub():
    answer = {
        "endpoint": "https://hub",
        "offline": False,
        "token": False,
        "cache": "/c",
        "cache_problem": None,
        "disk": None,
    }
    answers = {
        "a": answer | {"status": 200},
        "b": answer | {"problem": "Connection refused"},
        "c": answer | {"token": True, "status": 401},
        "d": answer | {"offline": True, "cache_problem": "Permission denied"},
        "e": answer | {"status": 200},
    }
    found = judge.hub(answers, 1e9)
    assert [(item.level, item.where) for item in found] == [
        ("ok", "a, e"),
        ("fault", "b"),
        ("fault", "c"),
        ("ok", "d"),
        ("fault", "d"),
    ]
    assert "Connection refused" in found[1].what and "refuses the token" in found[2].what


def test_a_clock_that_is_off_is_found_whoever_asks():
    [fine] = judge.clocks({DRIVER: (0.0, 0.0), "a": (0.002, 0.001), "b": (-0.001, 0.001)}, 1.0)
    assert fine.level == "ok"
    [found] = judge.clocks({DRIVER: (0.0, 0.0), "a": (0.0, 0.001), "b": (-30.0, 0.001)}, 1.0)
    assert found.where == "b" and "30.0 s behind" in found.what
    [found] = judge.clocks({DRIVER: (0.0, 0.0), "a": (5.0, 0.001), "b": (5.0, 0.001)}, 1.0)
    assert found.where == DRIVER and "5.0 s behind" in found.what
    [unsure] = judge.clocks({DRIVER: (0.0, 0.0), "a": (0.0, 0.1), "b": (1.5, 2.0)}, 1.0)
    assert unsure.level == "ok"


def test_mlflow():
    value = {"server": "3.17.2", "client": "3.17.2", "where": "s3://b", "artifacts": None, "is_new": False}
    uri = "http://somebody:hush@mlflow:5000"
    [fine] = judge.mlflow(Answer(value), uri)
    assert fine.level == "ok" and "hush" not in fine.what
    [old] = judge.mlflow(Answer(value | {"server": "2.9.0"}), uri)
    assert old.level == "warning" and "MLflow 2.9.0" in old.what
    [locked] = judge.mlflow(Answer(value | {"artifacts": "AccessDenied"}), uri)
    assert locked.level == "fault" and "no artifacts in s3://b" in locked.what
    [gone] = judge.mlflow(Answer(problem="tracking.uri can't be used: refused"), uri)
    assert gone.level == "fault"
    [unset] = judge.mlflow(Answer(), None)
    assert unset.level == "ok"


def test_nodes_that_dont_answer():
    asked = {"a": Answer(1), "b": Answer(problem="no answer within 60 s"), "c": Answer(problem="no answer within 60 s")}
    [found] = judge.unanswered("hub", asked, "look")
    assert (found.level, found.where, found.what) == ("fault", "b, c", "no answer within 60 s")


def test_findings_for_people_and_for_machines():
    found = [Finding("clock", "ok", "a", "fine"), Finding("hub", "warning", "b", "slow", "wait")]
    assert lines(found[0]) == ["ok      clock     a: fine"]
    assert lines(found[1]) == ["warning hub       b: slow", f"{'':17} -> wait"]
    assert tree(found, pairs=[])["status"] == "warning"
    assert tree(found[:1])["status"] == "ok"
    assert tree([*found, Finding("gpu", "fault", "c", "dead")])["findings"][2]["where"] == "c"
