"""The training step: plain PyTorch over an iterator of batches, an objective and a strategy. Knows nothing of Ray.

Everything random in a step comes from (seed, step): a resumed run draws what the undisturbed one would have drawn, and
a row gets the same noise on any number of workers.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dllm_ray.objectives.batch import Noisy, Objective, Part
from dllm_ray.objectives.samples import needs_bos
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.optimizer import learning_rate
from dllm_ray.training.strategies.base import Strategy

_DROPOUT, _VALIDATION = 1 << 40, 1 << 41  # offsets that keep the seeds of different uses apart


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch."""

    tensors: dict[str, Tensor]
    """`input_ids`, `labels` [b, T] and what else objectives take (`objectives.batch`)."""
    part: Part
    """Which rows of the global batch these are."""
    tokens: int
    """Tokens of the global batch without padding."""
    origins: Any = None
    """Where the samples of the global batch come from, for whoever formed it."""
    cursor: Mapping[str, Any] = field(default_factory=dict)
    """Where the data stand after this batch, for whoever formed it."""


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
    batch: Batch
    """What it was trained on."""
    finite: bool
    """Whether the gradient was finite; if not, the weights are as they were."""
    poisoned: list[int]
    """Rows of the global batch whose own loss isn't finite, where the gradient wasn't."""
    stop: bool
    """Whether some worker had been asked to stop when the step began."""


def train_steps(
    strategy: Strategy,
    objective: Objective,
    batches: Iterable[Batch],
    config: TrainConfig,
    total_steps: int,
    seed: int,
    start_step: int = 0,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> Iterator[StepResult]:
    """Trains, one optimizer step for each batch.

    A gradient that isn't finite changes no weights; the result says which rows are to blame.

    Args:
        strategy: holds model and optimizer.
        objective: what is minimised.
        batches: this worker's parts of the global batches, from the one of step `start_step` on.
        config: learning rate, clipping, precision, micro-batches.
        total_steps: steps of the whole run; the learning rate follows from it.
        seed: seeds noise and dropout of every step.
        start_step: steps done before.
        asked_to_stop: asked at every step, on every worker; all workers learn what any of them was told.
    """
    lm = strategy.lm
    lm.model.train()
    for step, batch in enumerate(batches, start=start_step):
        torch.manual_seed(seed + _DROPOUT + step * strategy.world_size + strategy.rank)
        generator = torch.Generator().manual_seed(_step_seed(seed, step))
        noisy = _corrupt(strategy, objective, batch, generator)
        denominator, stop = strategy.sum(
            objective.denominator(noisy), torch.tensor(float(asked_to_stop()), device=strategy.device)
        )
        rows = len(noisy)
        size = config.micro_batch_size or rows
        results = []
        for start in range(0, rows, size):
            with strategy.micro_batch(last=start + size >= rows):
                with strategy.autocast():
                    result = objective.loss(lm, noisy.rows(start, start + size), denominator)
                strategy.backward(result.loss)
            results.append(result)
        rate = learning_rate(step, total_steps, config)
        norm = strategy.step(rate, config.clip_norm)
        finite = bool(norm.isfinite())
        yield StepResult(
            step=step + 1,
            loss=torch.stack([result.loss.detach() for result in results]).sum(),
            nll_sum=torch.stack([result.nll_sum for result in results]).sum(),
            targets=torch.stack([result.tokens for result in results]).sum(),
            grad_norm=norm,
            learning_rate=rate,
            batch=batch,
            finite=finite,
            poisoned=[] if finite else _poisoned(strategy, objective, noisy, batch.part),
            stop=bool(stop),
        )


def _corrupt(strategy: Strategy, objective: Objective, batch: Batch, generator: torch.Generator) -> Noisy:
    part = batch.part
    if objective.shift_logits and strategy.world_size > 1:
        # a BOS stands in front of all samples or of none, whichever worker has them
        (needing,) = strategy.sum(torch.tensor(float(needs_bos(batch.tensors)), device=strategy.device))
        part = part._replace(bos=bool(needing))
    return objective.corrupt(batch.tensors, generator, part=part).to(strategy.device)


@torch.no_grad()
def _poisoned(strategy: Strategy, objective: Objective, noisy: Noisy, part: Part) -> list[int]:
    """Rows of the global batch whose loss isn't finite. Every worker has as many rows, so forwards stay in step."""
    bad = torch.zeros(part.total, device=strategy.device)
    for row in range(len(noisy)):
        with strategy.autocast():
            loss = objective.loss(strategy.lm, noisy.rows(row, row + 1)).loss
        if part.start + row < part.total:
            bad[part.start + row] = ~loss.isfinite()
    return strategy.sum(bad)[0].nonzero().flatten().tolist()


@torch.no_grad()
def validate(strategy: Strategy, objective: Objective, batches: Iterable[Batch], seed: int) -> tuple[float, int]:
    """The mean negative ELBO per target token over the validation rows (of Edit Flow: its loss per token); the same
    noise at every call.

    Args:
        strategy, objective: as in `train_steps`.
        batches: this worker's parts of the validation batches.
        seed: seeds the noise.

    Returns:
        (nats per token, target tokens).
    """
    lm, bound = strategy.lm, objective.for_validation()
    was_training = lm.model.training
    lm.model.eval()
    nll = torch.zeros((), device=strategy.device)
    targets = torch.zeros((), device=strategy.device)
    for number, batch in enumerate(batches):
        generator = torch.Generator().manual_seed(_step_seed(seed, _VALIDATION + number))
        noisy = _corrupt(strategy, bound, batch, generator)
        with strategy.autocast():
            result = bound.loss(lm, noisy)
        nll += result.nll_sum
        targets += result.tokens
    lm.model.train(was_training)
    nll, targets = strategy.sum(nll, targets)
    return (nll / targets.clamp(min=1)).item(), int(targets)


def _step_seed(seed: int, step: int) -> int:
    return (seed * 1_000_003 + step) & (2**63 - 1)
