"""The order in which training sees its rows, decided beforehand from a seed.

How many usable rows each shard holds is known from a survey. So the place of every row in every pass is known too: the
stream of rows can begin anywhere, which is what resuming a run needs. Knows shard sizes and seeds, nothing else.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Window:
    """A part of one pass: the rows of a few shards, shuffled together."""

    epoch: int
    """Which pass over the data, from 0."""
    number: int
    """Which window of the pass, from 0."""
    shards: tuple[int, ...]
    """The shards it is made of, in the order in which they are read."""
    skip: int
    """Rows to leave out at its beginning (a resumed run has seen them)."""


@dataclass(frozen=True)
class Plan:
    """The order of a data set's rows over any number of passes."""

    shard_rows: tuple[int, ...]
    """Rows to train on in each shard."""
    window_rows: int
    """A window takes whole shards until it holds at least this many rows."""
    seed: int
    """Decides the order of shards in a pass and of rows in a window."""

    @property
    def rows(self) -> int:
        """Rows in one pass."""
        return sum(self.shard_rows)

    def windows(self, start: int, stop: int) -> Iterator[Window]:
        """The windows that hold rows `start` to `stop` of the endless stream of passes."""
        epoch = start // self.rows
        position = epoch * self.rows
        while max(start, position) < stop:
            for window, size in self._epoch(epoch):
                if position >= stop:
                    break
                if position + size > start:
                    skip = max(start - position, 0)
                    yield Window(window.epoch, window.number, window.shards, skip)
                position += size
            epoch += 1

    def size(self, window: Window) -> int:
        """Rows of the window, `skip` already left out."""
        return sum(self.shard_rows[shard] for shard in window.shards) - window.skip

    def order(self, window: Window) -> np.ndarray:
        """The order of the window's rows: numbers into its shards' rows laid end to end, `skip` already left out."""
        size = self.size(window) + window.skip
        random = np.random.default_rng([self.seed, window.epoch, 1 + window.number])
        return random.permutation(size)[window.skip :]

    def _epoch(self, epoch: int) -> Iterator[tuple[Window, int]]:
        shards = np.random.default_rng([self.seed, epoch, 0]).permutation(len(self.shard_rows))
        group: list[int] = []
        size = number = 0
        for place, shard in enumerate(shards.tolist()):
            group.append(shard)
            size += self.shard_rows[shard]
            if size >= self.window_rows or (place == len(shards) - 1 and size):
                yield Window(epoch, number, tuple(group), 0), size
                group, size, number = [], 0, number + 1


def priorities(rows: int, shard: int, seed: int) -> np.ndarray:
    """A random number in [0, 1) for each row of a shard. The rows with the smallest ones over all shards are a uniform
    sample of the whole, found without knowing its size beforehand."""
    return np.random.default_rng([seed, shard, 0x73616D706C65]).random(rows)
