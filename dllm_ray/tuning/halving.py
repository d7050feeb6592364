"""Asynchronous successive halving over documents (ASHA, arXiv 1810.05934), which remembers its rungs."""

import json
from pathlib import Path
from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler


class DocumentHalving(AsyncHyperBandScheduler):
    """Drops settings whose score is not among the best of those that have answered as many documents.

    Ray restores trials after a kill, but not what schedulers know. So rungs and decisions are kept in a file, and a
    sweep that goes on drops settings as it would have done. A trial that begins again reports what it had reported
    before the kill, and is told the same. A trial that Ray had not yet written down when the kill came is forgotten:
    the searcher draws another in its place.

    Args:
        file: for the rungs; gone on with when it is there.
        first: documents before a setting may be dropped.
        reduction: one of so many settings goes on, with so many times the documents.
        documents: of the whole search.
    """

    def __init__(self, file: str, first: int, reduction: int, documents: int):
        super().__init__(
            time_attr="documents",
            metric="score",
            mode="max",
            max_t=documents,
            grace_period=first,
            reduction_factor=reduction,
        )
        self._file = Path(file)
        self._is_read = False
        self._decided: dict[str, dict[str, str]] = {}  # trial -> documents -> whether it goes on
        self._trials: set[str] = set()

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Learns of a trial, new or restored."""
        self._trials.add(trial.trial_id)
        super().on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if not self._is_read:
            self._read()
        decided, documents = self._decided.setdefault(trial.trial_id, {}), str(result["documents"])
        if documents not in decided:
            decided[documents] = super().on_trial_result(tune_controller, trial, result)
            self._write()
        return decided[documents]

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        """Forgets a trial that failed: the sweep may try its setting again, as another trial."""
        if not self._is_read:
            self._read()
        self._decided.pop(trial.trial_id, None)
        for _, recorded in self._rungs:
            recorded.pop(trial.trial_id, None)
        self._write()

    def _read(self) -> None:
        self._is_read = True
        if self._file.is_file():
            known = json.loads(self._file.read_text(encoding="utf-8"))
            self._decided = self._restored(known["decided"])
            for (_, recorded), before in zip(self._rungs, known["rungs"], strict=True):
                recorded.update(self._restored(before))

    def _restored(self, of_trials: dict[str, Any]) -> dict[str, Any]:
        return {trial: kept for trial, kept in of_trials.items() if trial in self._trials}

    def _write(self) -> None:
        known = {"rungs": [recorded for _, recorded in self._rungs], "decided": self._decided}
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(known), encoding="utf-8")
        unfinished.replace(self._file)

    @property
    def _rungs(self) -> list[tuple[float, dict[str, float]]]:
        (bracket,) = self._brackets
        return bracket._rungs


def rungs(first: int, reduction: int, documents: int) -> list[int]:
    """Documents after which settings are looked at, the last being all."""
    found = []
    while first < documents:
        found.append(first)
        first *= reduction
    return [*found, documents]
