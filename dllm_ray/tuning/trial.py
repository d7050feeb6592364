"""A trial of Ray Tune: a setting, and no process with a model. What it answers is asked of the sweep's judge.

Processes of trials import this module; so it imports nothing heavy.
"""

import math
from typing import Any

import ray
from ray import tune

JUDGE = "dllm_ray sweep judge"
"""Name of the actor with `Judge`, in the job's own namespace."""


class SettingTrial(tune.Trainable):
    """Answers more and more documents of a task under one setting.

    Its config's `setting`: `name`, `sampler` (all settings), `folder` for results, `rungs` (documents of the first,
    second, ... step); or `impossible`, why the setting can't work.
    """

    def setup(self, config: dict[str, Any]) -> None:
        self._judge = ray.get_actor(JUDGE)
        self._setting = config["setting"]
        self._number = 0

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Takes on another setting: no process is started for it."""
        self.setup(new_config)
        return True

    def step(self) -> dict[str, Any]:
        """Answers the documents of the next rung.

        Returns:
            `score`, `tpf`, `tokens_per_s`, `nfe`, `documents` of each task, and `ended`: why the trial is over, if it
            is: `complete`, `budget` or `impossible`.
        """
        if "impossible" in self._setting:
            return _told({}, 0, "impossible")
        documents = self._setting["rungs"][self._number]
        arguments = (self._setting["sampler"], range(documents), self._setting["folder"], self._setting["name"])
        answered = ray.get(self._judge.answer.remote(*arguments))
        if answered is None:
            return _told({}, 0, "budget")
        self._number += 1
        last = self._number == len(self._setting["rungs"])
        return _told(
            {name: getattr(answered, name) for name in ("score", "tpf", "tokens_per_s", "nfe")},
            documents,
            "complete" if last else "",
        )

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: answers are on disk."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: a trial that was broken off begins again, with answers from disk."""


def _told(figures: dict[str, float], documents: int, ended: str) -> dict[str, Any]:
    missing = dict.fromkeys(("score", "tpf", "tokens_per_s", "nfe"), math.nan)
    return {**missing, **figures, "documents": documents, "ended": ended, "done": bool(ended)}
