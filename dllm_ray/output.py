"""Writing results: folders that can be written, files and directories that are complete or not there, harmless text."""

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from dllm_ray.errors import OutputError

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text with pictures in place of control characters: what a model or a file holds must not command a terminal.

    Tabs and line breaks stay.
    """
    return _CONTROL.sub(lambda match: _picture(ord(match[0])), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else "\ufffd"


def writable_folder(folder: str | Path) -> Path:
    """The absolute path of an output folder, created when missing and tried out.

    Raises:
        OutputError: it can't be written.
    """
    path = Path(folder).expanduser().resolve()
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"output_dir {path} can't be written: {error.strerror or error}") from None
    return path


def may_be_a_file(path: str | Path) -> bool:
    """Whether a file may be made there: its folder exists, and it is no folder itself."""
    path = Path(path)
    try:
        return path.parent.is_dir() and not path.is_dir()
    except OSError:  # e.g. a name that is too long
        return False


def exclusive(folder: Path) -> TextIO:
    """Keeps others out of a folder that exists, until the file that it returns is closed or the process ends.

    Raises:
        OutputError: another run is using it.
    """
    lock = (folder / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise OutputError(f"another run is using {folder}: wait for it, or name another output_dir") from None
    return lock


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its place, over an older one, when the `with` block ends without an error; else it goes
    away.

    Raises:
        OutputError: it can't be written.
    """
    if not path.name or "\0" in str(path):
        raise OutputError(f"{str(path)!r} is no name of a file")
    temporary = _beside(path, os.getpid(), "tmp")
    with suppress(OSError):
        _sweep(path, "tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            yield file
        temporary.replace(path)
    except OSError as error:
        ours = error.filename in (None, str(temporary))
        where = "" if ours else f" ({error.filename})"
        raise OutputError(f"{path} can't be written: {error.strerror or error}{where}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory that becomes `target` when the block ends without an error; else it goes away.

    Args:
        target: the directory to make.
        overwrite: replace one that is there.

    Raises:
        OutputError: it is there already, or can't be made.
    """
    try:
        _check_target(target, overwrite)
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target, "partial")
        temporary = _beside(target, os.getpid(), "partial")
        temporary.mkdir()
    except OSError as error:
        raise OutputError(f"{target} can't be written: {error.strerror or error}") from None
    try:
        yield temporary
        replace_directory(temporary, target)
    except OSError as error:
        inside = error.filename is None or Path(str(error.filename)).is_relative_to(temporary)
        where = "" if inside else f" ({error.filename})"
        raise OutputError(f"{target} can't be written: {error.strerror or error}{where}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(temporary: Path, target: Path) -> None:
    """Puts a finished directory in the place of an older one or of none; an older one is there until then.

    Raises:
        OSError: it can't be moved there.
    """
    _sweep(target, "old")
    old = _beside(target, os.getpid(), "old")
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.name:
        raise OutputError(f"{target} can't be replaced; name another --output_dir")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; name another --output_dir")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists; name another --output_dir, or replace it with --overwrite")


def _beside(target: Path, process: int | str, kind: str) -> Path:
    """A name of this process's own, beside the target."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{process}.{kind}")


def _sweep(target: Path, kind: str) -> None:
    """Removes what killed processes of this machine left beside the target."""
    name = _beside(target, "PROCESS", kind).name
    before, after = name.removesuffix(f"PROCESS.{kind}"), f".{kind}"
    for stale in target.parent.iterdir():
        process = stale.name.removeprefix(before).removesuffix(after)
        ours = stale.name == f"{before}{process}{after}" and process.isdecimal()
        if ours and (int(process) == os.getpid() or not _alive(int(process))):
            if stale.is_dir():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                stale.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
