"""The process group as a strategy sees it: who am I, how many are we, and sums over all of us."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dllm_ray.errors import ConfigError
from dllm_ray.models.adapters import has_adapter

# of collectives that FSDP2 and DeepSpeed call
warnings.filterwarnings("ignore", message="`torch.distributed.* is deprecated", category=FutureWarning)


class Worker:
    """One of the workers of the process group, or a single one without a group.

    Args:
        device: where this worker computes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        grouped = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if grouped else 0
        self.world_size = dist.get_world_size() if grouped else 1

    def sum(self, *values: Tensor) -> list[Tensor]:
        """Tensors of one shape, summed over workers, in float32."""
        total = torch.stack([value.detach().float() for value in values])
        if self.world_size > 1:
            dist.all_reduce(total)
        return list(total.unbind())


def ensure_group(device: torch.device) -> None:
    """Gives a lone process a group of its own; FSDP2 and DeepSpeed do nothing without one."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def weights_to_export(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that `DiffusionLM.save` writes, each under every name it goes by: of a model with an adapter the
    trained ones, else all."""
    everything = not has_adapter(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if everything or parameter.requires_grad:
            yield name, parameter


@contextmanager
def appearing_as(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A model whose `state_dict` shows these weights in place of its own, which may be shards."""

    def replace(_module, state: dict[str, Tensor], _prefix, _metadata) -> None:
        state.update(weights)

    handle = model.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def global_norm(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    """The 2-norm of a gradient of which each worker holds a part; a scalar on `device`."""
    squared = torch.zeros((), device=device)
    for gradient in gradients:
        squared += torch.linalg.vector_norm(gradient, dtype=torch.float32).to(device) ** 2
    dist.all_reduce(squared)
    return squared.sqrt()


def expect(file: Path, strategy: str) -> None:
    """Makes sure that a checkpoint is a strategy's own, by a file that it always has.

    Raises:
        ConfigError: the file is not there.
    """
    if not file.is_file():
        raise ConfigError(
            f"{file.parent} is no checkpoint of {strategy}; go on with the strategy that wrote it, or start afresh",
            "strategy",
        )
