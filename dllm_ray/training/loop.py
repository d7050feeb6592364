"""The training step: plain PyTorch over an iterator of batches, an objective and a strategy. Knows nothing of Ray.

Everything random in a step comes from (seed, step): a resumed run draws what the undisturbed one would have drawn, and
a row gets the same noise on any number of workers.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_ray.objectives.mdlm import MDLM, Part
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.optimizer import learning_rate
from dllm_ray.training.strategies.base import Strategy

_DROPOUT, _VALIDATION = 1 << 40, 1 << 41  # offsets that keep the seeds of different uses apart


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch."""

    tensors: dict[str, Tensor]
    """`input_ids`, `labels` [b, T] and, where padding is not attended, `attention_mask` [b, T]."""
    part: Part
    """Which rows of the global batch these are."""
    tokens: int
    """Tokens of the global batch without padding."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. Tensors are this worker's share; `Strategy.sum` adds them up."""

    step: int
    """Steps done so far, this one included."""
    loss: Tensor
    """This worker's part of the loss; the parts add up to the loss of the global batch."""
    nll_sum: Tensor
    """Weighted cross-entropy, summed."""
    targets: Tensor
    """Positions that carry a label."""
    grad_norm: Tensor
    """Norm of the global gradient before clipping."""
    learning_rate: float
    """The step's learning rate."""
    tokens: int
    """Tokens of the global batch without padding."""


def train_steps(
    strategy: Strategy,
    objective: MDLM,
    batches: Iterable[Batch],
    config: TrainConfig,
    total_steps: int,
    seed: int,
    start_step: int = 0,
) -> Iterator[StepResult]:
    """Trains, one optimizer step for each batch.

    Args:
        strategy: holds model and optimizer.
        objective: what is minimised.
        batches: this worker's parts of the global batches, from the one of step `start_step` on.
        config: learning rate, clipping, precision, micro-batches.
        total_steps: steps of the whole run; the learning rate follows from it.
        seed: seeds noise and dropout of every step.
        start_step: steps done before.
    """
    lm = strategy.lm
    lm.model.train()
    for step, batch in enumerate(batches, start=start_step):
        torch.manual_seed(seed + _DROPOUT + step * strategy.world_size + strategy.rank)
        generator = torch.Generator().manual_seed(_step_seed(seed, step))
        noisy = objective.corrupt(batch.tensors, generator, part=batch.part).to(lm.device)
        (denominator,) = strategy.sum(objective.denominator(noisy))
        rows = noisy.input_ids.shape[0]
        size = config.micro_batch_size or rows
        results = []
        for start in range(0, rows, size):
            with strategy.micro_batch(last=start + size >= rows):
                with autocast(lm.device, config.precision):
                    result = objective.loss(lm, noisy.rows(start, start + size), denominator)
                strategy.backward(result.loss)
            results.append(result)
        rate = learning_rate(step, total_steps, config)
        norm = strategy.step(rate, config.clip_norm)
        yield StepResult(
            step=step + 1,
            loss=torch.stack([result.loss.detach() for result in results]).sum(),
            nll_sum=torch.stack([result.nll_sum for result in results]).sum(),
            targets=torch.stack([result.tokens for result in results]).sum(),
            grad_norm=norm,
            learning_rate=rate,
            tokens=batch.tokens,
        )


@torch.no_grad()
def validate(
    strategy: Strategy, objective: MDLM, batches: Iterable[Batch], config: TrainConfig, seed: int
) -> tuple[float, int]:
    """The mean negative ELBO per target token over the validation rows; the same noise at every call.

    Args:
        strategy, objective, config: as in `train_steps`.
        batches: this worker's parts of the validation batches.
        seed: seeds the noise.

    Returns:
        (nats per token, target tokens).
    """
    lm, bound = strategy.lm, objective.for_validation()
    was_training = lm.model.training
    lm.model.eval()
    nll = torch.zeros((), device=lm.device)
    targets = torch.zeros((), device=lm.device)
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(_step_seed(seed, _VALIDATION + number))
        noisy = bound.corrupt(batch.tensors, generator, part=batch.part).to(lm.device)
        with autocast(lm.device, config.precision):
            result = bound.loss(lm, noisy)
        nll += result.nll_sum
        targets += result.tokens
    lm.model.train(was_training)
    nll, targets = strategy.sum(nll, targets)
    return (nll / targets.clamp(min=1)).item(), int(targets)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """bfloat16 matrix products for `bf16`, nothing for `float32`."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) & (2**63 - 1)
