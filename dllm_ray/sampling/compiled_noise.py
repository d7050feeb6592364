"""`noise.uniform` for compiled loops on the host: the same numbers."""

import numba
import numpy as np

from dllm_ray.sampling.noise import GAMMA, MIX_1, MIX_2


@numba.njit(cache=True, nogil=True)
def uniform_of_one(seed: int, step: int, position: int, stream: int) -> float:
    """The number of a single coordinate."""
    state = numba.int64(0)
    for word in (seed, step, position, stream):
        state = numba.int64(state + word) + GAMMA
        state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * MIX_1
        state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * MIX_2
        state = state ^ ((state >> 31) & ((1 << 33) - 1))
    return ((state >> 40) & ((1 << 24) - 1)) * 2.0**-24


@numba.njit(cache=True, nogil=True)
def uniform_of_each(seed: np.ndarray, step: np.ndarray, position: np.ndarray, stream: np.ndarray) -> np.ndarray:
    """[N] float32 numbers of as many coordinates."""
    drawn = np.empty(len(seed), np.float32)
    for number in range(len(seed)):
        drawn[number] = uniform_of_one(seed[number], step[number], position[number], stream[number])
    return drawn
