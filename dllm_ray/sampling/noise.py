"""Random numbers that depend on nothing but their own coordinates.

A row's draws come from a hash of (row seed, step, position, stream), not from a generator's state: they are the same
whatever else is in the batch, on every device, and a row can be replayed alone.
"""

import torch
from torch import Tensor

TOKEN, ORDER = 1, 2
"""Streams: the draw of a token, and the draw that orders positions."""
EDIT, DELETE, INSERT, INSERTED = 3, 4, 5, 6
"""Of edits: whether a token gives way, whether to none, whether one comes behind it, and which."""

GAMMA, MIX_1, MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685
"""The increment and the multipliers of SplitMix64 (Steele et al., OOPSLA 2014), as int64."""


def mix(*words: Tensor | int) -> Tensor:
    """A 64-bit hash of whole numbers, element by element; at least one of them is an int64 tensor."""
    state = torch.zeros((), dtype=torch.long)
    for word in words:
        state = _scramble((state.to(word.device) if isinstance(word, Tensor) else state) + word)
    return state


def uniform(seed: Tensor, step: Tensor, position: Tensor, stream: int) -> Tensor:
    """Uniform float32 numbers in [0, 1).

    Args:
        seed: [N] int64, the row's seed.
        step: [N] int64, the row's own step count.
        position: [N] int64, the position on the row's canvas.
        stream: what the number is for, so that two uses never share a draw.
    """
    bits = mix(seed, step, position, stream)
    return _logical_shift(bits, 40).to(torch.float32) * 2.0**-24


def _scramble(state: Tensor) -> Tensor:
    state = state + GAMMA
    state = (state ^ _logical_shift(state, 30)) * MIX_1
    state = (state ^ _logical_shift(state, 27)) * MIX_2
    return state ^ _logical_shift(state, 31)


def _logical_shift(state: Tensor, by: int) -> Tensor:
    return (state >> by) & ((1 << (64 - by)) - 1)
