"""DeepSpeed ZeRO (arXiv 1910.02054): shards of the optimizer state, then of gradients, then of weights too.

The engine runs in the process group that is there, without DeepSpeed's launcher. Checkpoints are our own (`pieces`):
DeepSpeed's refuse another number of workers, and its universal format has to be converted first. Every worker writes
its float32 weights and moments; every reader takes the slices it needs, in any stage, so nothing is consolidated.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.optimizer import build_optimizer
from dllm_ray.training.strategies.pieces import Piece, Pieces, file_of, write
from dllm_ray.training.strategies.workers import Worker, appearing_as, ensure_group, expect, weights_to_export

_WEIGHTS = "weights"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_MOST_IN_BUCKET = 500_000_000
_SMALL = 100_000
"""Parameters up to this size stay whole on every worker in stage 3."""


class DeepSpeed(Worker):
    """A DeepSpeed engine, of the stage that `config.strategy` names.

    Args:
        lm: the model, the same on every worker, on the device it trains on.
        config: optimizer settings, precision and offload.
    """

    def __init__(self, lm: DiffusionLM, config: TrainConfig):
        ensure_group(lm.device)
        super().__init__(lm.device)
        self._stage = int(config.strategy.removeprefix("zero"))
        deepspeed = _import(lm.device)
        self._gathered = deepspeed.zero.GatheredParameters
        lm.module.collective_head = self._stage == 3  # each run of the head gathers it, on all workers
        self.engine, *_ = deepspeed.initialize(
            model=lm.module,
            optimizer=build_optimizer(lm.model.parameters(), config),
            config=_settings(config, self._stage, lm.model),
            dist_init_required=False,
        )
        self.lm = DiffusionLM(lm.model, lm.tokenizer, lm.spec, module=self.engine)

    def autocast(self) -> AbstractContextManager:
        return nullcontext()  # the engine brings its own

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        # ZeRO-1 exchanges gradients at the last only; the others keep no whole gradient to add to
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages over workers; the parts of the loss are to be added
        self.engine.backward(loss * self.world_size, scale_wrt_gas=False)

    def step(self, learning_rate: float, clip_norm: float) -> Tensor:
        self.engine.optimizer.clip_grad = clip_norm
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()  # leaves everything as it was where the norm isn't finite
        return torch.as_tensor(self.engine.get_global_grad_norm(), dtype=torch.float32, device=self.device)

    def save(self, directory: Path) -> None:
        """Every worker writes the flat buffers that it updates; frozen weights are left out."""
        states = [self._adamw.state.get(buffer, {}) for buffer in self._buffers]
        held = [
            {_WEIGHTS: buffer.detach()} | {kind: state[kind] for kind in _MOMENTS if state}
            for buffer, state in zip(self._buffers, states, strict=True)
        ]
        write(directory, self.rank, held, list(self._pieces()), int(states[0].get("step", 0)))

    def load(self, directory: Path) -> None:
        expect(directory / file_of(0), "zero1, zero2 or zero3")
        stored = Pieces(directory)
        for buffer in self._buffers:
            state = {"step": torch.tensor(float(stored.step), device=buffer.device)}
            self._adamw.state[buffer] = state | {kind: torch.zeros_like(buffer) for kind in _MOMENTS}
        for piece in self._pieces():
            buffer = self._buffers[piece.buffer]
            stored.read(_WEIGHTS, piece, buffer.detach())
            for kind in _MOMENTS if stored.step else ():
                stored.read(kind, piece, self._adamw.state[buffer][kind])
        self._refresh_weights()

    def export(self, directory: Path) -> None:
        """Weights are gathered one by one; worker 0 alone holds them all, in host memory."""
        whole: dict[str, Tensor] = {}
        seen: dict[nn.Parameter, Tensor] = {}
        for name, parameter in weights_to_export(self.lm.model):
            if parameter not in seen:
                with self._gathered([parameter], enabled=self._stage == 3):
                    full = parameter.detach()
                    seen[parameter] = full.cpu().clone() if self.rank == 0 else full.new_empty(0)
            whole[name] = seen[parameter]
        if self.rank == 0:
            with appearing_as(self.lm.model, whole):
                self.lm.save(directory)

    @property
    def _adamw(self) -> torch.optim.Optimizer:
        return self.engine.optimizer.optimizer

    @property
    def _buffers(self) -> list[Tensor]:
        """This worker's float32 weights, one flat buffer for each group of parameters."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups

    def _pieces(self) -> Iterator[Piece]:
        zero = self.engine.optimizer
        for name, parameter in self.lm.model.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._stage == 3:  # every parameter is cut into as many equal pieces as there are workers
                buffer, offset, length = zero.grad_position[zero.get_param_id(parameter)]
                start = self.rank * parameter.ds_tensor.ds_numel
                count = min(length, parameter.ds_numel - start)
                if count > 0:  # the last ones may be padding
                    yield Piece(name, start, count, buffer, offset)
            elif parameter._hp_mapping is not None:  # a group is cut; some parameters lie on other workers
                own, held = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                yield Piece(name, own.start, own.numel, parameter._hp_mapping.param_group_index, held.start)

    def _refresh_weights(self) -> None:
        """The model's weights, out of the buffers."""
        zero = self.engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for number in range(len(self._buffers)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _import(device: torch.device) -> Any:
    """DeepSpeed, told which device to use; its import takes seconds."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # gloo does without the kernel for shared memory, which takes a compiler and most of a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    return deepspeed


def _settings(config: TrainConfig, stage: int, model: nn.Module) -> dict[str, Any]:
    size = sum(parameter.numel() for parameter in model.parameters())
    half_weights = any(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    zero = {
        "stage": stage,
        "reduce_bucket_size": min(size, _MOST_IN_BUCKET),
        "stage3_param_persistence_threshold": _SMALL,
        "offload_optimizer": None if config.offload == "none" else host,
        "offload_param": host if config.offload == "all" else None,
    }
    return {
        "train_micro_batch_size_per_gpu": 1,  # wanted for its statistics only
        "zero_optimization": {name: value for name, value in zero.items() if value is not None},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast, and needs no compiler
        "bf16": {"enabled": half_weights},
        "torch_autocast": {"enabled": config.precision == "bf16" and not half_weights, "dtype": "bfloat16"},
    }
