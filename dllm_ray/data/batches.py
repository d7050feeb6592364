"""Token rows -> padded global batches -> each worker's part. Pure array code.

A batch is formed and padded as one global batch before it is dealt to workers, so what a step trains on doesn't depend
on how many workers there are. Shapes: B rows, T the longest of them.
"""

from dataclasses import dataclass

import numpy as np

from dllm_ray.data.tokenize import TokenRows
from dllm_ray.models.spec import IGNORE_INDEX


@dataclass(frozen=True)
class PaddingRule:
    """How rows are filled up to the longest of their batch."""

    token_id: int
    """The filler."""
    supervised: bool
    """Filler is attended and carries loss (it is the end-of-text token), or it is neither seen nor trained."""


def pad(rows: TokenRows, rule: PaddingRule) -> dict[str, np.ndarray]:
    """One rectangular batch.

    Returns:
        `input_ids` and `labels` [B, T] int64; `attention_mask` [B, T] int64 unless padding is attended.
    """
    width = int(rows.lengths.max(initial=0))
    filled = np.arange(width) < rows.lengths[:, None]  # [B, T]
    input_ids = np.full(filled.shape, rule.token_id, dtype=np.int64)
    labels = np.full(filled.shape, rule.token_id if rule.supervised else IGNORE_INDEX, dtype=np.int64)
    input_ids[filled] = rows.ids
    labels[filled] = rows.labels
    batch = {"input_ids": input_ids, "labels": labels}
    if not rule.supervised:
        batch["attention_mask"] = filled.astype(np.int64)
    return batch


def deal(batch: dict[str, np.ndarray], workers: int) -> list[dict[str, np.ndarray]]:
    """Equal consecutive parts, one for each worker.

    Rows without labels fill the last parts of a batch that doesn't divide evenly: they cost a forward and add nothing
    to the loss or to what it is divided by.
    """
    rows = batch["input_ids"].shape[0]
    each = -(-rows // workers)
    missing = each * workers - rows
    if missing:
        fill = {"input_ids": batch["input_ids"][:1], "labels": np.full_like(batch["labels"][:1], IGNORE_INDEX)}
        if "attention_mask" in batch:
            fill["attention_mask"] = batch["attention_mask"][:1]
        batch = {name: np.concatenate([array, np.repeat(fill[name], missing, axis=0)]) for name, array in batch.items()}
    return [{name: array[rank * each : (rank + 1) * each] for name, array in batch.items()} for rank in range(workers)]
