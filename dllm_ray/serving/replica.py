"""A process of Ray Serve that holds a model. What it does with a call is `LocalModel`'s affair; here it is loaded,
warmed up, asked from other processes, given new settings, and let go.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any

import ray
import torch

from dllm_ray.config import read
from dllm_ray.errors import ModelError
from dllm_ray.models.load import open_model
from dllm_ray.serving.calls import Call, Event, ModelFacts, Refused
from dllm_ray.serving.config import REGISTRY, ServedModel
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.local import LocalModel
from dllm_ray.serving.loop import Figures
from dllm_ray.serving.metrics import Answer, ReplicaMetrics

logger = logging.getLogger("ray.serve")

_MESSAGES_PER_S = 100  # of all streams of a replica: each costs about a millisecond of a core, which steps need
_LONGEST_PAUSE_S = 0.25  # between two messages of a stream, however many streams there are
_LOAD_EVERY_S = 1.0
_WARM_UP_TOKENS = 16
_WARM_UP_S = 600.0


class ModelReplica:
    """One process with a model.

    Args:
        model: what to load, as plain values of `ServedModel`; a model of MLflow's registry by its version.
        threads: torch threads on a CPU.
        drain_s: seconds that calls under way may take when settings change.
        tracking_uri: MLflow server of the registry.
    """

    def __init__(self, model: Mapping[str, Any], threads: int, drain_s: float, tracking_uri: str | None):
        self._config = read(ServedModel, model, "model")
        self._drain_s = drain_s
        self._path, adapter = (
            path and _at_hand(path, tracking_uri) for path in (self._config.path, self._config.adapter)
        )
        on_gpu = torch.cuda.is_available() and bool(ray.get_gpu_ids())
        self._threads = None if on_gpu else threads
        torch.set_num_threads(1)  # here; those of the engine's thread are all that there is room for
        self._lm = open_model(self._config.loaded(self._path, adapter), device="cuda" if on_gpu else "cpu")
        self._metrics = ReplicaMetrics(self._config.name)
        self._settings: Mapping[str, Any] | None = None
        self._model: LocalModel | None = None
        self._leaving: set[asyncio.Task] = set()
        self._streams = 0
        self._reporter: asyncio.Task | None = None

    async def reconfigure(self, settings: Mapping[str, Any]) -> None:
        """Sampler settings and limits; Serve calls it before the first call, and when they change. Calls under way end
        as they began.

        Args:
            settings: `limits` and `sampler`, as plain values.

        Raises:
            ConfigError: they don't fit the model.
            ModelError: it can't write a token.
        """
        if settings == self._settings:
            return  # Serve has only given the replica another rank
        limits = read(Limits, settings["limits"], "limits")
        self._config.sampler = dict(settings["sampler"])
        model = LocalModel(
            self._config.name,
            self._lm,
            limits,
            self._config.sampler_for(self._path),
            observe=self._metrics.step,
            threads=self._threads,
        )
        await _warm_up(model, limits)
        self._settings = settings
        before, self._model = self._model, model
        if before is not None:
            task = asyncio.create_task(_leave(before, self._drain_s))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        if self._reporter is None:
            self._reporter = asyncio.create_task(self._report())

    async def facts(self) -> ModelFacts:
        """What clients may know of the model."""
        path = self._config.path
        return replace(self._model.facts, version=path if path.startswith(REGISTRY) else None)

    async def figures(self) -> Figures:
        """How it is doing."""
        return self._model.figures()

    async def stream(self, call: Call) -> AsyncIterator[list[Event]]:
        """The events of a call as they come, those that come together in one message."""
        seen = self._metrics.answer(call)
        self._streams += 1
        try:
            async with aclosing(_bunches(self._model.generate(call), self._pause)) as bunches:
                async for events in bunches:
                    seen.saw(events)
                    yield events
        finally:
            self._streams -= 1
            self._log(call, seen)

    async def answer(self, call: Call) -> list[Event]:
        """All events of a call."""
        seen = self._metrics.answer(call)
        try:
            async with aclosing(self._model.generate(call)) as stream:
                events = [event async for event in stream]
            seen.saw(events)
            return events
        finally:
            self._log(call, seen)

    async def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if not await self._model.ready():
            raise RuntimeError("the thread that denoises has ended")

    async def __del__(self):
        if self._reporter is not None:
            self._reporter.cancel()
        if self._model is not None:
            await asyncio.to_thread(self._model.close)

    def _pause(self) -> float:
        """Seconds between two messages of a stream: what comes meanwhile goes together."""
        return min(self._streams / _MESSAGES_PER_S, _LONGEST_PAUSE_S)

    def _log(self, call: Call, seen: Answer) -> None:
        seen.end(call.n)
        if set(seen.reasons) <= {"stop", "length"}:
            return  # the ingress tells of requests; a line for each would cost some per cent of a small model's speed
        logger.info(
            "call",
            extra={
                "call_id": call.id,
                "model": self._config.name,
                "client": call.client,
                "reasons": seen.reasons,
                "tokens": seen.tokens,
                "nfe": seen.nfe,
                "seconds": round(seen.seconds, 4),
            },
        )

    async def _report(self) -> None:
        while True:
            figures = self._model.figures()
            self._metrics.load(figures.queued, figures.active)
            await asyncio.sleep(_LOAD_EVERY_S)


async def _leave(model: LocalModel, within_s: float) -> None:
    """Closes a model when its calls have ended, or when time is up."""
    await model.drain(within_s)
    await asyncio.to_thread(model.close)


async def _bunches(events: AsyncIterator[Event], pause: Callable[[], float]) -> AsyncIterator[list[Event]]:
    """Events as they come, but with a pause of so many seconds between bunches; the first and the last at once."""
    ready: list[Event] = []
    arrived = asyncio.Event()

    async def pump() -> None:
        async with aclosing(events):
            async for event in events:
                ready.append(event)
                arrived.set()

    task = asyncio.create_task(pump())
    task.add_done_callback(lambda _: arrived.set())
    try:
        while True:
            await arrived.wait()
            arrived.clear()
            bunch = ready.copy()
            ready.clear()
            if bunch:
                yield bunch
            if task.done() and not ready:
                task.result()
                return
            await asyncio.wait({task}, timeout=pause())
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


async def _warm_up(model: LocalModel, limits: Limits) -> None:
    """Writes a few tokens, so that the first client doesn't wait for what is made at a first forward.

    Raises:
        ModelError: the model can't.
    """
    tokens = min(model.facts.sampler.get("block_size") or _WARM_UP_TOKENS, limits.max_new_tokens)
    question = {"messages": ({"role": "user", "content": "1"},)} if model.facts.can_chat else {"prompt": "1"}
    call = Call(id="warm-up", max_tokens=tokens, seed=0, deadline=time.time() + _WARM_UP_S, **question)
    async with aclosing(model.generate(call)) as events:
        async for event in events:
            if isinstance(event, Refused) and event.kind == "failed":
                raise ModelError(f"{model.facts.name} can't be served: {event.message}")
            if isinstance(event, Refused):
                logger.warning("warm-up: %s", event.message)


def _at_hand(path: str, tracking_uri: str | None) -> str:
    """Where a model lies on this machine; one of MLflow's registry is fetched."""
    if not path.startswith(REGISTRY):
        return path
    from dllm_ray.tracking import fetch_model

    return str(fetch_model(path, tracking_uri))
