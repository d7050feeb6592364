"""The files for `ray up`, as Ray itself reads them."""

import copy
import shlex

import jsonschema
import pytest
from cluster_testing import CLUSTER, PROJECT, ROOT, documents
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

FILES = sorted((CLUSTER / "vm").glob("*.yaml"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def prepared(tree: dict) -> dict:
    """The file with Ray's defaults, checked with Ray's schema and Ray's own rules."""
    config = prepare_config(copy.deepcopy(tree))
    validate_config(config)
    return config


@every_file
def test_ray_takes_the_file(path):
    (tree,) = documents(path)
    config = prepared(tree)
    assert config["head_node_type"] in config["available_node_types"]


@every_file
@pytest.mark.parametrize("mistake", [{"setup_command": []}, {"max_workers": "8"}, {"docker": {"images": "x:1"}}])
def test_a_mistake_is_found(path, mistake):
    (tree,) = documents(path)
    with pytest.raises((jsonschema.ValidationError, ValueError, TypeError)):
        prepared(tree | mistake)


def test_there_are_spot_workers_with_gpus_that_come_and_go():
    (tree,) = documents(CLUSTER / "vm" / "aws.yaml")
    groups = prepared(tree)["available_node_types"]
    assert groups["gpu"]["min_workers"] == 1 < groups["gpu"]["max_workers"]
    assert all(groups[name]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot" for name in ("cpu", "gpu"))
    assert groups["head"]["resources"] == {"CPU": 0}


def test_all_machines_of_ones_own_are_used():
    (tree,) = documents(CLUSTER / "vm" / "onprem.yaml")
    config = prepared(tree)
    (group,) = config["available_node_types"].values()
    assert group["min_workers"] == group["max_workers"] == len(tree["provider"]["worker_ips"])


@every_file
def test_files_and_images_are_there(path):
    (tree,) = documents(path)
    assert tree["docker"]["image"].endswith(f"/dllm-ray:{PROJECT['version']}-cuda")
    for source in tree["file_mounts"].values():
        assert source == "~/.ray/auth_token" or (ROOT / source).is_dir()
    (mount,) = [target for target, source in tree["file_mounts"].items() if source == "."]
    assert f"pip install --no-deps --editable {mount}" in tree["setup_commands"]
    assert all((ROOT / name).is_file() for name in tree["rsync_filter"])
    assert "--volume /shared:/shared" in tree["docker"]["run_options"]
    assert any("mountpoint -q /shared" in command for command in tree["initialization_commands"])


@every_file
def test_ray_start_takes_its_options(path):
    (tree,) = documents(path)
    for commands in (tree["head_start_ray_commands"], tree["worker_start_ray_commands"]):
        stop, command = commands
        assert stop == "ray stop"
        program, name, *words = shlex.split(command)
        assert (program, name) == ("ray", "start")
        start.make_context(name, words)
