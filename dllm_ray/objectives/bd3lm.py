"""BD3LM: block diffusion. The blocks of a sample are denoised one after the other, each given the clean ones before it
(Arriola et al., arXiv 2503.09573).

All blocks are trained in one forward over two copies of the row, [noisy | clean]: a noisy block sees itself and the
clean blocks before it, a clean block sees itself and those before it. Both copies are cut down to what the loss depends
on: noisy blocks that are asked for something, and clean blocks that one of these sees.
Shapes: B rows, T positions, N masked positions, W positions of a cut copy.
"""

import torch
from torch import Tensor

from dllm_ray.models.attention import Pattern
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.objectives import samples
from dllm_ray.objectives.batch import NoisyBatch
from dllm_ray.objectives.masked import MaskedDiffusion


class BD3LM(MaskedDiffusion):
    """The block-diffusion objective; arguments as of `MaskedDiffusion`.

    Blocks are counted from the first position of each sample, a BOS that was put in included. With shifted logits the
    token at a block's first position is read from the noisy block before it.
    """

    name = "bd3lm"

    def _nll(self, lm: DiffusionLM, noisy: NoisyBatch, positions: Tensor) -> Tensor:
        sample, place, block = self._grid(noisy.input_ids, noisy.attention_mask, noisy.segment_ids, noisy.position_ids)
        source_N = self._sources(noisy, positions)

        asked = torch.zeros_like(noisy.masked).flatten().index_fill_(0, source_N, True).view_as(noisy.masked)
        run = samples.runs(sample, block)
        noisy_BT = torch.zeros_like(run).scatter_add_(1, run, asked.long()).gather(1, run) > 0
        last = torch.full((len(run), run.shape[1] + 1), -1, device=run.device)  # [B, samples]
        last.scatter_reduce_(1, sample, torch.where(noisy_BT, block, -1), "amax")
        clean_BT = (block < last.gather(1, sample)) & (sample > 0)

        noisy_BW, filler_noisy = _columns(noisy_BT, least=1)
        clean_BW, filler_clean = _columns(clean_BT)
        column_BW = torch.cat([noisy_BW, clean_BW], dim=1)
        filler_BW = torch.cat([filler_noisy, filler_clean], dim=1)
        place_BW = place.gather(1, column_BW)
        row_N = source_N // run.shape[1]
        rank_N = noisy_BT.cumsum(dim=1).flatten()[source_N] - 1
        return lm.nll(
            torch.cat([noisy.input_ids.gather(1, noisy_BW), noisy.targets.gather(1, clean_BW)], dim=1),
            Pattern(
                sample=sample.gather(1, column_BW).masked_fill(filler_BW, 0),
                position=place_BW,
                block=block.gather(1, column_BW),
                noisy=(torch.arange(column_BW.shape[1], device=run.device) < noisy_BW.shape[1]).expand_as(column_BW),
            ),
            place_BW,
            positions=row_N * column_BW.shape[1] + rank_N,
            targets=noisy.targets.flatten()[positions],
            shift=False,
            at_once=self.config.logits_at_once,
            most=len(noisy.masked) * noisy.width,
        )

    def _times_of(self, batch: dict[str, Tensor]) -> Tensor | None:
        if not self.config.block_times:
            return super()._times_of(batch)
        fields = (batch.get(name) for name in ("attention_mask", "segment_ids", "position_ids"))
        sample, _, block = self._grid(batch["input_ids"], *fields)
        return samples.runs(sample, block)

    def _grid(self, input_ids: Tensor, mask: Tensor | None, segment_ids: Tensor | None, position_ids: Tensor | None):
        """Of each position, [B, T]: its sample (0: never seen), its place in it, its block."""
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        if segment_ids is None:
            segment_ids = torch.ones_like(input_ids) if mask is None else mask.long()
        return segment_ids, position_ids, position_ids // self.config.block_size


def _columns(kept: Tensor, least: int = 0) -> tuple[Tensor, Tensor]:
    """The kept columns of each row moved to the left, as wide as the fullest row.

    Args:
        kept: [B, T] bool.
        least: smallest width; every worker runs the model, even if it has nothing to ask.

    Returns:
        [B, W] columns in order, and [B, W] bool, true where a row has no more.
    """
    width = max(int(kept.sum(dim=1).max()), least)
    column_BW = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    return column_BW, ~kept.gather(1, column_BW)
