"""Edit Flow: a sequence becomes another by insertions, deletions and substitutions that happen at rates (Havasi et al.,
arXiv 2506.09018). Pure functions of what a model says of the rates.

Shapes: B rows, A columns of alignments, T positions of noisy sequences, E edits of the whole batch, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dllm_ray.objectives.alignment import BLANK

SUBSTITUTE, DELETE, INSERT = 0, 1, 2
"""Places of the kinds of edits among a position's rates."""

_SMALLEST = 1e-12  # of what a logarithm is taken


@dataclass(frozen=True)
class Edits:
    """What remains to be done, [E] each, in order of rows and columns."""

    row: Tensor
    position: Tensor
    """Of the token that is replaced or deleted, or after which another is inserted."""
    kind: Tensor
    """`SUBSTITUTE`, `DELETE` or `INSERT`."""
    token: Tensor
    """The new one; `BLANK` where one is deleted."""


def between(z0_BA: Tensor, z1_BA: Tensor, made_BA: Tensor) -> Tensor:
    """[B, A] the alignment with some of its edits made."""
    return torch.where(made_BA, z1_BA, z0_BA)


def sequences(zt_BA: Tensor, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Aligned rows without their blanks.

    Returns:
        [B, T] token ids, padded on the right, and [B, T] bool, which of them are tokens.
    """
    is_token = zt_BA != BLANK
    length = is_token.sum(dim=1)
    width = max(int(length.max()), 1)
    place = torch.where(is_token, is_token.cumsum(dim=1) - 1, width)  # blanks go into a column that is cut off
    x = zt_BA.new_full((len(zt_BA), width + 1), pad_token_id).scatter_(1, place, zt_BA)[:, :width]
    valid = torch.arange(width, device=zt_BA.device) < length[:, None]
    return torch.where(valid, x, pad_token_id), valid


def remaining(zt_BA: Tensor, z1_BA: Tensor) -> Edits:
    """The edits between a point on the way and the end of it."""
    is_token = zt_BA != BLANK
    before = is_token.cumsum(dim=1) - is_token.long()  # tokens to the left
    row, column = (zt_BA != z1_BA).nonzero(as_tuple=True)
    token, inserts = z1_BA[row, column], ~is_token[row, column]
    kind = torch.where(inserts, INSERT, torch.where(token == BLANK, DELETE, SUBSTITUTE))
    return Edits(row, (before[row, column] - inserts.long()).clamp(min=0), kind, token)


def negative_log_likelihood(rates_BT3: Tensor, valid_BT: Tensor, edits: Edits, log_probability_E: Tensor) -> Tensor:
    """[B] Rates of everything that may happen, less the logarithm of those of what is to happen.

    Args:
        rates_BT3: of substitution, deletion and insertion at each position, not negative.
        valid_BT: which positions are tokens.
        edits: what is to happen.
        log_probability_E: of the edits' tokens among all of the vocabulary; 0 for deletions.
    """
    leaving_B = (rates_BT3.float().sum(dim=2) * valid_BT).sum(dim=1)
    rate_E = rates_BT3.float()[edits.row, edits.position, edits.kind]
    arriving_E = rate_E.clamp(min=_SMALLEST).log() + log_probability_E
    return leaving_B.index_add(0, edits.row, -arriving_E)
