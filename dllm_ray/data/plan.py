"""The order in which one source gives its rows, decided beforehand from a seed.

A pass visits the shards of a source in shuffled order. It is cut into windows, by the shards' sizes in bytes; the rows
of a window are shuffled together. So a pass needs no knowledge of how many rows a shard holds, passes follow each other
without end, and the order can be taken up at any place. Knows shard sizes and seeds, nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

_FIRST_WINDOWS = (0.25, 0.5)
"""Sizes of the very first windows as shares of a whole one: training begins sooner."""


@dataclass(frozen=True)
class Window:
    """A part of one pass: the rows of a few shards, shuffled together."""

    epoch: int
    """Which pass over the source, from 0."""
    number: int
    """Which window of the pass, from 0."""
    shards: tuple[int, ...]
    """The shards it is made of, in the order in which they are read."""
    begin: float
    """Share of the pass's bytes before it."""
    end: float
    """The same after it; 1 for the last window."""


@dataclass(frozen=True)
class Plan:
    """The order of a source's rows over any number of passes."""

    shard_bytes: tuple[int, ...]
    """Size of each shard."""
    window_bytes: int
    """A window takes whole shards until it holds at least this many bytes."""
    seed: tuple[int, ...]
    """Decides the order of shards in a pass and of rows in a window."""
    first: int = 0
    """So many shards from the source's beginning on are at hand already: they come first in the first pass, in windows
    of their own."""

    def windows(self, epoch: int = 0, number: int = 0) -> Iterator[Window]:
        """The windows from one of a pass on, pass after pass, without end."""
        while True:
            yield from _pass(self, epoch)[number:]
            epoch, number = epoch + 1, 0

    def order(self, window: Window, rows: int) -> np.ndarray:
        """The order of the window's rows: numbers into its shards' rows laid end to end.

        Args:
            window: one of this plan's.
            rows: how many rows its shards hold together.
        """
        return np.random.default_rng([*self.seed, window.epoch, 1 + window.number]).permutation(rows)


@lru_cache(maxsize=64)
def _pass(plan: Plan, epoch: int) -> tuple[Window, ...]:
    order = np.random.default_rng([*plan.seed, epoch, 0]).permutation(len(plan.shard_bytes)).tolist()
    if epoch == 0:
        order = [*range(plan.first), *(shard for shard in order if shard >= plan.first)]
    total = sum(plan.shard_bytes)
    windows: list[Window] = []
    group: list[int] = []
    size = before = 0
    for place, shard in enumerate(order):
        group.append(shard)
        size += plan.shard_bytes[shard]
        first = _FIRST_WINDOWS[len(windows)] if epoch == 0 and len(windows) < len(_FIRST_WINDOWS) else 1.0
        at_hand = epoch == 0 and place == plan.first - 1
        if size >= first * plan.window_bytes or at_hand or place == len(order) - 1:
            begin, before = before, before + size
            windows.append(Window(epoch, len(windows), tuple(group), begin / total, before / total))
            group, size = [], 0
    return tuple(windows)


def priorities(rows: int, shard: int, seed: tuple[int, ...]) -> np.ndarray:
    """A random number in [0, 1) for each row of a shard. The rows with the smallest ones over all shards are a uniform
    sample of the whole, found without knowing its size beforehand."""
    return np.random.default_rng([*seed, shard, 0x73616D706C65]).random(rows)
