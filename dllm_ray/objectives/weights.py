"""Weights of masked tokens by the clean tokens around them. Pure functions. Shapes: B rows, T positions."""

import torch
from torch import Tensor

from dllm_ray.objectives import samples


def context_adaptive(clean: Tensor, p: float, segment_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """Dream's context-adaptive weights (CART, arXiv 2508.15487): half the sum, over the clean positions of the sample,
    of p (1-p)^(d-1), where d is how far away they are.

    Args:
        clean: [B, T] bool, positions that are not masked. In a row of its own a sample counts its padding too.
        p: how fast the weight falls with distance, between 0 and 1.
        segment_ids, position_ids: [B, T] with packing, else None.

    Returns:
        [B, T]; of use at masked positions.
    """
    clean_BT = clean.float()
    column_T = torch.arange(clean.shape[1], device=clean.device)
    gap_TT = column_T - column_T.unsqueeze(1) - 1  # tokens between a row's position and a column's, to its right
    decay_TT = torch.where(gap_TT >= 0, (1 - p) ** gap_TT.clamp(min=0), 0.0)
    left_BT, right_BT = clean_BT @ decay_TT, clean_BT @ decay_TT.T
    if segment_ids is not None:  # what lies beyond the sample's ends counts for nothing
        first_BT = column_T - position_ids
        last_BT = first_BT + samples.sums(torch.ones_like(segment_ids), segment_ids) - 1
        first_BT, last_BT = first_BT.clamp(min=0), last_BT.clamp(max=clean.shape[1] - 1)
        left_BT = left_BT - (1 - p) ** (column_T - first_BT) * left_BT.gather(1, first_BT)
        right_BT = right_BT - (1 - p) ** (last_BT - column_T).clamp(min=0) * right_BT.gather(1, last_BT)
    return 0.5 * p * (left_BT + right_BT)
