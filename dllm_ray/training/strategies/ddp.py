"""DDP: a full copy of the model on each worker, gradients added up while backward runs."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from dllm_ray.models.adapters import restore
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.optimizer import build_optimizer, update
from dllm_ray.training.strategies.base import MODEL
from dllm_ray.training.strategies.workers import Worker, expect

_OPTIMIZER = "optimizer.pt"


class DDP(Worker):
    """Distributed data parallelism; without a process group, one plain worker.

    Args:
        lm: the model, on the device it trains on. Its weights are overwritten by worker 0's.
        config: optimizer settings and precision.
    """

    def __init__(self, lm: DiffusionLM, config: TrainConfig):
        super().__init__(lm.device)
        module: nn.Module = lm.module
        if self.world_size > 1:
            devices = [lm.device] if lm.device.type == "cuda" else None
            module = nn.parallel.DistributedDataParallel(module, device_ids=devices)
        self.lm = DiffusionLM(lm.model, lm.tokenizer, lm.spec, module=module)
        self.optimizer = build_optimizer(lm.model.parameters(), config)
        self._precision = config.precision

    def autocast(self) -> AbstractContextManager:
        if self._precision == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        return nullcontext() if last or self.world_size == 1 else self.lm.module.no_sync()

    def backward(self, loss: Tensor) -> None:
        (loss * self.world_size).backward()  # DDP averages over workers; the parts of the loss are to be added

    def step(self, learning_rate: float, clip_norm: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(self.lm.model.parameters(), clip_norm or float("inf"))
        update(self.optimizer, learning_rate, bool(norm.isfinite()))
        return norm

    def save(self, directory: Path) -> None:
        """Worker 0 writes a Hugging Face directory, `model`, and the optimizer's state; the others' are the same."""
        if self.rank == 0:
            self.lm.save(directory / MODEL)
            torch.save(self.optimizer.state_dict(), directory / _OPTIMIZER)

    def load(self, directory: Path) -> None:
        expect(directory / _OPTIMIZER, "ddp")
        restore(self.lm, directory / MODEL)
        self.optimizer.load_state_dict(torch.load(directory / _OPTIMIZER, map_location="cpu", weights_only=True))

    def export(self, directory: Path) -> None:
        if self.rank == 0:
            self.lm.save(directory)
