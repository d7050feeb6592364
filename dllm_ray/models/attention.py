"""What a position may see: masks as boolean tensors, true where a query sees a key. Pure functions.

Shapes: B rows, T positions.
"""

import torch
from torch import Tensor


def block_causal(position_ids: Tensor, block_size: int, attention_mask: Tensor | None = None) -> Tensor:
    """Bidirectional inside a block, causal between blocks; blocks are counted from position 0 (BD3LM, LLaDA2, SDAR).

    Args:
        position_ids: [B or 1, T].
        block_size: positions in a block.
        attention_mask: [B, T], 1 for positions that may be seen; None: all.

    Returns:
        [B or 1, 1, T, T] bool. Every query sees itself, so that padding rows have something to attend to.
    """
    block_BT = position_ids // block_size
    seen = block_BT.unsqueeze(2) >= block_BT.unsqueeze(1)
    if attention_mask is not None:
        seen = seen & attention_mask.bool().unsqueeze(1)
    itself = torch.eye(position_ids.shape[1], dtype=torch.bool, device=position_ids.device)
    return (seen | itself).unsqueeze(1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A boolean mask as numbers to add to attention scores: 0 where true, the lowest number where false."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
