"""How far a pipeline has come, in a file of its output folder.

    pipeline.json   the MLflow run, and for each stage that was begun its settings, and once it is done what came of it

A stage that is begun forgets those after it, so that what stands in the file always belongs together.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_ray.answers import changes
from dllm_ray.errors import OutputError, first_line
from dllm_ray.output import complete_file, exclusive

STAGES = ("train", "evaluate", "compare", "register", "deploy")
"""In their order."""

_FILE = "pipeline.json"


class State:
    """Opens and locks the state of a folder; a context manager.

    Args:
        folder: exists.
        fresh: forget what is there.

    Raises:
        OutputError: the folder is in use, or what is there can't be read.
    """

    def __init__(self, folder: Path, fresh: bool = False):
        self._file = folder / _FILE
        self._lock = exclusive(folder)
        try:
            self._tree: dict[str, Any] = {"run_id": None, "stages": {}} if fresh else self._read()
            self._write()
        except BaseException:
            self._lock.close()
            raise

    @property
    def run_id(self) -> str | None:
        """Of the pipeline's MLflow run."""
        return self._tree["run_id"]

    @run_id.setter
    def run_id(self, run_id: str) -> None:
        self._tree["run_id"] = run_id
        self._write()

    def settings(self, stage: str) -> dict[str, Any] | None:
        """What a stage was begun with; None: it wasn't."""
        return self._tree["stages"].get(stage, {}).get("settings")

    def outcome(self, stage: str) -> dict[str, Any] | None:
        """What came of a stage; None: it isn't done."""
        return self._tree["stages"].get(stage, {}).get("outcome")

    def changes(self, stage: str, settings: Mapping[str, Any]) -> list[str]:
        """What differs from what a stage was begun with, in words; nothing where it wasn't."""
        before = self.settings(stage)
        return [] if before is None else changes(before, json.loads(json.dumps(settings)))

    def begin(self, stage: str, settings: Mapping[str, Any]) -> None:
        """Records that a stage is begun."""
        kept = STAGES[: STAGES.index(stage)]
        self._tree["stages"] = {name: self._tree["stages"][name] for name in kept if name in self._tree["stages"]}
        self._tree["stages"][stage] = {"settings": dict(settings)}
        self._write()

    def finish(self, stage: str, outcome: Mapping[str, Any]) -> None:
        """Records what came of a stage."""
        self._tree["stages"][stage]["outcome"] = dict(outcome)
        self._write()

    def __enter__(self) -> "State":
        return self

    def __exit__(self, *_error: object) -> None:
        self._lock.close()

    def _read(self) -> dict[str, Any]:
        try:
            tree = json.loads(self._file.read_text(encoding="utf-8"))
            if not {"run_id", "stages"} <= tree.keys() or not tree["stages"].keys() <= set(STAGES):
                raise ValueError("it isn't from a pipeline")
        except FileNotFoundError:
            return {"run_id": None, "stages": {}}
        except (OSError, ValueError, AttributeError) as error:
            raise OutputError(
                f"{self._file} can't be read ({first_line(error)}): start over with --fresh, or name another output_dir"
            ) from None
        return tree

    def _write(self) -> None:
        with complete_file(self._file) as file:
            json.dump(self._tree, file, indent=2, ensure_ascii=False)
