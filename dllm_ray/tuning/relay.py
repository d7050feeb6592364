"""Tells a listener in this process what Ray Tune's trials report.

Tune pickles its callbacks beside the trials and brings them back after a kill. So the callback holds nothing, and finds
whoever listens now.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ray.tune import Callback

Listener = Callable[[Any, Mapping[str, Any], bool, str | None], None]
"""Called with a trial, its result, whether it is over, and why it failed."""

_listeners: list[Listener] = []


@contextmanager
def to(listener: Listener) -> Iterator[None]:
    """Results go to a listener for the time of a `with` block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Relay(Callback):
    """The callback."""

    def on_trial_result(self, iteration, trials, trial, result, **info) -> None:
        self._tell(trial, result, False, None)

    def on_trial_complete(self, iteration, trials, trial, **info) -> None:
        self._tell(trial, trial.last_result or {}, True, None)

    def on_trial_error(self, iteration, trials, trial, **info) -> None:
        self._tell(trial, trial.last_result or {}, True, _last_line(trial))

    @staticmethod
    def _tell(*told: Any) -> None:
        for listener in _listeners:
            listener(*told)


def _last_line(trial: Any) -> str:
    """What a failed trial met."""
    return reason(trial.get_error())


def reason(error: BaseException | None) -> str:
    """What a failed trial met, out of Ray's story around it."""
    lines = [line for line in str(error or "").splitlines() if line.strip()]
    return re.sub(r"^[\w.]+Error: ", "", lines[-1].strip()) if lines else "its process ended without a word"
