"""Rows of local files, as the data set of an lm-eval task. Knows files and rows, no task."""

import gzip
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from dllm_ray.data import sources
from dllm_ray.errors import DataError


def dataset(data_files: Mapping[str, str], **_metadata: Any) -> dict[str, datasets.Dataset]:
    """What lm-eval calls for a task's data (`custom_dataset`).

    Args:
        data_files: split -> file, glob or URL: .jsonl (also .jsonl.gz), .json, .csv, .parquet; .txt is one document,
            with the column `text`.

    Raises:
        DataError: a file is missing or broken; the line is named.
    """
    return {split: datasets.Dataset.from_list([row for _, row in rows(file)]) for split, file in data_files.items()}


def rows(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row with its origin, for people.

    Raises:
        DataError: a file is missing or broken; the line is named.
    """
    if file.endswith(".gz"):
        yield from _zipped(file)
        return
    begun, where = "", ""
    for shard in sources.resolve(file):
        for number, row in shard.read():
            if sources.GOES_ON not in row:
                yield shard.where(number), row
                continue
            begun, where = begun + row["text"], where or shard.where(number)  # text comes in pieces
            if not row[sources.GOES_ON]:
                yield where, {"text": begun}
                begun, where = "", ""


def names(file: str) -> list[str]:
    """The files that a name or glob stands for, in order.

    Raises:
        DataError: there is none.
    """
    return list(dict.fromkeys(shard.name for shard in sources.resolve(file)))


def _zipped(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import fsspec

    try:
        with fsspec.open(file, "rb") as packed, gzip.open(packed) as unpacked:
            for number, line in enumerate(io.TextIOWrapper(unpacked, encoding="utf-8"), start=1):
                if not line.strip():
                    continue
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("expected a JSON object")
                yield f"{file}, line {number}", row
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: expected gzipped JSON lines: {error}") from error
