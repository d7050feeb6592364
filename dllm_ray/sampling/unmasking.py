"""Which masked positions a step commits: how many (the schedule) and which (the most confident).

Shapes: R rows, T canvas positions.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dllm_ray.objectives.schedules import alpha_schedule, unmask_probability


@lru_cache(maxsize=4096)
def commit_schedule(masks: int, steps: int, schedule: str = "linear") -> tuple[int, ...]:
    """How many tokens each step commits so that `masks` masks are gone after at most `steps` steps.

    At step j the time falls from t = (steps - j) / steps to s = t - 1 / steps, and every mask still there is due with
    probability q = 1 - (1 - alpha(s)) / (1 - alpha(t)); the step commits round(q * masks left). Steps that would
    commit nothing are left out. The counts sum to `masks`.
    """
    t = torch.tensor([(steps - j) / steps for j in range(steps)])
    s = torch.tensor([(steps - j) / steps - 1 / steps for j in range(steps)])
    due = unmask_probability(alpha_schedule(schedule), t, s).double().tolist()
    counts = []
    for q in due:
        count = min(round(masks * q), masks)  # Python rounds halves to even, as the reference implementation does
        masks -= count
        if count:
            counts.append(count)
        if not masks:
            break
    return tuple(counts)


def quota_table(masks: list[int], steps: list[int], schedules: list[str]) -> np.ndarray:
    """The commit schedules of several rows as one table [R, longest], zero-padded on the right."""
    counts = [commit_schedule(*row) for row in zip(masks, steps, schedules, strict=True)]
    table = np.zeros((len(counts), max(map(len, counts), default=0)), dtype=np.int64)
    for row, values in enumerate(counts):
        table[row, : len(values)] = values
    return table


def most_confident(confidence_RT: Tensor, quota_R: Tensor) -> Tensor:
    """Marks in each row the `quota` positions with the highest confidence, of equals the leftmost.

    Equals are common: a trained model is certain of many tokens. Taken in a fixed order they leave a row independent
    of the rows beside it, which `topk` would not.

    Args:
        confidence_RT: [R, T], -inf where a position may not be committed.
        quota_R: [R] how many to take; rows with fewer candidates give all they have.

    Returns:
        [R, T] bool.
    """
    values, positions = confidence_RT.sort(dim=1, descending=True, stable=True)
    rank = torch.arange(confidence_RT.shape[1], device=confidence_RT.device)
    taken = (rank < quota_R.unsqueeze(1)) & (values > -torch.inf)
    return torch.zeros_like(confidence_RT, dtype=torch.bool).scatter_(1, positions, taken)
