"""A model in other processes, behind a handle of Ray Serve."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import replace

from ray.exceptions import NodeDiedError, ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from dllm_ray.serving.calls import Call, Event, ModelFacts, Refused

logger = logging.getLogger("ray.serve")

_LOST = (RayActorError, NodeDiedError, ObjectLostError, WorkerCrashedError)  # the replica, its node, or what it sent
_UNAVAILABLE = (BackPressureError, DeploymentUnavailableError)
_FACTS_EVERY_S = 5.0
_FACTS_SOON_S = 0.5
_PATIENCE_S = 5.0  # for facts: a replica has them at hand


class RemoteModel:
    """A `Backend` whose replicas are elsewhere.

    A call whose replica dies or leaves is asked once more, unless something of its answer was already sent.

    Args:
        name: what clients call it.
        handle: of its deployment, whose replicas are `ModelReplica`s.
        room: most calls that all its replicas take, under way and waiting; more are refused here, at once.
    """

    def __init__(self, name: str, handle: DeploymentHandle, room: int):
        # What isn't known yet is left to the replicas to refuse.
        self.facts = ModelFacts(name, "", 0, None, can_chat=True, can_infill=True, sampler={})
        self._room = room
        self._calls = 0
        self._stream = handle.options(method_name="stream", stream=True)
        self._answer = handle.options(method_name="answer")
        self._tell = handle.options(method_name="facts")
        self._known = asyncio.Event()
        self._doubt = asyncio.Event()  # whether replicas are there
        self._watch: asyncio.Task | None = None

    def watch(self) -> None:
        """Begins to ask for the facts, now and then: they may change when the model is updated."""
        self._watch = asyncio.create_task(self._ask_for_facts())

    async def known(self) -> None:
        """Waits until a replica has told the facts."""
        await self._known.wait()

    async def ready(self) -> bool:
        """Whether a replica has answered lately."""
        return self._known.is_set()

    async def generate(self, call: Call) -> AsyncIterator[Event]:
        """As `Backend.generate`."""
        if self._calls >= self._room:
            yield Refused("full", "too many requests are waiting", retry_after_s=1.0)
            return
        self._calls += 1
        try:
            async with aclosing(self._again_if_lost(call)) as events:
                async for event in events:
                    yield event
        finally:
            self._calls -= 1

    async def _again_if_lost(self, call: Call) -> AsyncIterator[Event]:
        ask = self._streamed if call.stream or call.canvas else self._whole
        has_sent = False
        for is_last in (False, True):
            try:
                async with aclosing(ask(call)) as messages:
                    async for events in messages:
                        if _is_leaving(events) and not (has_sent or is_last):
                            break
                        for event in events:
                            has_sent = True
                            yield event
                    else:
                        return
            except _LOST:
                self._doubt.set()
                again = not (has_sent or is_last)
                logger.warning("lost replica", extra={"call_id": call.id, "model": self.facts.name, "again": again})
                if not again:
                    yield Refused("draining", "the process that wrote the answer was lost", retry_after_s=1.0)
                    return
            except _UNAVAILABLE:
                yield Refused("draining", "the model is not available", retry_after_s=10.0)
                return

    async def _whole(self, call: Call) -> AsyncIterator[list[Event]]:
        response = self._answer.remote(call)
        try:
            yield await response
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _streamed(self, call: Call) -> AsyncIterator[list[Event]]:
        response = self._stream.remote(call)
        try:
            async for events in response:
                yield events
        except (asyncio.CancelledError, GeneratorExit):
            response.cancel()
            raise

    async def _ask_for_facts(self) -> None:
        while True:
            self._doubt.clear()
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    facts = await self._tell.remote()
                self.facts = replace(facts, created=self.facts.created or facts.created)  # replicas differ in that
                self._known.set()
            except (*_LOST, *_UNAVAILABLE, TimeoutError) as error:  # the replicas to come will be asked
                self._known.clear()
                logger.info("no facts", extra={"model": self.facts.name, "error": str(error)})
            with suppress(TimeoutError):
                async with asyncio.timeout(_FACTS_EVERY_S if self._known.is_set() else _FACTS_SOON_S):
                    await self._doubt.wait()


def _is_leaving(events: list[Event]) -> bool:
    return any(isinstance(event, Refused) and event.kind == "draining" for event in events)
