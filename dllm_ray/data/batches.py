"""Token rows -> rectangular global batches, padded or packed -> each worker's part. Pure array code.

A batch is formed as one global batch before it is dealt to workers, so what a step trains on doesn't depend on how many
workers there are. Shapes: B rows, T positions.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import ConfigError
from dllm_ray.models.spec import IGNORE_INDEX

_IN_PACKS = {"eos": "ignore", "ignore": "ignore", "block": "block", "eos_block": "block"}


@dataclass(frozen=True)
class PaddingRule:
    """How rows are filled up.

    Filler is either end-of-text that is attended and carries loss, so that the model learns to stop, or padding that is
    neither seen nor trained. A row of `max_length` tokens counts as cut: it does not end there, so it never gets the
    former.
    """

    kind: Literal["eos", "ignore", "block", "eos_block"]
    """eos: end-of-text up to the longest row of the batch (LLaDA, arXiv 2502.09992). ignore: padding up to there.
    block: end-of-text up to the end of a row's own last block, padding beyond. eos_block: end-of-text up to the end of
    the longest row's last block."""
    eos_token_id: int
    """End of text."""
    pad_token_id: int
    """Padding."""
    max_length: int
    """Most tokens in a row."""
    block_size: int | None = None
    """Tokens in a block; for `block` and `eos_block` only.

    Raises:
        ConfigError: these without it.
    """

    def __post_init__(self):
        if self.kind in ("block", "eos_block") and not self.block_size:
            raise ConfigError(
                f"{self.kind} fills up blocks: it needs objective.name bd3lm, or a model with blocks", "padding"
            )

    @property
    def multiple(self) -> int:
        """What the width of a batch is a multiple of."""
        return self.block_size if self.kind in ("block", "eos_block") else 1

    @property
    def masks(self) -> bool:
        """Whether batches come with an `attention_mask`; without, every position is attended."""
        return self.kind in ("ignore", "block") or bool(self.max_length % self.multiple)

    def in_packs(self) -> "PaddingRule":
        """The rule where samples share rows: as `block` if it fills blocks, else as `ignore`. There are no short rows
        to fill up, so a sample keeps its one stop token, or those that complete its last block."""
        return dataclasses.replace(self, kind=_IN_PACKS[self.kind])

    def ends(self, lengths: np.ndarray) -> np.ndarray:
        """[B] where the end-of-text filler of each row ends: its length if it has none."""
        if self.kind == "ignore":
            return lengths
        whole = self.whole_blocks(lengths)
        return np.where(lengths < self.max_length, whole if self.kind == "block" else whole.max(initial=0), lengths)

    def width(self, lengths: np.ndarray) -> int:
        """T of a batch of rows of these lengths."""
        return int(self.whole_blocks(lengths).max(initial=0))

    def whole_blocks(self, lengths: np.ndarray) -> np.ndarray:
        """Lengths rounded up to `multiple`."""
        return -(-lengths // self.multiple) * self.multiple


def pad(rows: TokenRows, rule: PaddingRule) -> dict[str, np.ndarray]:
    """One rectangular batch, a sample a row.

    Returns:
        `input_ids` and `labels` [B, T] int64; `attention_mask` [B, T] int64 unless padding is attended.
    """
    ends = rule.ends(rows.lengths)
    place = np.arange(rule.width(rows.lengths))
    own = place < rows.lengths[:, None]  # [B, T]
    seen = place < ends[:, None]  # [B, T]
    input_ids = np.where(seen, rule.eos_token_id, rule.pad_token_id).astype(np.int64)
    labels = np.where(seen, rule.eos_token_id, IGNORE_INDEX).astype(np.int64)
    input_ids[own] = rows.ids
    labels[own] = rows.labels
    batch = {"input_ids": input_ids, "labels": labels}
    if rule.masks:
        batch["attention_mask"] = seen.astype(np.int64)
    return batch


def pack(rows: TokenRows, packs: np.ndarray, rule: PaddingRule) -> dict[str, np.ndarray]:
    """One rectangular batch whose rows hold several samples each.

    Args:
        rows: the samples.
        packs: [samples] ascending from 0, the row of the batch that each lies in. The samples of a row must fit into
            `max_length`, rounded up to whole blocks; `batching` sees to that.
        rule: how samples are filled up (`PaddingRule.in_packs`).

    Returns:
        [B, T] int64 each: `input_ids`; `labels`; `segment_ids`, 1, 2, ... the samples of a row, 0 where there is none;
        `position_ids`, which start at 0 in each sample.
    """
    rule = rule.in_packs()
    shape = (int(packs.max(initial=-1)) + 1, rule.width(np.array([rule.max_length])))
    room = rule.whole_blocks(rows.lengths)
    ends = rule.ends(rows.lengths)
    first = np.searchsorted(packs, packs)  # [samples] the first sample of the same row
    starts = np.cumsum(room) - room
    starts += packs * shape[1] - starts[first]  # in the batch laid end to end
    # for every position that is seen, sample after sample: its place in its sample, and in the batch
    place = np.arange(ends.sum()) - np.repeat(np.cumsum(ends) - ends, ends)
    where = np.repeat(starts, ends) + place
    own = where[place < np.repeat(rows.lengths, ends)]
    flat = {
        "input_ids": np.full(shape[0] * shape[1], rule.pad_token_id, dtype=np.int64),
        "labels": np.full(shape[0] * shape[1], IGNORE_INDEX, dtype=np.int64),
        "segment_ids": np.zeros(shape[0] * shape[1], dtype=np.int64),
        "position_ids": np.zeros(shape[0] * shape[1], dtype=np.int64),
    }
    flat["input_ids"][where] = flat["labels"][where] = rule.eos_token_id
    flat["input_ids"][own] = rows.ids
    flat["labels"][own] = rows.labels
    flat["segment_ids"][where] = np.repeat(np.arange(len(rows)) - first + 1, ends)
    flat["position_ids"][where] = place
    return {name: array.reshape(shape) for name, array in flat.items()}


def deal(batch: dict[str, np.ndarray], workers: int) -> list[dict[str, np.ndarray]]:
    """Equal consecutive parts, one for each worker.

    Rows without labels fill the last parts of a batch that doesn't divide evenly: they cost a forward and add nothing
    to the loss or to what it is divided by.
    """
    rows = batch["input_ids"].shape[0]
    each = -(-rows // workers)
    missing = each * workers - rows
    if missing:
        filler = {**batch, "labels": np.full_like(batch["labels"], IGNORE_INDEX)}
        batch = {
            name: np.concatenate([array, np.repeat(filler[name][:1], missing, axis=0)]) for name, array in batch.items()
        }
    return [{name: array[rank * each : (rank + 1) * each] for name, array in batch.items()} for rank in range(workers)]
