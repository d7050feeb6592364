"""What MDLM and BD3LM share: tokens are masked with probability 1 - alpha(t), and the masked ones are asked for.

`corrupt` holds all randomness, `loss` is deterministic; how the model is shown a corrupted batch is each objective's
own. Shapes: B rows, T positions, N masked positions.
"""

import dataclasses
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.spec import IGNORE_INDEX, DiffusionSpec
from dllm_ray.objectives import noise, samples
from dllm_ray.objectives.batch import LossResult, NoisyBatch, Part
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.objectives.schedules import alpha_schedule, elbo_weight
from dllm_ray.objectives.weights import context_adaptive


class MaskedDiffusion(ABC):
    """A masked-diffusion objective.

    Args:
        spec: the model's facts.
        shift_logits: read logits one position to the left; None: as the spec says. A BOS without label is put in front
            of each sample unless every sample already begins without one, so that first tokens have a left neighbour.
        settings: fields of `ObjectiveConfig`.

    Raises:
        ConfigError: settings that don't exist or don't go together, or a model without a mask token.
    """

    name: ClassVar[str]
    pairs: ClassVar[None] = None

    def __init__(self, spec: DiffusionSpec, *, shift_logits: bool | None = None, **settings):
        self.config = ObjectiveConfig(name=self.name, **settings)
        if spec.mask_token_id is None:
            raise ConfigError(f"{spec.family} has no mask token: its noise is drawn from the whole vocabulary", "name")
        self.spec = spec
        self.schedule = alpha_schedule(self.config.schedule)
        self.shift_logits = spec.shift_logits if shift_logits is None else shift_logits

    def corrupt(
        self,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
        *,
        t: Tensor | None = None,
        masked: Tensor | None = None,
        part: Part | None = None,
    ) -> NoisyBatch:
        """Draws times and masks.

        Args:
            batch: as `objectives.batch` describes.
            generator: source of randomness, on any device; None: torch's own.
            t: times to use instead of drawing them, [B], or [B, T] for samples or blocks with times of their own.
            masked: [B, T] positions to mask instead of drawing them; where there is no label it has no effect. T
                counts the BOS tokens that are put in.
            part: which rows of a global batch these are. Draws are made for the whole global batch, so a row gets
                the same noise however the batch is spread over workers.
        """
        rows, width = batch["input_ids"].shape
        part = part or Part(0, rows)
        device = batch["input_ids"].device
        if t is None:
            u_B = noise.own(noise.spread(part.total, generator, self.config.stratified), part, rows).to(device)
        if masked is None:
            u_BT = noise.own(noise.uniform((part.total, width), generator), part, rows).to(device)
            batch = batch | {"u": u_BT}
        if self.shift_logits and (samples.needs_bos(batch) if part.bos is None else part.bos):
            spec = self.spec
            batch = samples.with_bos(batch, spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id)
        input_ids, maskable = batch["input_ids"], batch["labels"] != IGNORE_INDEX
        if t is None:
            number = self._times_of(batch)
            low, high = self.config.noise_range or (self.config.time_epsilon, 1)
            t = low + (high - low) * (u_B if number is None else noise.within(u_B, number))
        if masked is None:
            masked = batch["u"] < 1 - self.schedule.alpha(_by_position(t))
        masked = masked & maskable
        return NoisyBatch(
            input_ids=torch.where(masked, self.spec.mask_token_id, input_ids),
            targets=input_ids,
            maskable=maskable,
            masked=masked,
            t=t,
            attention_mask=batch.get("attention_mask"),
            segment_ids=batch.get("segment_ids"),
            position_ids=batch.get("position_ids"),
            width=width,
        )

    def loss(self, lm: DiffusionLM, noisy: NoisyBatch, denominator: Tensor | float | None = None) -> LossResult:
        """The normalised loss of a corrupted batch; vocabulary logits are computed where they are needed only.

        Args:
            lm: the model.
            noisy: from `corrupt`.
            denominator: what to divide by; None: this batch's own `denominator`. Workers and accumulation steps that
                share one global batch pass the global sum.
        """
        positions_N = noisy.masked.flatten().nonzero().squeeze(1)
        nll_N = self._nll(lm, noisy, positions_N)
        weighted_N = nll_N * self._weight(noisy)[noisy.masked]
        numerator = weighted_N.sum()
        if self.config.norm == "sequence":
            per_sample = samples.sums(noisy.maskable.long(), noisy.segment_ids).expand_as(noisy.masked)
            numerator = (weighted_N / per_sample[noisy.masked]).sum()
        denominator = self.denominator(noisy) if denominator is None else denominator
        return LossResult(
            loss=numerator / torch.as_tensor(denominator).clamp(min=1),
            nll_sum=weighted_N.detach().sum(),
            tokens=noisy.maskable.sum(),
        )

    def denominator(self, noisy: NoisyBatch) -> Tensor:
        """What this batch adds to the divisor of the loss: labelled or masked positions, or samples with labels."""
        if self.config.norm == "token":
            return noisy.maskable.sum().float()
        if self.config.norm == "masked":
            return noisy.masked.sum().float()
        return samples.count_any(noisy.maskable, noisy.segment_ids).float()

    def for_validation(self) -> "MaskedDiffusion":
        """The same noise over all times, weighed so that `nll_sum / tokens` bounds the negative log-likelihood."""
        settings = dataclasses.asdict(self.config)
        settings |= {"weight": "schedule", "stratified": True, "noise_range": None}
        del settings["name"]
        return type(self)(self.spec, shift_logits=self.shift_logits, **settings)

    @abstractmethod
    def _nll(self, lm: DiffusionLM, noisy: NoisyBatch, positions: Tensor) -> Tensor:
        """[N] cross-entropy of the clean tokens at the masked `positions`, indices into the flattened grid."""

    def _times_of(self, batch: dict[str, Tensor]) -> Tensor | None:
        """[B, T] number of the time that a position has, in its row; None: one for the row."""
        return batch.get("segment_ids")

    def _weight(self, noisy: NoisyBatch) -> Tensor:
        if self.config.weight == "schedule":
            weight = elbo_weight(self.schedule, _by_position(noisy.t))
        elif self.config.weight == "uniform":
            weight = torch.ones_like(noisy.masked, dtype=torch.float)
        else:
            clean = ~noisy.masked
            weight = context_adaptive(clean, self.config.cart_p, noisy.segment_ids, noisy.position_ids)
        return weight.expand_as(noisy.masked)

    def _sources(self, noisy: NoisyBatch, positions: Tensor) -> Tensor:
        """Where the logits of `positions` are read."""
        return samples.sources(positions, noisy.masked.shape, noisy.position_ids) if self.shift_logits else positions


def _by_position(t: Tensor) -> Tensor:
    return t.unsqueeze(1) if t.dim() == 1 else t
