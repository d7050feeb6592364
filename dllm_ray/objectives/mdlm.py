"""MDLM: masked diffusion. A time is drawn for each row, tokens are masked with probability 1 - alpha(t), and the
model is asked for the masked ones (Sahoo et al., arXiv 2406.07524; LLaDA, Nie et al., arXiv 2502.09992).

`corrupt` holds all randomness, `loss` is deterministic. Shapes: B rows, T positions, N masked positions, V vocabulary.
"""

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.spec import IGNORE_INDEX, DiffusionSpec
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.objectives.schedules import alpha_schedule, elbo_weight


class Part(NamedTuple):
    """Says that a batch is rows `start`, `start + 1`, ... of a global batch of `total` rows; rows beyond are filler."""

    start: int
    total: int


@dataclass(frozen=True)
class NoisyBatch:
    """A corrupted batch with everything random in it."""

    input_ids: Tensor  # [B, T], masked positions hold the mask token
    targets: Tensor  # [B, T], the clean tokens
    maskable: Tensor  # [B, T] bool, positions that carry a label
    masked: Tensor  # [B, T] bool, positions the model is asked for
    t: Tensor  # [B], times in (0, 1)
    attention_mask: Tensor | None  # [B, T], or None: every position is attended

    def to(self, device: torch.device | str) -> "NoisyBatch":
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def rows(self, start: int, stop: int) -> "NoisyBatch":
        """The rows from `start` up to `stop`."""
        return self._map(lambda tensor: tensor[start:stop])

    def _map(self, change) -> "NoisyBatch":
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return NoisyBatch(**{name: None if value is None else change(value) for name, value in values.items()})


@dataclass(frozen=True)
class LossResult:
    """What a batch cost."""

    loss: Tensor  # scalar, to call backward on
    nll_sum: Tensor  # scalar, weighted cross-entropy summed over masked positions; detached
    tokens: Tensor  # scalar, positions that carry a label: nll_sum / tokens estimates the negative ELBO per token


class MDLM:
    """The masked-diffusion objective.

    Args:
        spec: the model's facts.
        schedule: `linear` or `cosine`.
        weight: `schedule` for -alpha'(t)/(1-alpha(t)), which makes the loss an ELBO; `uniform` for 1.
        norm: what the sum is divided by: `token` (labelled positions), `sequence` (each row's own labelled positions,
            then rows), `batch` (rows).
        shift_logits: read logits one position to the left; None: as the spec says. A BOS without label is put in
            front unless every row already begins without one, so that the first token has a left neighbour.
        time_epsilon: times are drawn from [time_epsilon, 1).
        stratified: one time from each of B equal slices of (0, 1), in random order, instead of B independent times.

    Raises:
        ConfigError: an unknown setting, or a model without a mask token.
    """

    def __init__(
        self,
        spec: DiffusionSpec,
        schedule: str = "linear",
        weight: str = "schedule",
        norm: str = "token",
        shift_logits: bool | None = None,
        time_epsilon: float = 1e-3,
        stratified: bool = True,
    ):
        settings = ObjectiveConfig(
            schedule=schedule, weight=weight, norm=norm, time_epsilon=time_epsilon, stratified=stratified
        )
        if spec.mask_token_id is None:
            raise ConfigError(f"{spec.family} has no mask token: its noise is drawn from the whole vocabulary", "name")
        self.spec = spec
        self.config = settings
        self.schedule = alpha_schedule(schedule)
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
            batch: `input_ids` [B, T]; `labels` [B, T], -100 where there is no loss; `attention_mask` [B, T], or
                absent where padding is attended.
            generator: source of randomness, on any device; None: torch's own.
            t: [B] times to use instead of drawing them.
            masked: [B, T] positions to mask instead of drawing them; where there is no label it has no effect.
            part: which rows of a global batch these are. Draws are made for the whole global batch, so a row gets
                the same noise however the batch is spread over workers.
        """
        input_ids, labels, attention_mask = batch["input_ids"], batch["labels"], batch.get("attention_mask")
        if self.shift_logits and not bool((labels[:, 0] == IGNORE_INDEX).all()):
            input_ids, labels, attention_mask = self._with_bos(input_ids, labels, attention_mask)
        rows, width = input_ids.shape
        part = part or Part(0, rows)
        device = input_ids.device
        if t is None:
            t = _own(self._draw_times(part.total, generator), part, rows).to(device)
        maskable = labels != IGNORE_INDEX
        if masked is None:
            u = _own(_uniform((part.total, width), generator), part, rows).to(device)
            masked = u < (1 - self.schedule.alpha(t)).unsqueeze(1)
        masked = masked & maskable
        return NoisyBatch(
            input_ids=torch.where(masked, self.spec.mask_token_id, input_ids),
            targets=input_ids,
            maskable=maskable,
            masked=masked,
            t=t,
            attention_mask=attention_mask,
        )

    def loss(self, lm: DiffusionLM, noisy: NoisyBatch, denominator: Tensor | float | None = None) -> LossResult:
        """The normalised loss of a corrupted batch; vocabulary logits are computed at its masked positions only.

        Args:
            lm: the model.
            noisy: from `corrupt`.
            denominator: what to divide by; None: this batch's own `denominator`. Workers and accumulation steps that
                share one global batch pass the global sum.
        """
        width = noisy.input_ids.shape[1]
        positions_N = noisy.masked.flatten().nonzero().squeeze(1)
        logits_NV = lm.logits(noisy.input_ids, noisy.attention_mask, positions=positions_N, shift=self.shift_logits)
        targets_N = noisy.targets.flatten()[positions_N]
        nll_N = F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
        row_N = positions_N // width
        weighted_N = nll_N * self._weight(noisy.t)[row_N]
        if self.config.norm == "sequence":
            per_row = noisy.maskable.sum(dim=1).clamp(min=1)
            numerator = (weighted_N / per_row[row_N]).sum()
        else:
            numerator = weighted_N.sum()
        denominator = self.denominator(noisy) if denominator is None else denominator
        return LossResult(
            loss=numerator / torch.as_tensor(denominator).clamp(min=1),
            nll_sum=weighted_N.detach().sum(),
            tokens=noisy.maskable.sum(),
        )

    def denominator(self, noisy: NoisyBatch) -> Tensor:
        """What this batch adds to the divisor of the loss: labelled positions, or rows that have any."""
        if self.config.norm == "token":
            return noisy.maskable.sum().float()
        return noisy.maskable.any(dim=1).sum().float()

    def for_validation(self) -> "MDLM":
        """The same noise, weighed so that `nll_sum / tokens` is an upper bound of the negative log-likelihood."""
        settings = dataclasses.asdict(self.config) | {"weight": "schedule", "stratified": True}
        del settings["name"]
        return MDLM(self.spec, **settings, shift_logits=self.shift_logits)

    def _weight(self, t: Tensor) -> Tensor:
        return elbo_weight(self.schedule, t) if self.config.weight == "schedule" else torch.ones_like(t)

    def _draw_times(self, total: int, generator: torch.Generator | None) -> Tensor:
        u = _uniform((total,), generator)
        if self.config.stratified:
            strata = torch.randperm(total, generator=generator, device=u.device)
            u = (strata + u) / total
        epsilon = self.config.time_epsilon
        return epsilon + (1 - epsilon) * u

    def _with_bos(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None):
        bos = self.spec.eos_token_id if self.spec.bos_token_id is None else self.spec.bos_token_id
        column = input_ids.new_full((input_ids.shape[0], 1), bos)
        input_ids = torch.cat([column, input_ids], dim=1)
        labels = torch.cat([torch.full_like(column, IGNORE_INDEX), labels], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask.new_ones(column.shape), attention_mask], dim=1)
        return input_ids, labels, attention_mask


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    return torch.rand(shape, generator=generator, device=None if generator is None else generator.device)


def _own(draws: Tensor, part: Part, rows: int) -> Tensor:
    """The draws of one part out of those of a global batch; filler rows get 1."""
    own = draws[part.start : part.start + rows]
    return torch.cat([own, own.new_ones((rows - len(own), *own.shape[1:]))])
