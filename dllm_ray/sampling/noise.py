"""Random numbers that depend on nothing but their own coordinates.

A row's draws come from a hash of (row seed, step, position, stream), not from a generator's state: they are the same
whatever else is in the batch, on every device, and a row can be replayed alone.
"""

import numba
import numpy as np
import torch
from torch import Tensor

TOKEN, ORDER = 1, 2
"""Streams: the draw of a token, and the draw that orders positions."""
EDIT, DELETE, INSERT, INSERTED = 3, 4, 5, 6
"""Of edits: whether a token gives way, whether to none, whether one comes behind it, and which."""

_GAMMA = -7046029254386353131  # the increments and multipliers of SplitMix64 (Steele et al., OOPSLA 2014), as int64
_MIX_1 = -4658895280553007687
_MIX_2 = -7723592293110705685


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
    state = state + _GAMMA
    state = (state ^ _logical_shift(state, 30)) * _MIX_1
    state = (state ^ _logical_shift(state, 27)) * _MIX_2
    return state ^ _logical_shift(state, 31)


def _logical_shift(state: Tensor, by: int) -> Tensor:
    return (state >> by) & ((1 << (64 - by)) - 1)


@numba.njit(cache=True, nogil=True)
def uniform_of_one(seed: int, step: int, position: int, stream: int) -> float:
    """`uniform` of a single coordinate, for compiled loops: the same number."""
    state = numba.int64(0)
    for word in (seed, step, position, stream):
        state = numba.int64(state + word) + _GAMMA
        state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _MIX_1
        state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _MIX_2
        state = state ^ ((state >> 31) & ((1 << 33) - 1))
    return ((state >> 40) & ((1 << 24) - 1)) * 2.0**-24


@numba.njit(cache=True, nogil=True)
def uniform_of_each(seed: np.ndarray, step: np.ndarray, position: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """`uniform` of arrays [N] on the host, without the time that a dozen small tensor operations take."""
    drawn = np.empty(len(seed), np.float32)
    for number in range(len(seed)):
        drawn[number] = uniform_of_one(seed[number], step[number], position[number], stream[number])
    return drawn
