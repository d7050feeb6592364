"""What stands behind the API: something that answers calls to one model."""

from collections.abc import AsyncIterator
from typing import Protocol

from dllm_ray.serving.calls import Call, Event, ModelFacts


class Backend(Protocol):
    """A served model, in this process or elsewhere."""

    facts: ModelFacts

    def generate(self, call: Call) -> AsyncIterator[Event]:
        """The events that answer a call: either one `Refused`, or one `Done` for each text, with `Text` and `Canvas`
        before it where the call asks for them. Closing the iterator (`aclose`, or cancelling the task that waits for
        it) cancels the call.
        """
        ...

    async def ready(self) -> bool:
        """Whether it can answer calls now."""
        ...
