"""The output folder of a training run: what is in it, whose it is, and whether a run in it can go on.

run.json      settings, MLflow run and data fingerprint of the run, and whether it is finished
tokenizer/    the run's tokenizer
checkpoints/  Ray Train's storage, unless `train.storage_path` names another place
final/        the trained model, a Hugging Face directory
"""

import fcntl
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_ray.config import flatten
from dllm_ray.errors import OutputError
from dllm_ray.output import complete_file, writable_folder

CHECKPOINTS = "checkpoints"
FINAL = "final"
TOKENIZER = "tokenizer"

_RUN = "run.json"
_LOCK = ".lock"
# Settings that a resumed run may change: they touch neither what is learned nor what is already recorded.
_FREE = (
    "fresh",
    "output_dir",
    "tracking.",
    "train.workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "train.threads_per_worker",
    "train.micro_batch_size",
    "train.max_failures",
    "train.log_every",
)


class RunFolder:
    """Opens and locks an output folder.

    Args:
        path: the folder; created when missing.
        settings: the run's resolved settings.
        fresh: remove an earlier run of this job from the folder first.

    Raises:
        OutputError: the folder can't be written, another run is using it, or it holds something else or a run with
            other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], fresh: bool = False):
        self.path = writable_folder(path)
        self._lock = self._open()
        if fresh and (self.path / _RUN).exists():
            self._clear()
        self.state: dict[str, Any] = self._read()
        if self.state:
            self._require_same(settings)
        elif (self.path / FINAL).exists():
            raise OutputError(f"{self.path / FINAL} exists and is not from a run of this job: name another output_dir")
        self.resumed = bool(self.state)
        self.update(settings=dict(settings))

    def update(self, **values: Any) -> None:
        """Records facts of the run, in one piece."""
        self.state |= values
        with complete_file(self.path / _RUN) as file:
            json.dump(self.state, file, indent=2, ensure_ascii=False)

    @property
    def finished(self) -> bool:
        """Whether the run is done and its model is in `final/`."""
        return bool(self.state.get("finished")) and (self.path / FINAL).is_dir()

    def require_same_data(self, fingerprint: str) -> None:
        """Makes sure that a resumed run goes on with the data it began with.

        Raises:
            OutputError: the data are others.
        """
        before = self.state.get("data_fingerprint")
        if before not in (None, fingerprint):
            raise OutputError(
                f"{self.path} holds a run on other data (fingerprint {before[:12]}, now {fingerprint[:12]}): restore "
                "the data, start over with --fresh, or name another output_dir"
            )
        self.update(data_fingerprint=fingerprint)

    def close(self) -> None:
        """Lets other runs use the folder."""
        self._lock.close()

    def _open(self):
        lock = (self.path / _LOCK).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise OutputError(f"another run is using {self.path}: wait for it, or name another output_dir") from None
        return lock

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads((self.path / _RUN).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise OutputError(f"{self.path / _RUN} can't be read ({error}): start over with --fresh") from None

    def _clear(self) -> None:
        for name in (CHECKPOINTS, FINAL, TOKENIZER):
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / _RUN).unlink()

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        before, now = flatten(self.state.get("settings", {})), flatten(json.loads(json.dumps(settings)))
        changed = [
            f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(_FREE)
        ]
        if changed:
            raise OutputError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. Start over with --fresh, or name "
                "another output_dir"
            )
