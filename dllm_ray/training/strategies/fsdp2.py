"""FSDP2: weights, gradients and optimizer state lie in shards, and each layer's weights are gathered while it runs.

torch's `fully_shard` (arXiv 2304.11277). Each transformer layer is a unit of gathering, and what remains (embeddings,
head, norms) another: they are whole during the whole forward, so that the head may run as often as it likes.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from dllm_ray.models.checkpoint import DISTRIBUTED
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.optimizer import build_optimizer, update
from dllm_ray.training.strategies.workers import (
    Worker,
    appearing_as,
    ensure_group,
    expect,
    global_norm,
    weights_to_export,
)

_TRAINED = StateDictOptions(ignore_frozen_params=True, strict=False)


class FSDP2(Worker):
    """Fully sharded data parallelism.

    With precision `bf16`, gathered weights and the activations are bfloat16; the shards and the sums of gradients keep
    the type of the model and float32.

    Args:
        lm: the model, the same on every worker, on the device it trains on. It is sharded in place.
        config: optimizer settings, precision and offload.
    """

    def __init__(self, lm: DiffusionLM, config: TrainConfig):
        device = lm.device
        ensure_group(device)
        super().__init__(device)
        half = config.precision == "bf16"
        settings = {
            "mesh": init_device_mesh(device.type, (self.world_size,)),
            "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy(),
            "offload_policy": CPUOffloadPolicy(device.type == "cuda") if config.offload == "all" else OffloadPolicy(),
        }
        for layer in _layers(lm.model):
            fully_shard(layer, **settings)
        fully_shard(lm.module, **settings)
        self.lm = lm
        self.optimizer = build_optimizer(lm.model.parameters(), config)

    def autocast(self) -> AbstractContextManager:
        return nullcontext()  # the weights are cast where they are gathered

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        # until the last, a worker adds up whole gradients of its own: time is saved, and memory spent
        self.lm.module.set_requires_gradient_sync(last)
        yield

    def backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # FSDP averages over workers; the parts of the loss are to be added

    def step(self, learning_rate: float, clip_norm: float) -> Tensor:
        gradients = [p.grad.to_local() for p in self.lm.model.parameters() if p.grad is not None]
        norm = global_norm(gradients, self.device)
        if clip_norm:
            factor = (clip_norm / (norm + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.to(gradient.device))
        update(self.optimizer, learning_rate, bool(norm.isfinite()))
        return norm

    def save(self, directory: Path) -> None:
        """Every worker writes its shards in the format of `torch.distributed.checkpoint`; frozen weights are left
        out."""
        dcp.save(self._state(), checkpoint_id=directory)

    def load(self, directory: Path) -> None:
        expect(directory / DISTRIBUTED, "fsdp2")
        state = self._state()
        dcp.load(state, checkpoint_id=directory)
        set_model_state_dict(self.lm.model, state["model"], options=_TRAINED)
        set_optimizer_state_dict(self.lm.model, self.optimizer, state["optimizer"], options=_TRAINED)

    def export(self, directory: Path) -> None:
        """Weights are gathered one by one; worker 0 alone holds them all, in host memory."""
        whole: dict[str, Tensor] = {}
        seen: dict[nn.Parameter, Tensor] = {}
        for name, parameter in weights_to_export(self.lm.model):
            if parameter not in seen:
                full = parameter.detach().to(self.device).full_tensor()
                seen[parameter] = full.cpu() if self.rank == 0 else full.new_empty(0)
            whole[name] = seen[parameter]
        if self.rank == 0:
            with appearing_as(self.lm.model, whole):
                self.lm.save(directory)

    def _state(self) -> dict:
        return {
            "model": get_model_state_dict(self.lm.model, options=_TRAINED),
            "optimizer": get_optimizer_state_dict(self.lm.model, self.optimizer, options=_TRAINED),
        }


def _layers(model: nn.Module) -> Iterator[nn.Module]:
    """The transformer layers of any architecture: the members of its outermost lists of modules."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)
