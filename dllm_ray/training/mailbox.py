"""How workers of a training run and its driver talk. A process of its own holds the mailbox, so this module imports
nothing heavy.
"""

from typing import Any

Event = dict[str, Any]
"""What a worker tells the driver: `kind` (start, metrics, valid, checkpoint, not_finite, user_error), `step`, and
values."""


class Mailbox:
    """Carries events from workers to the driver, and the other way the wish to stop; never blocks either."""

    def __init__(self):
        self._events: list[Event] = []
        self._stop = False

    def post(self, event: Event) -> None:
        """Takes an event."""
        self._events.append(event)

    def drain(self) -> list[Event]:
        """The events since the last call."""
        events, self._events = self._events, []
        return events

    def waiting(self) -> int:
        """Events that the driver has not taken yet."""
        return len(self._events)

    def stop(self) -> None:
        """The driver wants the workers to save a checkpoint and end."""
        self._stop = True

    def stopping(self) -> bool:
        """Whether it does."""
        return self._stop
