"""Tokenized shards on disk, so that later passes and runs need not tokenize again.

A shard's file is found by a hash of everything its tokens follow from: the shard, the version of its file, the rules
and the tokenizer. A change that leaves a file's size and time as they were isn't noticed. A folder may be shared by
jobs, and emptied at any time.
"""

import dataclasses
import hashlib
import io
import json
import os
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dllm_ray.data.compact import from_arrays, to_arrays
from dllm_ray.data.sources import Shard
from dllm_ray.data.tokenize import Account, RowRules, TokenRows
from dllm_ray.errors import DataError

_VERSION = 1
"""Goes up when the same rows become other tokens, or are written otherwise."""


@dataclass(frozen=True)
class Cache:
    """A folder of tokenized shards."""

    folder: str
    """Path or URL."""
    tokenizer: str
    """The tokenizer's `fingerprint`."""

    def get(
        self, shard: Shard, rules: RowRules, tokenize: Callable[[], tuple[TokenRows, Account]]
    ) -> tuple[TokenRows, Account]:
        """The shard's rows and account from the folder, or else from `tokenize`, which are then kept there.

        Raises:
            DataError: the folder can't be written to; or as `tokenize`.
        """
        path = f"{self.folder.rstrip('/')}/{self._key(shard, rules)}.npz"
        found = _load(path)
        if found is None:
            found = tokenize()
            _store(path, *found)
        return found

    def _key(self, shard: Shard, rules: RowRules) -> str:
        facts = [_VERSION, dataclasses.asdict(shard), shard.version(), dataclasses.asdict(rules), self.tokenizer]
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def fingerprint(tokenizer, stop_token_ids: Sequence[int]) -> str:
    """SHA-256 over everything about a tokenizer that decides what text becomes."""
    facts = [
        json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None},
        tokenizer.chat_template,
        list(stop_token_ids),
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _load(path: str) -> tuple[TokenRows, Account] | None:
    import fsspec

    try:
        # numpy checks each array against its checksum in the archive
        with fsspec.open(path, "rb") as file, np.load(io.BytesIO(file.read()), allow_pickle=False) as arrays:
            facts = json.loads(arrays["account"].tobytes())
            rows = from_arrays({name: arrays[name] for name in arrays.files if name != "account"})
        return rows, Account(**facts | {"dropped": Counter(facts["dropped"])})
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile):
        return None  # absent or damaged: it is made again


def _store(path: str, rows: TokenRows, account: Account) -> None:
    from fsspec.core import url_to_fs

    content = io.BytesIO()
    facts = json.dumps(vars(account)).encode()
    np.savez(content, **to_arrays(rows), account=np.frombuffer(facts, dtype=np.uint8))
    try:
        fs, place = url_to_fs(path)
        fs.makedirs(os.path.dirname(place), exist_ok=True)  # noqa: PTH120 - a place in any file system
        temporary = f"{place}.{uuid.uuid4().hex}"
        fs.pipe_file(temporary, content.getvalue())
        fs.mv(temporary, place)
    except (OSError, ImportError, ValueError) as error:
        raise DataError(f"data.cache_dir: {path} can't be written: {error}") from error
