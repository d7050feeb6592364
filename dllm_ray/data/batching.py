"""Which rows of the stream go into which global batch, decided from their lengths alone.

The stream is cut into *chunks*: as many rows from its front as fill a number of batches. A chunk takes whole rows and
leaves nothing over, so a stream can be taken up again at any chunk, and within it at any batch. Knows lengths only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dllm_ray.errors import ConfigError

_CHUNK_TOKENS = 1 << 18
_CHUNK_BATCHES = (8, 64)  # fewest and most batches of a chunk; many short rows to choose from pack and sort well


@dataclass(frozen=True)
class Layout:
    """One global batch."""

    rows: np.ndarray
    """[k] int64, numbers of its samples among the chunk's rows."""
    packs: np.ndarray | None
    """[k] int64, ascending: the row of the batch in which each sample lies; None: each in a row of its own."""


@dataclass(frozen=True)
class Chunk:
    """Batches that are formed together."""

    rows: int
    """How many rows of the stream it takes."""
    batches: list[Layout]
    """In the order of training. All rows of the chunk are in one of them, each once."""


@dataclass(frozen=True)
class Batching:
    """The rule by which rows become batches."""

    batch_size: int
    """Rows in a global batch; packed: rows that hold several samples each. Has no meaning for `bucketed`."""
    max_length: int
    """Most tokens in a row."""
    rule: Literal["fixed", "packed", "bucketed"] = "fixed"
    """fixed: consecutive rows. packed: samples share rows of `max_length` tokens. bucketed: rows of like length, as
    many as `max_tokens` allows."""
    max_tokens: int | None = None
    """Most tokens in a bucketed batch, padding included."""
    block_size: int = 1
    """Samples (packed) and the width of a batch (bucketed) are rounded up to a multiple of this."""
    seed: int = 0
    """Decides the order of a chunk's batches."""

    def __post_init__(self):
        if self.rule == "bucketed" and self.max_tokens < self.width:
            raise ConfigError(
                f"must hold at least one row of {self.width} tokens (train.max_length), got {self.max_tokens}",
                "max_tokens_per_batch",
            )

    @property
    def width(self) -> int:
        """Positions in the longest row: `max_length`, rounded up to whole blocks."""
        return int(_round_up(self.max_length, self.block_size))

    @property
    def chunk_batches(self) -> int:
        """Batches of a chunk, but for a stream's last."""
        if self.rule == "fixed":
            return 1
        fewest, most = _CHUNK_BATCHES
        return min(max(_CHUNK_TOKENS // self.batch_tokens, fewest), most)

    @property
    def batch_tokens(self) -> int:
        """Most tokens of a batch, padding included."""
        return self.max_tokens if self.rule == "bucketed" else self.batch_size * self.width

    def chunk(self, lengths: np.ndarray, number: int, ended: bool) -> Chunk | None:
        """The next chunk.

        Args:
            lengths: [rows] tokens of the rows from the chunk's start on, as many as are at hand.
            number: how many chunks came before; decides, with the seed, the order of batches.
            ended: no rows follow these. The last batch of a stream may be smaller than the others.

        Returns:
            None where more rows are needed. How many more than needed are at hand makes no difference.
        """
        if not len(lengths):
            return Chunk(0, []) if ended else None
        if self.rule == "fixed":
            rows = min(self.batch_size, len(lengths))
            return Chunk(rows, [Layout(np.arange(rows), None)]) if rows == self.batch_size or ended else None
        lengths = _round_up(np.asarray(lengths, dtype=np.int64), self.block_size)
        random = np.random.default_rng([self.seed, number, 0x6368756E6B])
        return self._packed(lengths, random, ended) if self.rule == "packed" else self._bucketed(lengths, random, ended)

    def _packed(self, lengths: np.ndarray, random: np.random.Generator, ended: bool) -> Chunk | None:
        capacity = self.chunk_batches * self.batch_tokens
        most_packs = self.chunk_batches * self.batch_size
        most = int(np.searchsorted(np.cumsum(lengths), capacity, side="right"))  # no more rows than this can fit
        if most == len(lengths) and not ended:
            return None

        def fits(rows: int) -> bool:
            return best_fit(lengths[:rows], self.width).max() < most_packs

        rows = most if fits(most) else _last_true(fits, 1, most)
        packs = best_fit(lengths[:rows], self.width)
        if rows < len(lengths):
            packs = _spread(packs, most_packs)
        count = int(packs.max()) + 1
        packs = random.permutation(count)[packs]
        samples = np.lexsort((np.arange(rows), packs))
        edges = np.searchsorted(packs[samples], np.arange(0, count, self.batch_size)[1:])
        return Chunk(
            rows,
            [Layout(own, packs[own] - batch * self.batch_size) for batch, own in enumerate(np.split(samples, edges))],
        )

    def _bucketed(self, lengths: np.ndarray, random: np.random.Generator, ended: bool) -> Chunk | None:
        capacity = self.chunk_batches * self.batch_tokens
        # no more rows than these can fit
        most = min(int(np.searchsorted(np.cumsum(lengths), capacity, side="right")) + 1, len(lengths))

        def fits(rows: int) -> bool:
            return len(self._edges(lengths[:rows])) <= self.chunk_batches

        if not fits(most):
            rows = _last_true(fits, 1, most)
        elif ended:
            rows = most
        else:
            return None
        order = np.argsort(-lengths[:rows], kind="stable")
        buckets = np.split(order, self._edges(lengths[:rows])[1:])
        return Chunk(rows, [Layout(np.sort(buckets[index]), None) for index in random.permutation(len(buckets))])

    def _edges(self, lengths: np.ndarray) -> list[int]:
        """Where batches begin when rows are laid out from the longest to the shortest. No other cut makes fewer."""
        longest_first = -np.sort(-lengths)
        edges = [0]
        while (end := edges[-1] + self.max_tokens // int(longest_first[edges[-1]])) < len(lengths):
            edges.append(end)
        return edges


def best_fit(lengths: np.ndarray, width: int) -> np.ndarray:
    """Packs samples by best-fit decreasing: from the longest on, each goes where the least room is left after it.

    Args:
        lengths: [samples], from 1 to `width`.
        width: room in a pack.

    Returns:
        [samples] int64 number of each sample's pack; packs are numbered in the order in which they were opened.
    """
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # room left -> packs
    rooms = 0  # bit r is set where a pack with room r exists
    packs = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    order = np.argsort(-lengths, kind="stable")
    for sample, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit that is set
            pack = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, pack = width, opened
            opened += 1
        packs[sample] = pack
        with_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return packs


def _spread(packs: np.ndarray, count: int) -> np.ndarray:
    """The same packs and as many new ones as are missing from `count`, each with one sample of a pack of several.
    Best fit may need two packs more for one sample more, so that no number of samples makes exactly `count`."""
    _, firsts = np.unique(packs, return_index=True)
    missing = count - len(firsts)
    movable = np.setdiff1d(np.arange(len(packs)), firsts)
    spread = packs.copy()
    spread[movable[:missing]] = np.arange(len(firsts), count)
    return spread


def _round_up(lengths, multiple: int):
    return -(-lengths // multiple) * multiple


def _last_true(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number from `low` up for which `holds` is true; it is true for `low` and false for `high`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
