"""Which interface gloo takes."""

import os
import socket

import psutil
import pytest

from dllm_ray.training import process_group
from dllm_ray.training.process_group import VARIABLE, interface_of


def test_every_address_of_this_machine_leads_to_its_interface():
    known = [
        (one.address.partition("%")[0], name)
        for name, found in psutil.net_if_addrs().items()
        for one in found
        if one.family in (socket.AF_INET, socket.AF_INET6)
    ]
    assert ("127.0.0.1", interface_of("127.0.0.1")) in known
    for address, _ in known:
        assert (address, interface_of(address)) in known


def test_an_address_of_another_machine_leads_to_none():
    assert interface_of("192.0.2.1") is None


@pytest.mark.parametrize(
    ("nodes", "named", "taken"),
    [
        (["127.0.0.1", "192.0.2.1"], None, interface_of("127.0.0.1")),
        (["127.0.0.1", "192.0.2.1"], "eth7", "eth7"),
        (["127.0.0.1", "127.0.0.1"], None, None),
        (["192.0.2.1", "192.0.2.2"], None, None),  # the worker's own address isn't found: gloo decides
    ],
)
def test_workers_of_several_nodes_get_the_interface_of_ray_unless_one_is_named(monkeypatch, nodes, named, taken):
    monkeypatch.setenv(VARIABLE, "")  # so that it is put back afterwards
    monkeypatch.delenv(VARIABLE)
    if named is not None:
        monkeypatch.setenv(VARIABLE, named)
    began_with = []
    monkeypatch.setattr(process_group._TorchBackend, "on_start", lambda *_: began_with.append(os.environ.get(VARIABLE)))
    monkeypatch.setattr(process_group.ray.util, "get_node_ip_address", lambda: nodes[0])

    class Group:
        def execute(self, function):
            return nodes if function is process_group.ray.util.get_node_ip_address else [function()]

    config = process_group.GroupConfig()
    config.backend_cls().on_start(Group(), config)
    assert began_with == [taken]
