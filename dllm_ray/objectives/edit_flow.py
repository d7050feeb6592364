"""Edit Flow: a model learns the rates at which a sequence becomes another by insertions, deletions and substitutions
(Havasi et al., arXiv 2506.09018).

`corrupt` holds all randomness, `loss` is deterministic. Shapes: B rows, A columns of alignments, T positions of the
sequences on their way, E edits of the whole batch.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_ray.errors import ConfigError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.spec import IGNORE_INDEX, DiffusionSpec
from dllm_ray.objectives import edits, noise
from dllm_ray.objectives.alignment import BLANK
from dllm_ray.objectives.batch import LossResult, Part
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.objectives.edit_pairs import EditPairs
from dllm_ray.objectives.schedules import edit_rate, kappa_schedule


@dataclass(frozen=True)
class NoisyEdits:
    """Alignments with some of their edits made."""

    zt: Tensor  # [B, A]
    z1: Tensor  # [B, A]
    t: Tensor  # [B], times in [0, 1)
    counted: Tensor  # [B] bool, rows that carry labels

    def __len__(self) -> int:
        return len(self.zt)

    def to(self, device: torch.device | str) -> NoisyEdits:
        return NoisyEdits(*(getattr(self, field.name).to(device, non_blocking=True) for field in _fields(self)))

    def rows(self, start: int, stop: int) -> NoisyEdits:
        """The rows from `start` up to `stop`."""
        return NoisyEdits(*(getattr(self, field.name)[start:stop] for field in _fields(self)))

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of the sequences to end with, prompts included."""
        return (self.z1 != BLANK).sum(dim=1)


class EditFlow:
    """The Edit Flow objective.

    Args:
        spec: the model's facts.
        vocabulary: how many tokens noise is drawn from; needed for `x0` `uniform`.
        longest: most tokens of a sequence that the model takes; None: any number.
        seed: of what rows begin with.
        settings: fields of `ObjectiveConfig`.

    Raises:
        ConfigError: settings that don't exist or don't go together, or that the model can't have.
    """

    name = "edit_flow"
    shift_logits = False
    """Reading to the left is the heads' affair: rows begin with a token that stays."""

    def __init__(
        self,
        spec: DiffusionSpec,
        *,
        vocabulary: int | None = None,
        longest: int | None = None,
        seed: int = 0,
        **settings,
    ):
        self.config = config = ObjectiveConfig(name=self.name, **settings)
        if "masks" in config.x0 and spec.mask_token_id is None:
            raise ConfigError(f"{spec.family} has no mask token to begin with", "x0")
        if vocabulary is None and "uniform" in config.x0:
            raise ConfigError("uniform needs to know the vocabulary", "x0")
        self.spec = spec
        self.schedule = kappa_schedule(config.kappa)
        self._kwargs = {"vocabulary": vocabulary, "longest": longest, "seed": seed}
        special = (spec.mask_token_id, spec.pad_token_id, spec.bos_token_id, *spec.stop_token_ids)
        self.pairs = EditPairs(
            x0=tuple(config.x0),
            length=config.x0_length,
            noise=config.x0_noise,
            vocabulary=vocabulary or 0,
            reserved=tuple(sorted({token for token in special if token is not None})),
            mask_token_id=spec.mask_token_id,
            bos_token_id=spec.eos_token_id if spec.bos_token_id is None else spec.bos_token_id,
            longest=longest,
            seed=seed,
        )
        """Makes the alignments of a batch, wherever it is formed."""

    def corrupt(
        self,
        batch: dict[str, Tensor],
        generator: torch.Generator | None = None,
        *,
        t: Tensor | None = None,
        made: Tensor | None = None,
        part: Part | None = None,
    ) -> NoisyEdits:
        """Draws times, and which edits have been made by then.

        Args:
            batch: as `objectives.batch` describes, with the alignments `z0`, `z1` [B, A] that `pairs` makes; where they
                are missing they are made here, of these rows alone.
            generator: source of randomness, on any device; None: torch's own.
            t: [B] times to use instead of drawing them.
            made: [B, A] columns whose edits are made, instead of drawing them.
            part: which rows of a global batch these are. Draws are made for the whole global batch, so a row gets
                the same noise however the batch is spread over workers.
        """
        rows = len(batch["input_ids"])
        part = part or Part(0, rows)
        if "z0" not in batch:
            device = "cpu" if generator is None else generator.device
            step = int(torch.randint(2**31, (), generator=generator, device=device))
            arrays = {name: tensor.cpu().numpy() for name, tensor in batch.items()}
            batch = {name: torch.from_numpy(array) for name, array in self.pairs(arrays, step, part.start).items()}
        z0, z1 = batch["z0"], batch["z1"]
        if t is None:
            u_B = noise.own(noise.spread(part.total, generator, self.config.stratified), part, rows).to(z0.device)
            t = (1 - self.config.time_epsilon) * u_B
        if made is None:
            u_BA = noise.own(noise.uniform((part.total, z0.shape[1]), generator), part, rows).to(z0.device)
            made = u_BA < self.schedule.kappa(t).unsqueeze(1)
        counted = (batch["labels"] != IGNORE_INDEX).any(dim=1)
        return NoisyEdits(edits.between(z0, z1, made), z1, t, counted)

    def loss(self, lm: DiffusionLM, noisy: NoisyEdits, denominator: Tensor | float | None = None) -> LossResult:
        """The normalised loss of a corrupted batch: rates of all edits, less the log-rates of those that remain.

        Args:
            lm: a model with edit heads.
            noisy: from `corrupt`.
            denominator: what to divide by; None: this batch's own `denominator`. Workers and accumulation steps that
                share one global batch pass the global sum.
        """
        x_BT, valid_BT = edits.sequences(noisy.zt, self.spec.pad_token_id)
        left = edits.remaining(noisy.zt, noisy.z1)
        place_E = left.row * x_BT.shape[1] + left.position
        substituted_E, inserted_E = left.kind == edits.SUBSTITUTE, left.kind == edits.INSERT
        rates_BT3, substitutes, inserts = lm.edits(
            x_BT,
            valid_BT.long(),
            noisy.t,
            place_E[substituted_E],
            left.token[substituted_E],
            place_E[inserted_E],
            left.token[inserted_E],
            at_once=self.config.logits_at_once,
            most=noisy.zt.numel(),
        )
        log_E = substitutes.new_zeros(len(place_E))
        log_E = log_E.masked_scatter(substituted_E, substitutes).masked_scatter(inserted_E, inserts)
        nll_B = edits.negative_log_likelihood(rates_BT3, valid_BT, left, log_E)
        weight_B = edit_rate(self.schedule, noisy.t)
        if self.config.max_weight is not None:
            weight_B = weight_B.clamp(max=self.config.max_weight)
        weighted_B = weight_B * nll_B * noisy.counted
        numerator = (weighted_B / noisy.lengths).sum() if self.config.norm == "sequence" else weighted_B.sum()
        denominator = self.denominator(noisy) if denominator is None else denominator
        return LossResult(
            loss=numerator / torch.as_tensor(denominator).clamp(min=1),
            nll_sum=weighted_B.detach().sum(),
            tokens=(noisy.lengths * noisy.counted).sum(),
        )

    def denominator(self, noisy: NoisyEdits) -> Tensor:
        """What this batch adds to the divisor of the loss: rows, or their tokens."""
        if self.config.norm == "token":
            return (noisy.lengths * noisy.counted).sum().float()
        return noisy.counted.sum().float()

    def for_validation(self) -> EditFlow:
        """The same noise; what is compared is `nll_sum / tokens`."""
        settings = dataclasses.asdict(self.config) | {"stratified": True}
        del settings["name"]
        return EditFlow(self.spec, **self._kwargs, **settings)


def _fields(noisy: NoisyEdits):
    return dataclasses.fields(noisy)
