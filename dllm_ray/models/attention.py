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


_KEPT = "sdpa_with_kept_keys"


def keep_keys(model) -> None:
    """Lets an encoder of transformers see keys and values that a cache keeps, though it takes no `past_key_values`.

    Its attention stays torch's; where a forward is given `key_cache`, the cache's `update` has a say in between, as in
    decoders.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == _KEPT:
        return

    def attend(module, query, key, value, attention_mask, key_cache=None, **kwargs):
        if key_cache is not None:
            key, value = key_cache.update(key, value, module.layer_idx)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(_KEPT, attend)
    AttentionMaskInterface.register(_KEPT, sdpa_mask)
    model.config._attn_implementation = _KEPT


def can_keep_keys(model) -> bool:
    """Whether `keep_keys` works: the encoder attends through transformers' own attention, in numbered layers."""
    layers = {getattr(module, "layer_idx", None) for module in model.modules()} - {None}
    mechanism = model.config._attn_implementation in ("sdpa", _KEPT) and type(model)._supports_attention_backend
    return mechanism and layers == set(range(model.config.num_hidden_layers))


def near(position_ids: Tensor, keys: int, window: int, mask: Tensor | None = None) -> Tensor:
    """Bidirectional attention to keys at most `window` positions away (the local layers of ModernBERT).

    Args:
        position_ids: [B, Q] of the queries; keys stand at 0, 1, 2, ...
        keys: how many keys there are.
        window: how far a query sees to each side.
        mask: [B, 1, 1, keys], true for keys that may be seen; None: all.

    Returns:
        [B, 1, Q, keys] bool.
    """
    key_K = torch.arange(keys, device=position_ids.device)
    seen = (position_ids.unsqueeze(2) - key_K).abs() <= window
    return seen.unsqueeze(1) if mask is None else seen.unsqueeze(1) & mask
