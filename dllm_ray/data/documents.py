"""Documents for pretraining: a shard's documents are laid end to end and cut into rows. Knows texts, lengths and seeds.

A row is as long as `max_length` allows and may hold several documents or a part of one. Every token carries loss.
"""

from collections.abc import Iterator

import numpy as np

PIECE_CHARACTERS = 1 << 16
"""A longer text is tokenized in pieces of at most so many characters: a tokenizer needs some hundred bytes for each."""


def pieces(text: str) -> Iterator[str]:
    """The text in pieces that can be tokenized one by one: cut after a line, or else before a space."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        limit = start + PIECE_CHARACTERS
        end = text.rfind("\n", start, limit) + 1 or text.rfind(" ", start + 1, limit)
        end = end if end > start else limit
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def row_lengths(
    total: int, max_length: int, random_length: float, drop_tail: bool, random: np.random.Generator
) -> np.ndarray:
    """How many tokens each row gets when `total` tokens are cut into rows.

    Args:
        total: tokens of all documents.
        max_length: tokens of a row.
        random_length: share of rows that are cut at a length drawn evenly from 1 to `max_length`, so that a model sees
            short texts too (LLaDA, arXiv 2502.09992, appendix B: 1 %). What is cut off begins the next row.
        drop_tail: leave a last row out that is shorter than was meant for it.
        random: source of randomness.

    Returns:
        [rows] int32.
    """
    lengths = np.zeros(0, dtype=np.int32)
    while lengths.sum() < total:
        more = (total - int(lengths.sum())) // max_length + 1
        drawn = np.where(
            random.random(more) < random_length, random.integers(1, max_length + 1, more), np.full(more, max_length)
        )
        lengths = np.concatenate([lengths, drawn.astype(np.int32)])
    ends = np.cumsum(lengths)
    rows = int(np.searchsorted(ends, total, side="right"))  # rows that are filled
    left = total - (int(ends[rows - 1]) if rows else 0)
    tail = [left] if left and not drop_tail else []
    return np.concatenate([lengths[:rows], np.array(tail, dtype=np.int32)])
