"""Finished answers on disk, so that a killed evaluation goes on where it was and a later one asks nothing twice.

Every finished slice is one new file under a name of its own, written whole and never changed. So several runs may share
a folder, and object stores will do. What a key stands for is the caller's business.
"""

import hashlib
import json
import logging
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow.fs import FileSelector, FileSystem

from dllm_ray.errors import OutputError, first_line

logger = logging.getLogger(__name__)

_SUFFIX = ".jsonl"


class AnswerCache:
    """Answers to requests, all under one key. In memory are those that `refresh` found, and those that were added.

    Args:
        folder: a path, or a URI that pyarrow knows (`s3://`, `gs://`, `file://`, ...); made when missing.
        key: all that the answers depend on beside their requests, as plain values. Other keys may share the folder.

    Raises:
        OutputError: the folder can't be used.
    """

    def __init__(self, folder: str, key: Mapping[str, Any]):
        self._root = folder
        self._key = json.loads(json.dumps(key))
        self._files, root = _open(folder)
        self._folder = f"{root.rstrip('/')}/{digest(self._key)}"
        self._entries: dict[str, Any] = {}
        self._seen: set[str] = set()
        self.refresh()

    def under(self, more: Mapping[str, Any]) -> "AnswerCache":
        """The cache in the same folder whose answers depend on more."""
        return AnswerCache(self._root, self._key | more)

    def refresh(self) -> None:
        """Takes in what other runs have written meanwhile. A file that is damaged is left out, with a warning.

        Raises:
            OutputError: the folder can't be listed.
        """
        try:
            found = self._files.get_file_info(FileSelector(self._folder, allow_not_found=True))
        except (OSError, pyarrow.ArrowException) as error:
            raise OutputError(f"answers in {self._root} can't be listed: {first_line(error)}") from error
        for path in sorted(file.path for file in found if file.path.endswith(_SUFFIX)):
            if path not in self._seen:
                self._seen.add(path)
                self._take(path)

    def get(self, request: str) -> Any | None:
        """What `add` was given for a request; None: nothing."""
        return self._entries.get(request)

    def add(self, entries: Mapping[str, Any]) -> None:
        """Keeps finished answers, as plain values by request.

        Raises:
            OutputError: they can't be written.
        """
        lines = _lines({"request": request, "answer": answer} for request, answer in entries.items())
        head = _lines([{"key": self._key, "digest": hashlib.sha256(lines).hexdigest()}])
        name = uuid.uuid4().hex
        path, unfinished = f"{self._folder}/{name}{_SUFFIX}", f"{self._folder}/{name}.unfinished"
        try:
            self._files.create_dir(self._folder)
            with self._files.open_output_stream(unfinished) as file:
                file.write(head + lines)
            self._files.move(unfinished, path)
        except (OSError, pyarrow.ArrowException) as error:
            raise OutputError(f"answers can't be written to {self._root}: {first_line(error)}") from error
        self._seen.add(path)
        self._entries |= entries

    def _take(self, path: str) -> None:
        try:
            with self._files.open_input_stream(path, compression=None) as file:
                head, _, lines = file.read().partition(b"\n")
            if json.loads(head)["digest"] != hashlib.sha256(lines).hexdigest():
                raise ValueError("its content is not what was written")
            entries = [json.loads(line) for line in lines.splitlines()]
        except (OSError, ValueError, LookupError, TypeError, pyarrow.ArrowException) as error:
            logger.warning("%s is damaged, its answers are asked for again: %s", path, first_line(error))
            return
        self._entries |= {entry["request"]: entry["answer"] for entry in entries}


def digest(value: Any) -> str:
    """A short name for plain values, the same on every machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


def _lines(entries) -> bytes:
    return b"".join(json.dumps(entry, separators=(",", ":")).encode() + b"\n" for entry in entries)


def _open(folder: str) -> tuple[FileSystem, str]:
    """The file system, and the folder's path in it."""
    place = folder if "://" in folder else str(Path(folder).expanduser().absolute())
    try:
        files, root = FileSystem.from_uri(place)
        files.create_dir(root)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise OutputError(f"no folder for answers: {folder}: {first_line(error)}") from error
    return files, root
