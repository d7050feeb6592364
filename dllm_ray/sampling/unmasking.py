"""Which masked positions a step commits: how many (the schedule, a threshold, a factor) and which (the order).

Everything here is arithmetic on a few numbers for each candidate, and runs on the host in numpy.

Shapes: R rows, N candidates of all rows, in ascending order of (row, position).
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from dllm_ray.objectives.schedules import alpha_schedule, unmask_probability

DREAM_EPSILON = 1e-3
"""Where Dream's time ends."""


def due(steps: int, schedule: str = "linear") -> list[float]:
    """The share of the masks still there that each of `steps` steps commits; the last is 1.

    `linear` and `cosine`: at step j the time falls from t = (steps - j) / steps to s = t - 1 / steps, and a mask is due
    with probability 1 - (1 - alpha(s)) / (1 - alpha(t)). `dream`: the time falls evenly from 1 to 0.001, and a mask is
    due with probability 1 - s / t, in the last step with certainty (Dream, arXiv 2508.15487).
    """
    if schedule == "dream":
        times = torch.linspace(1, DREAM_EPSILON, steps + 1)
        return [*(1 - times[1:-1] / times[:-2]).double().tolist(), 1.0]
    t = torch.tensor([(steps - j) / steps for j in range(steps)])
    s = torch.tensor([(steps - j) / steps - 1 / steps for j in range(steps)])
    return unmask_probability(alpha_schedule(schedule), t, s).double().tolist()


@lru_cache(maxsize=4096)
def commit_schedule(masks: int, steps: int, schedule: str = "linear") -> tuple[int, ...]:
    """How many tokens each step commits so that `masks` masks are gone after at most `steps` steps.

    A step commits round(share due * masks left); steps that would commit nothing are left out. Under `dream` the
    product is truncated instead, and steps that commit nothing stay: they are part of the published histories. The
    counts sum to `masks`.
    """
    if schedule == "dream":
        return _split(masks, due(steps, schedule), lambda left, share: int(left * share))
    # Python rounds halves to even, as the reference implementation does
    counts = _split(masks, due(steps, schedule), lambda left, share: min(round(left * share), left))
    return tuple(count for count in counts if count)


@lru_cache(maxsize=4096)
def dream_block_schedule(masks: int, steps: int) -> tuple[int, ...]:
    """The counts of Fast-dLLM for Dream in a block with a cache: the first position alone, then Dream's time steps."""
    if masks == 0:
        return ()
    return (1, *_split(masks - 1, due(steps, "dream")[1:] or [1.0], lambda left, share: int(left * share)))


def stochastic_schedule(masks: int, steps: int, schedule: str, *seed: int) -> tuple[int, ...]:
    """Like `commit_schedule`, but each mask is due by itself: the counts are binomial draws, the same for the
    same seed."""
    source = np.random.default_rng([word % 2**64 for word in seed])
    counts = _split(
        masks, due(steps, schedule), lambda left, share: int(source.binomial(left, min(max(share, 0.0), 1.0)))
    )
    return tuple(count for count in counts if count)


def _split(masks: int, shares: list[float], take: Callable[[int, float], int]) -> tuple[int, ...]:
    """What each step takes of the masks that are left, until none is; a share of 1 takes all."""
    counts = []
    for share in shares:
        if not masks:
            break
        counts.append(masks if share == 1 else take(masks, share))
        masks -= counts[-1]
    return tuple(counts)


@lru_cache(maxsize=4096)
def even_schedule(block_size: int, steps: int) -> tuple[int, ...]:
    """LLaDA2's quotas: a whole block split evenly, the first steps one more, however many masks the block has."""
    base, more = divmod(block_size, steps)
    return tuple(base + (step < more) for step in range(steps))


def rank_in_row(row_N: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """[N] place of each candidate among those of its row, the highest `order_N` first; of equals the leftmost.

    Equals are common: a trained model is certain of many tokens, and of a canvas of masks alone it says the same
    everywhere. Taken in a fixed order they leave a row independent of the rows beside it. Their last bits are rounding
    of the model's, which depends on the shape of the batch, and don't count.
    """
    sorted_N = np.lexsort((-_rounded(order_N), row_N))
    first_of_row = np.searchsorted(row_N, row_N)
    rank_N = np.empty_like(row_N)
    rank_N[sorted_N] = np.arange(len(row_N))
    return rank_N - first_of_row


def _rounded(values: np.ndarray) -> np.ndarray:
    """Float32 numbers rounded to 16 significant bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32).astype(np.int64)
    return ((bits + 0x80) & ~0xFF).astype(np.int32).view(np.float32)


def by_threshold(confidence_N: np.ndarray, rank_N: np.ndarray, threshold: float) -> np.ndarray:
    """Every candidate at least as confident as the threshold, and each row's best (Fast-dLLM, arXiv 2505.22618)."""
    return (confidence_N >= np.float32(threshold)) | (rank_N == 0)


def by_factor(row_N: np.ndarray, confidence_N: np.ndarray, rank_N: np.ndarray, factor: float) -> np.ndarray:
    """In each row the k best, where k counts the ranks r = 1, 2, ... whose confidence is at least 1 - factor / (r + 1);
    the best is always among them (Fast-dLLM, arXiv 2505.22618)."""
    accepted = (confidence_N >= 1 - factor / (rank_N + 2)) | (rank_N == 0)
    count_R = np.bincount(row_N[accepted], minlength=row_N.max(initial=-1) + 1)
    return rank_N < count_R[row_N]


def by_certainty(
    row_N: np.ndarray, confidence_N: np.ndarray, rank_N: np.ndarray, quota_N: np.ndarray, threshold: float
) -> np.ndarray:
    """All candidates above the threshold where a row has at least its quota of them, else its quota (LLaDA2,
    arXiv 2512.15745).

    Args:
        quota_N: [N] the quota of the candidate's row.
    """
    certain = confidence_N > np.float32(threshold)
    count_R = np.bincount(row_N[certain], minlength=row_N.max(initial=-1) + 1)
    return np.where(count_R[row_N] >= quota_N, certain, rank_N < quota_N)
