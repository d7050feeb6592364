"""Documents and scoring of the task `lengths`; lm-eval calls these by name from lengths.yaml."""

from typing import Any

import datasets

from dllm_ray.data.builtin import lengths


def dataset(rows: int, **_metadata: Any) -> dict[str, datasets.Dataset]:
    """The first rows of the test split."""
    return {"test": datasets.Dataset.from_list(list(lengths.rows("test", 0, rows)))}


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Right or wrong, under `exact_match` and under the document's own kind of task."""
    right = float(lengths.is_correct(doc["prompt"], results[0]))
    return {"exact_match": right, doc["task"]: right}
