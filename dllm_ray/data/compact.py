"""Token rows as a few small arrays, to be sent between processes or kept on disk.

A label is either its token or ignored, so one byte says which.
"""

import numpy as np

from dllm_ray.data.tokenize import TokenRows
from dllm_ray.models.spec import IGNORE_INDEX


def to_arrays(rows: TokenRows) -> dict[str, np.ndarray]:
    """The rows as arrays: `ids` int32, `carries_loss` bool, `lengths`, `numbers`, `shards` int32."""
    return {
        "ids": rows.ids,
        "carries_loss": rows.labels != IGNORE_INDEX,
        "lengths": rows.lengths,
        "numbers": rows.numbers,
        "shards": rows.shards,
    }


def from_arrays(arrays: dict[str, np.ndarray]) -> TokenRows:
    """What `to_arrays` was given."""
    labels = np.where(arrays["carries_loss"], arrays["ids"], np.int32(IGNORE_INDEX))
    return TokenRows(arrays["ids"], labels, arrays["lengths"], arrays["numbers"], arrays["shards"])
