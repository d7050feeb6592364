"""The output folder of a training run: what is in it, whose it is, and whether a run in it can go on.

run.json      settings, MLflow run and data fingerprint of the run, and whether it is finished
tokenizer/    the run's tokenizer
checkpoints/  Ray Train's storage; below `train.storage_path`, where that is set, a folder with the run's own name
final/        the trained model, a Hugging Face directory

Until its first checkpoint a run has nothing to lose: other settings or data replace it. From then on they are refused.
"""

import json
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_ray.config import flatten
from dllm_ray.errors import OutputError
from dllm_ray.output import complete_file, exclusive, writable_folder

CHECKPOINTS = "checkpoints"
FINAL = "final"
TOKENIZER = "tokenizer"

_RUN = "run.json"
# Settings that a resumed run may change: they touch neither what is learned nor what is already recorded.
_FREE = (
    "fresh",
    "output_dir",
    "observe.",
    "sampler.",
    "tracking.",
    "train.workers",
    "train.cpus_per_worker",
    "train.gpus_per_worker",
    "train.threads_per_worker",
    "train.micro_batch_size",
    "train.max_failures",
    "train.on_nan",
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
        self._lock = exclusive(self.path)
        self._settings = json.loads(json.dumps(settings))
        if fresh and (self.path / _RUN).exists():
            self._clear()
        self.state: dict[str, Any] = self._read()
        if not self.state:
            for name in (FINAL, CHECKPOINTS):
                if (self.path / name).exists():
                    raise OutputError(
                        f"{self.path / name} exists and is not from a run of this job: name another output_dir"
                    )
        changed = self._changed_settings()
        if changed and "checkpoint_step" in self.state:
            raise OutputError(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. Start over with --fresh, or name "
                "another output_dir"
            )
        if changed:
            self._clear()
        self.resumed = "checkpoint_step" in self.state

    def update(self, **values: Any) -> None:
        """Records facts of the run, in one piece."""
        self.state |= values
        with complete_file(self.path / _RUN) as file:
            json.dump(self.state, file, indent=2, ensure_ascii=False)

    @property
    def finished(self) -> bool:
        """Whether the run is done and its model is in `final/`."""
        return bool(self.state.get("finished")) and (self.path / FINAL).is_dir()

    def begin(self, fingerprint: str) -> None:
        """Records the run, or makes sure that a resumed one goes on with the data it began with.

        Raises:
            OutputError: the data are others.
        """
        before = self.state.get("data_fingerprint")
        if before not in (None, fingerprint):
            if self.resumed:
                raise OutputError(
                    f"{self.path} holds a run on other data (fingerprint {before[:12]}, now {fingerprint[:12]}): "
                    "restore the data, start over with --fresh, or name another output_dir"
                )
            self._clear()
        # a name of its own for what lies in storage that other runs share
        name = self.state.get("name") or f"{self.path.name}-{secrets.token_hex(4)}"
        self.update(name=name, settings=self._settings, data_fingerprint=fingerprint)

    def close(self) -> None:
        """Lets other runs use the folder."""
        self._lock.close()

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
        self.state = {}

    def _changed_settings(self) -> list[str]:
        if not self.state:
            return []
        before, now = flatten(self.state.get("settings", {})), flatten(self._settings)
        return [
            f"{key} was {before.get(key)!r}, is now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not key.startswith(_FREE)
        ]
