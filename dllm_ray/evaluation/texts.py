"""Prefixes and targets as one array of tokens, and rows of a forward cut out of it.

Token ids only. Shapes: P pairs, L tokens of all pairs, S spans, N tokens of the spans, B rows, W columns.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.spec import DiffusionSpec


class Texts(NamedTuple):
    """Pairs of a prefix and a target, one behind the other."""

    tokens: np.ndarray
    """[L] int64."""
    begin: np.ndarray
    """[P] where a pair begins in `tokens`."""
    prefix: np.ndarray
    """[P] tokens of its prefix."""
    length: np.ndarray
    """[P] tokens of prefix and target."""


def require_likelihoods(spec: DiffusionSpec) -> None:
    """Makes sure that a model has likelihoods of texts.

    Raises:
        ModelError: it edits, so that the ways to a text can't be summed up by masking it.
    """
    if spec.edit_heads is not None:
        raise ModelError(
            f"this {spec.family} edits texts of any length, so the likelihood of one can't be estimated by masking it: "
            "choose tasks that generate"
        )


def texts_of(lm: DiffusionLM, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Texts:
    """Lays pairs out.

    Raises:
        ModelError: the model has no mask token, or edits.
        ConfigError: a pair has no target, is longer than the model's context, or has no prefix where logits are
            shifted.
    """
    require_likelihoods(lm.spec)
    if lm.spec.mask_token_id is None:
        raise ModelError(
            f"{lm.spec.family} has no mask token (its noise is drawn from the whole vocabulary), so the likelihood of "
            "a text can't be estimated by masking it: choose tasks that generate"
        )
    for number, (prefix, target) in enumerate(pairs):
        if not len(target):
            raise ConfigError(f"pair {number} has an empty target; expected at least one token", "pairs")
        if lm.spec.shift_logits and not len(prefix):
            raise ConfigError(
                f"pair {number} has an empty prefix, and this model predicts a token from the one to its left: begin "
                "the prefix with the model's BOS, or its EOS where it has none",
                "pairs",
            )
        if lm.max_length is not None and len(prefix) + len(target) > lm.max_length:
            raise ConfigError(
                f"pair {number} has {len(prefix)} + {len(target)} tokens, and the model's context is {lm.max_length}: "
                "cut the beginning of the prefix",
                "pairs",
            )
    length = np.array([len(prefix) + len(target) for prefix, target in pairs], dtype=np.int64)
    parts = [np.asarray(part, dtype=np.int64) for pair in pairs for part in pair]
    return Texts(
        tokens=np.concatenate(parts) if parts else np.zeros(0, np.int64),
        begin=length.cumsum() - length,
        prefix=np.array([len(prefix) for prefix, _ in pairs], dtype=np.int64),
        length=length,
    )


class Rows(NamedTuple):
    """Spans of texts, laid into rows one behind the other."""

    span: np.ndarray
    """[N] the span that a token is of."""
    place: np.ndarray
    """[N] its place in its text."""
    row: np.ndarray
    """[N]."""
    column: np.ndarray
    """[N]."""
    shape: tuple[int, int]
    """Rows and columns."""

    def grid(self, values: np.ndarray, filler: int, device: torch.device) -> Tensor:
        """[B, W] of values [N]."""
        grid = np.full(self.shape, filler, dtype=values.dtype)
        grid[self.row, self.column] = values
        return torch.from_numpy(grid).to(device)

    @property
    def ragged(self) -> bool:
        """Whether some rows end before others."""
        return len(self.place) < self.shape[0] * self.shape[1]


def lay(first: np.ndarray, size: np.ndarray, row: np.ndarray) -> Rows:
    """Lays spans into rows.

    Args:
        first: [S] place of a span's first token in its text.
        size: [S] its tokens.
        row: [S] the row it goes to, in ascending order.
    """
    before = size.cumsum() - size
    row_begin = before[np.searchsorted(row, np.arange(row[-1] + 1))]
    span = np.repeat(np.arange(len(size)), size)
    inside = np.arange(len(span)) - before[span]
    rows = row[span]
    column = np.arange(len(span)) - row_begin[rows]
    return Rows(span, first[span] + inside, rows, column, (int(row[-1]) + 1, int(column.max()) + 1))
