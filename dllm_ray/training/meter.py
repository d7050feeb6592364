"""Measures training: tokens per second, how much of the time was spent waiting for data, and memory."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dllm_ray.training.loop import Batch


class Meter:
    """Passes batches on and measures.

    Args:
        batches: what to pass on.
    """

    def __init__(self, batches: Iterator[Batch]):
        self._batches = batches
        self._tokens = 0
        self._waited = 0.0
        self._began: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        while True:
            asked = time.perf_counter()
            batch = next(self._batches, None)
            if self._began is None:
                self._began = time.perf_counter()  # the first batch comes from a pipeline that is still starting
            else:
                self._waited += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps validation and checkpoints out of the measurement."""
        at = time.perf_counter()
        yield
        self._began += time.perf_counter() - at

    def read(self) -> dict[str, float]:
        """Figures since the last reading."""
        now = time.perf_counter()
        seconds = max(now - self._began, 1e-9)
        figures = {"train/tokens_per_s": self._tokens / seconds, "train/data_wait": self._waited / seconds}
        self._tokens, self._waited, self._began = 0, 0.0, now
        return figures


def peak_memory_gb(device: torch.device) -> float:
    """Most memory held at once so far, in 10^9 bytes: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
