"""Samples in rows, packed or one to a row: sums over them, runs of positions in them, a BOS in front of them.

Pure functions. Shapes: B rows, T positions, N chosen positions.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dllm_ray.models.spec import IGNORE_INDEX


def sums(values: Tensor, segment_ids: Tensor | None) -> Tensor:
    """The sum over each position's sample.

    Args:
        values: [B, T].
        segment_ids: [B, T], or None: a row is a sample.

    Returns:
        [B, T], or [B, 1] where a row is a sample.
    """
    if segment_ids is None:
        return values.sum(dim=1, keepdim=True)
    return _by_sample(values, segment_ids).gather(1, segment_ids)


def count_any(flags: Tensor, segment_ids: Tensor | None) -> Tensor:
    """How many samples have a true position; `flags` [B, T] bool. Padding is no sample."""
    if segment_ids is None:
        return flags.any(dim=1).sum()
    return (_by_sample(flags.long(), segment_ids)[:, 1:] > 0).sum()


def _by_sample(values: Tensor, segment_ids: Tensor) -> Tensor:
    rows, width = segment_ids.shape
    return values.new_zeros((rows, width + 1)).scatter_add_(1, segment_ids, values)  # [B, samples], 0 is padding


def runs(*labels: Tensor) -> Tensor:
    """[B, T] number of the run that a position is in, from 0: runs of neighbours that are alike in all `labels`
    [B, T]."""
    begins = torch.zeros(labels[0].shape, dtype=torch.long, device=labels[0].device)
    for label in labels:
        begins[:, 1:] |= (label[:, 1:] != label[:, :-1]).long()
    return begins.cumsum(dim=1)


def sources(positions: Tensor, shape: tuple[int, int], position_ids: Tensor | None) -> Tensor:
    """Where shifted logits are read: one position to the left, but at a sample's first position in place.

    Args:
        positions: [N] indices into the flattened grid.
        shape: (B, T) of the grid.
        position_ids: [B, T] with packing, else None.
    """
    place_N = positions % shape[1] if position_ids is None else position_ids.flatten()[positions]
    return positions - (place_N > 0).long()


def needs_bos(batch: Mapping[str, Tensor]) -> bool:
    """Whether shifted logits need a BOS in front of each sample: some sample begins with a labelled token."""
    labelled = batch["labels"] != IGNORE_INDEX
    if "segment_ids" in batch:
        return bool((labelled & _first(batch)).any())
    return bool(labelled[:, 0].any())


def with_bos(batch: Mapping[str, Tensor], bos_token_id: int) -> dict[str, Tensor]:
    """A BOS without label in front of each sample; other tensors of the batch get 1 there.

    Rows become as much wider as the fullest has samples.
    """
    packed = "segment_ids" in batch
    segment_ids = batch["segment_ids"] if packed else torch.ones_like(batch["input_ids"])
    rows, width = segment_ids.shape
    before_BT = segment_ids.cummax(dim=1).values  # BOS tokens up to here; padding comes last
    column_BT = torch.arange(width, device=segment_ids.device) + before_BT
    wider = width + (int(before_BT.max()) if packed else 1)
    if packed:
        row_N, first_N = _first(batch).nonzero(as_tuple=True)
        bos_N = column_BT[row_N, first_N] - 1
    out = {}
    for name, tensor in batch.items():
        filler = {"input_ids": bos_token_id, "labels": IGNORE_INDEX}.get(name, 0 if packed else 1)
        made = tensor.new_full((rows, wider), filler)
        made.scatter_(1, column_BT, tensor + (segment_ids > 0) if name == "position_ids" else tensor)
        if name == "segment_ids":
            made[row_N, bos_N] = tensor[row_N, first_N]
        out[name] = made
    return out


def _first(batch: Mapping[str, Tensor]) -> Tensor:
    return (batch["position_ids"] == 0) & (batch["segment_ids"] > 0)
