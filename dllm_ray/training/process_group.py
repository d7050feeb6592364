"""The process group of Train workers on several nodes: gloo goes over the network that Ray goes over.

Left to itself gloo listens at the address that the host's name stands for. That is a loopback address on many machines,
where workers of other nodes look for it in vain, or one of several networks.
"""

import os
import socket

import psutil
import ray.util
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"
"""Environment variable that names gloo's network interface; one that is set on a node is left as it is."""


class GroupConfig(TorchConfig):
    """Sets a worker's `VARIABLE` before the process group begins, where workers are on several nodes."""

    @property
    def backend_cls(self) -> type:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group, backend_config: GroupConfig) -> None:
        if len(set(worker_group.execute(ray.util.get_node_ip_address))) > 1:
            worker_group.execute(_use_the_network_of_ray)
        super().on_start(worker_group, backend_config)


def _use_the_network_of_ray() -> None:
    """Runs in each worker."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(VARIABLE, name)


def interface_of(address: str) -> str | None:
    """The network interface of this machine that has an address; None: there is none."""
    for name, found in psutil.net_if_addrs().items():
        for one in found:
            # the address of a link is local to it, so it ends with the interface's name
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.address.partition("%")[0] == address:
                return name
    return None
