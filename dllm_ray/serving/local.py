"""`LocalModel`: a model in this process behind the interface that the HTTP side asks (`app.Backend`)."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving.calls import Call, Done, Event, ModelFacts, Refused
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.loop import Figures
from dllm_ray.serving.writer import Writer


class LocalModel:
    """Answers calls with a model in this process.

    Args:
        name: what the model is called.
        lm: the model, in eval mode, with its tokenizer.
        limits: what calls may ask; None: the defaults.
        sampler: the settings that calls begin with; None: the model's own.
        observe: told after each step: rows in it, tokens it wrote, seconds it took. Called in the engine's thread.
        threads: torch threads on a CPU, of the engine's thread; None: as they are.

    Raises:
        ModelError: the model can't be served.
        ConfigError: the settings don't fit it.
    """

    def __init__(
        self,
        name: str,
        lm: DiffusionLM,
        limits: Limits | None = None,
        sampler: SamplerConfig | None = None,
        observe: Callable[[int, int, float], None] | None = None,
        threads: int | None = None,
    ):
        self.writer = Writer(name, lm, sampler, limits, observe, threads)

    @property
    def facts(self) -> ModelFacts:
        """What clients may know of it."""
        return self.writer.facts

    async def generate(self, call: Call) -> AsyncIterator[Event]:
        """The events that answer a call. Closing the iterator lets the call's rows go before the next step."""
        mailbox = _Mailbox(asyncio.get_running_loop())
        # in a thread: a long prompt takes a while to become tokens
        writing = asyncio.ensure_future(asyncio.to_thread(self.writer.write, call, mailbox.put))
        done, texts = 0, max(call.n, 1)  # a call for none is refused
        try:
            await asyncio.shield(writing)
            while done < texts:
                event = await mailbox.get()
                done = texts if isinstance(event, Refused) else done + isinstance(event, Done)
                yield event
        finally:
            if done < texts:
                writing.add_done_callback(lambda begun: begun.exception() or begun.result().cancel())

    async def ready(self) -> bool:
        """Whether calls are answered."""
        return self.writer.loop.is_open and self.writer.loop.healthy

    def figures(self) -> Figures:
        """How it is doing."""
        return self.writer.loop.figures()

    async def drain(self, timeout_s: float | None = None) -> bool:
        """Refuses further calls, and waits for those under way; returns whether all have ended."""
        return await asyncio.to_thread(self.writer.loop.drain, timeout_s)

    def close(self) -> None:
        """Lets all calls go."""
        self.writer.close()


class _Mailbox:
    """Events from another thread, for one coroutine. It is woken once for all that came meanwhile."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._events: deque[Event] = deque()
        self._came = asyncio.Event()
        self._is_waking = False

    def put(self, event: Event) -> None:
        """From any thread."""
        self._events.append(event)
        if not self._is_waking:
            self._is_waking = True
            with suppress(RuntimeError):  # the coroutine's loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        self._is_waking = False
        self._came.set()

    async def get(self) -> Event:
        """The next event."""
        while not self._events:
            self._came.clear()
            if not self._events:
                await self._came.wait()
        return self._events.popleft()
