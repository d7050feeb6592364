"""Data sources: a source string becomes shards, a shard yields raw rows with their origin.

A shard is a small description (a byte range of a jsonl file, row groups of a parquet file, rows of a hub data set, ...)
that any machine with access to the same storage can read. Knows nothing of messages, tokens or Ray.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import Any

from dllm_ray.data import builtin
from dllm_ray.errors import DataError

SHARD_BYTES = 4 << 20
"""A jsonl or text file is read in pieces of about this size."""
SHARD_ROWS = 5_000
"""Generated and hub data sets are read in pieces of this many rows."""

GOES_ON = "goes on"
"""Column of a text file's rows: the next shard's row continues the document."""

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "txt",
}
_SLICE = re.compile(r"^(?P<name>.+?)\[(?P<split>[\w.-]+)(?::(?P<limit>\d+))?\]$")
_SNIPPET = 200


@dataclass(frozen=True)
class Shard:
    """A readable piece of a source."""

    kind: str
    """jsonl, json, csv, parquet, txt, hub or builtin."""
    name: str
    """File path or URL, hub id, or name of the generated data set."""
    start: int = 0
    """First byte (jsonl, txt), row group (parquet) or row (hub, builtin)."""
    stop: int = 0
    """End of that range, excluded."""
    split: str = ""
    """Split of a hub or generated data set."""
    seed: int = 0
    """Seed of a generated data set."""
    size: int = 0
    """Bytes to read, or an estimate."""

    def read(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows, each with a number that `where` turns into its origin.

        Raises:
            DataError: broken content; the file and line are named.
        """
        return _READERS[self.kind](self)

    def version(self) -> str:
        """What changes whenever the rows may have changed: the file's size and time or checksum."""
        if self.kind == "builtin":
            return ""
        if self.kind == "hub":
            return _hub_dataset(self.name, self.split)._fingerprint
        from fsspec.core import url_to_fs

        try:
            fs, path = url_to_fs(self.name)
            facts = fs.info(path)
        except (OSError, ImportError, ValueError) as error:
            raise DataError(f"{self.name}: can't be looked up: {error}") from error
        names = ("size", "mtime", "ETag", "etag", "LastModified", "updated", "last_modified")
        return ", ".join(f"{name}={facts[name]}" for name in names if facts.get(name) is not None)

    def where(self, number: int) -> str:
        """The origin of a row, for people: `train.jsonl, line 17`."""
        if self.kind in ("jsonl", "txt"):
            return f"{self.name}, line {_lines_before(self) + number + 1}"
        if self.kind == "csv":
            return f"{self.name}, line {number}"
        if self.kind in ("hub", "builtin"):
            return f"{self.name}[{self.split}], row {self.start + number}"
        return f"{self.name}, row {number}"


def resolve(sources: str | Sequence[str]) -> list[Shard]:
    """The shards of one source or several, in order.

    Args:
        sources: files, globs, folders or URLs; hub ids with an optional `[split:limit]`; `builtin:name[split:limit]`.

    Raises:
        DataError: nothing is there, a file type is unknown, or a file is empty.
    """
    shards: list[Shard] = []
    for source in [sources] if isinstance(sources, str) else sources:
        shards += _resolve_one(source)
    return shards


def head(shards: Sequence[Shard], count: int) -> list[tuple[str, dict[str, Any]]]:
    """The first rows of a source, with their origins."""
    rows = ((shard, number, row) for shard in shards for number, row in shard.read())
    return [(shard.where(number), row) for shard, number, row in islice(rows, count)]


def snippet(value: Any) -> str:
    """A row or line, short enough for a message."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.strip()
    return text if len(text) <= _SNIPPET else text[:_SNIPPET] + "…"


def _resolve_one(source: str) -> list[Shard]:
    if source.startswith("builtin:"):
        return _resolve_builtin(source)
    sliced = _SLICE.match(source)
    if sliced:
        return _resolve_hub(sliced["name"], sliced["split"], int(sliced["limit"]) if sliced["limit"] else None)
    files = _files(source)
    if files:
        return [shard for path in files for shard in _file_shards(path)]
    looks_like_file = source.startswith((".", "/", "~")) or "://" in source or _suffix(source) in _SUFFIXES
    if looks_like_file or set("*?[") & set(source) or source.count("/") > 1:
        raise DataError(f"no such file, folder or pattern: {source}")
    return _resolve_hub(source, "train", None)


def _files(source: str) -> list[str]:
    from fsspec.core import url_to_fs

    try:
        fs, path = url_to_fs(source, expand=False) if "://" in source else url_to_fs(source)
        if fs.isdir(path):
            names = sorted(name for name in fs.find(path) if _suffix(name) in _SUFFIXES)
            # text beside data explains it
            names = [name for name in names if _suffix(name) != ".txt"] or names
            if not names:
                raise DataError(f"{source}: no data files in this folder; expected {', '.join(_SUFFIXES)}")
        else:
            names = [path] if fs.exists(path) else sorted(name for name in fs.glob(path) if fs.isfile(name))
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{source}: can't be looked up: {error}") from error
    local = "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))
    return [name if local else fs.unstrip_protocol(name) for name in names]


def _suffix(name: str) -> str:
    return "." + name.rpartition(".")[2].lower() if "." in name.rpartition("/")[2] else ""


def _file_shards(path: str) -> list[Shard]:
    kind = _SUFFIXES.get(_suffix(path))
    if kind is None:
        raise DataError(f"{path}: unknown file type {_suffix(path)!r}; expected {', '.join(_SUFFIXES)}")
    with _open(path) as file:
        file.seek(0, io.SEEK_END)
        size = file.tell()
        if size == 0:
            raise DataError(f"{path}: the file is empty")
        if kind == "json":
            file.seek(0)
            kind = "jsonl" if _holds_lines(file.read(1 << 20)) else kind
    if kind in ("jsonl", "txt"):
        edges = [*range(0, size, SHARD_BYTES), size]
        return [Shard(kind, path, start, stop, size=stop - start) for start, stop in pairwise(edges)]
    if kind == "parquet":
        import pyarrow.parquet as pq

        with _open(path) as file:
            try:
                groups = pq.ParquetFile(file).num_row_groups
            except (OSError, ValueError) as error:
                raise DataError(f"{path}: not a parquet file: {error}") from error
        return [Shard(kind, path, group, group + 1, size=size // max(groups, 1)) for group in range(groups)]
    return [Shard(kind, path, size=size)]


def _holds_lines(beginning: bytes) -> bool:
    """Whether what is named .json holds a JSON object on each line."""
    first, _, rest = beginning.lstrip().partition(b"\n")
    try:
        return isinstance(json.loads(first), dict) and bool(rest.strip())
    except (ValueError, RecursionError):
        return False


def _resolve_builtin(source: str) -> list[Shard]:
    pattern = re.compile(
        r"^builtin:(?P<name>\w+)(?:\?seed=(?P<seed>\d+))?(?:\[(?P<split>train|test)(?::(?P<n>\d+))?\])?$"
    )
    parts = pattern.match(source)
    if not parts or parts["name"] not in builtin.SETS:
        raise DataError(
            f"{source}: no such generated data set; expected builtin:digits[train:40000] or [test:1000], or "
            f"builtin:{' or builtin:'.join(list(builtin.SETS)[1:])}"
        )
    total = int(parts["n"] or 40_000)
    if total == 0:
        raise DataError(f"{source}: asks for no rows")
    return [
        Shard("builtin", f"builtin:{parts['name']}", start, min(start + SHARD_ROWS, total), parts["split"] or "train",
              int(parts["seed"] or 0), size=(min(start + SHARD_ROWS, total) - start) * 64)
        for start in range(0, total, SHARD_ROWS)
    ]  # fmt: skip


def _resolve_hub(name: str, split: str, limit: int | None) -> list[Shard]:
    total = len(_hub_dataset(name, split))
    if limit is not None:
        total = min(total, limit)
    if total == 0:
        raise DataError(f"{name}[{split}]: the split is empty")
    return [
        Shard("hub", name, start, min(start + SHARD_ROWS, total), split, size=SHARD_ROWS * 1024)
        for start in range(0, total, SHARD_ROWS)
    ]


@lru_cache(maxsize=8)
def _hub_dataset(name: str, split: str):
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)
    except Exception as error:  # datasets raises many types: offline, not found, bad split, bad files
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name}[{split}]: neither a file nor a data set that can be loaded: {first}") from error


def _open(path: str):
    import fsspec

    try:
        return fsspec.open(path, "rb").open()
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"{path}: can't be opened: {error}") from error


def _read_jsonl(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(shard.name) as file:
        for number, line in enumerate(_lines(file, shard)):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{shard.where(number)}: not valid JSON ({error}): {_shown(line)}") from None
            if not isinstance(row, dict):
                raise DataError(f"{shard.where(number)}: expected a JSON object, found: {_shown(line)}")
            yield number, row


def _read_txt(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    """A text file is one document, in as many rows as it has shards."""
    text = bytearray()
    with _open(shard.name) as file:
        for number, line in enumerate(_lines(file, shard)):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                raise DataError(f"{shard.where(number)}: not UTF-8 ({error.reason}): {_shown(line)}") from None
            text += line
        goes_on = bool(file.read(1))
    if text:
        yield 0, {"text": text.decode("utf-8" if shard.start else "utf-8-sig"), GOES_ON: goes_on}


def _lines(file, shard: Shard) -> Iterator[bytes]:
    """Lines that begin inside the byte range; a line that straddles its end is read to its end."""
    if shard.start:
        file.seek(shard.start - 1)
        file.readline()  # the rest of a line that belongs to the shard before
    while file.tell() < shard.stop:
        yield file.readline()


def _shown(line: bytes) -> str:
    return snippet(line.decode("utf-8", errors="replace"))


def _lines_before(shard: Shard) -> int:
    """Whole lines of the file that end before the shard's first own line."""
    if not shard.start:
        return 0
    with _open(shard.name) as file:
        lines = sum(
            chunk.count(b"\n") for chunk in iter(lambda: file.read(min(1 << 20, shard.start - file.tell())), b"")
        )
        file.seek(shard.start - 1)
        return lines if file.read(1) == b"\n" else lines + 1


def _read_json(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(shard.name) as file:
        content = file.read()
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shard.name}: not valid JSON ({error})") from None
    if isinstance(tree, dict):
        lists = [value for value in tree.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        tree = lists[0] if len(lists) == 1 else tree
    if not isinstance(tree, list) or not all(isinstance(row, dict) for row in tree):
        raise DataError(f"{shard.name}: expected a list of JSON objects, or an object that holds one")
    yield from enumerate(tree)


def _read_csv(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    with _open(shard.name) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        csv.field_size_limit(sys.maxsize)  # long documents are no mistake
        reader = csv.DictReader(text)
        try:
            for row in reader:
                yield reader.line_num, {key: value for key, value in row.items() if key is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{shard.name}, line {reader.line_num + 1}: not readable as CSV: {error}") from None


def _read_parquet(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet as pq

    with _open(shard.name) as file:
        parquet = pq.ParquetFile(file)
        before = sum(parquet.metadata.row_group(group).num_rows for group in range(shard.start))
        try:
            rows = parquet.read_row_groups(list(range(shard.start, shard.stop))).to_pylist()
        except (OSError, ValueError) as error:
            raise DataError(f"{shard.where(before)}: not readable as parquet: {str(error).strip()}") from error
    yield from enumerate(rows, start=before)


def _read_hub(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    dataset = _hub_dataset(shard.name, shard.split)
    for number in range(shard.stop - shard.start):
        yield number, dataset[shard.start + number]


def _read_builtin(shard: Shard) -> Iterator[tuple[int, dict[str, Any]]]:
    made = builtin.SETS[shard.name.removeprefix("builtin:")]
    yield from enumerate(made.rows(shard.split, shard.start, shard.stop, shard.seed))


_READERS = {
    "jsonl": _read_jsonl,
    "txt": _read_txt,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "hub": _read_hub,
    "builtin": _read_builtin,
}
