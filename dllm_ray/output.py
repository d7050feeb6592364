"""Writing results: folders that can be written, files and directories that are complete or not there."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from dllm_ray.errors import OutputError


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


@contextmanager
def complete_file(path: Path) -> Iterator[TextIO]:
    """A text file that takes its place, over an older one, when the `with` block ends without an error."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        yield file
    temporary.replace(path)


def replace_directory(temporary: Path, target: Path) -> None:
    """Puts a finished directory in the place of an older one or of none."""
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
