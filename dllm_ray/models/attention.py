"""What a position may see: masks as boolean tensors, true where a query sees a key. Pure functions.

Shapes: B rows, T positions.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """Who sees whom, told by what each position is: as wide as a row, where a mask is as large as its square.

    A position sees the others of its sample: all of them; or, where they have blocks, those of its own block and the
    ones before. Noisy positions are a second copy of some blocks: they see their own noisy block and the clean blocks
    before it, and clean positions don't see them (BD3LM, arXiv 2503.09573). Padding is seen by nobody but itself.
    """

    sample: Tensor  # [B or 1, T] samples of a row counted from 1; 0: padding
    position: Tensor  # [B or 1, T] place in the sample
    block: Tensor | None = None  # [B or 1, T] number of the block; None: no blocks
    noisy: Tensor | None = None  # [B or 1, T] bool; None: all are clean

    def at(self, index) -> "Pattern":
        """The same, with each tensor indexed."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Pattern(**{name: None if value is None else value[index] for name, value in values.items()})


def _sees(query: Pattern, key: Pattern, window: int | None) -> Tensor:
    # flex attention compiles this; it takes no operation in place
    seen = (query.sample == key.sample) & (key.sample > 0)
    if query.block is not None and query.noisy is None:
        seen = seen & (key.block <= query.block)
    elif query.block is not None:
        same_copy = query.noisy & (key.block == query.block)
        seen = seen & torch.where(key.noisy, same_copy, key.block + query.noisy.long() <= query.block)
    if window is not None:
        seen = seen & ((query.position - key.position).abs() <= window)
    return seen


def dense(pattern: Pattern, window: int | None = None) -> Tensor:
    """[B or 1, 1, T, T] bool, true where a query sees a key. Every query sees itself, so that padding has something to
    attend to.

    Args:
        pattern: who sees whom.
        window: how far a query sees to each side; None: as far as the pattern says.
    """
    seen = _sees(pattern.at((slice(None), slice(None), None)), pattern.at((slice(None), None)), window)
    itself = torch.eye(seen.shape[-1], dtype=torch.bool, device=seen.device)
    return (seen | itself).unsqueeze(1)


def flex(pattern: Pattern, window: int | None = None):
    """`dense` as a `BlockMask` of flex attention; on CUDA the square is never made, not even for a moment."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, width = pattern.sample.shape

    def sees(row, _head, query, key):
        return _sees(pattern.at((row, query)), pattern.at((row, key)), window) | (query == key)

    device = pattern.sample.device
    make = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(sees, rows, None, width, width, device=device)


def block_causal(position_ids: Tensor, block_size: int, attention_mask: Tensor | None = None) -> Tensor:
    """Bidirectional inside a block, causal between blocks; blocks are counted from position 0 (BD3LM, LLaDA2, SDAR).

    Args:
        position_ids: [B or 1, T].
        block_size: positions in a block.
        attention_mask: [B, T], 1 for positions that may be seen; None: all.

    Returns:
        [B or 1, 1, T, T] bool, as of `dense`.
    """
    return dense(replace(visible(position_ids, attention_mask), block=position_ids // block_size))


def visible(position_ids: Tensor, attention_mask: Tensor | None) -> Pattern:
    """One sample in each row; arguments as of `block_causal`."""
    seen = torch.ones_like(position_ids) if attention_mask is None else attention_mask.bool().long()
    return Pattern(seen, position_ids)


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


def near(queries: Tensor, keys: Tensor, window: int) -> Tensor:
    """Bidirectional attention to keys at most `window` positions away (the local layers of ModernBERT).

    Args:
        queries: [B or 1, Q] positions.
        keys: [B or 1, K] positions.
        window: how far a query sees to each side.

    Returns:
        [B or 1, 1, Q, K] bool.
    """
    return ((queries.unsqueeze(2) - keys.unsqueeze(1)).abs() <= window).unsqueeze(1)
