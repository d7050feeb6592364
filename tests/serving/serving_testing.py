"""What the tests of serving share: a backend that follows a script, and a server in a thread."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from dllm_ray.serving.calls import Call, Canvas, Done, Event, ModelFacts, Text

FACTS = ModelFacts(
    name="fake",
    family="mdlm",
    created=1_700_000_000,
    context=4096,
    can_chat=True,
    can_infill=True,
    sampler={"policy": "low_confidence", "steps": 8, "block_size": 32, "temperature": 0.0, "cache": "none"},
)


def words(text: str) -> list[str]:
    """A text in pieces that join to it again, each beginning with its space."""
    pieces = [f" {word}" for word in text.split(" ")]
    return [pieces[0][1:], *pieces[1:]]


def answer(call: Call) -> list[Event]:
    """The usual script: text number i repeats the last message, or the prompt, with `#i`; one step commits one word."""
    said = call.messages[-1]["content"] if call.messages is not None else str(call.prompt)
    events: list[Event] = []
    for index in range(call.n):
        pieces = words(f"You said: {said} #{index}")
        text = "".join(pieces)
        for stop in call.stop:
            text = text.split(stop)[0]
        if call.canvas:
            events.append(Canvas(index, -1, len(pieces), (), (), ()))
        sent = ""
        for step, piece in enumerate(pieces):
            if call.canvas:
                events.append(Canvas(index, step, len(pieces), (step,), (piece,), (0.5,), ("write",)))
            new = text[len(sent) : len(sent) + len(piece)]
            if call.stream and new:
                events.append(Text(index, new, (new,), (0.5,)))
            sent += new
        events.append(
            Done(
                index,
                text,
                "stop",
                7,
                len(pieces),
                len(pieces),
                0.5,
                11 + index,
                tuple(words(text)),
                (0.5,) * len(words(text)),
            )
        )
    return events


class FakeBackend:
    """Answers calls by a script.

    Args:
        script: call -> its events; an exception among them is raised, a number waited for in seconds.
        pause_s: before each event.
    """

    def __init__(self, script: Callable[[Call], Sequence] = answer, pause_s: float = 0.0, facts: ModelFacts = FACTS):
        self.facts = facts
        self.script = script
        self.pause_s = pause_s
        self.calls: list[Call] = []
        self.closed: list[str] = []  # ids of calls that were closed before their last event
        self.is_ready = True

    async def generate(self, call: Call) -> AsyncIterator[Event]:
        self.calls.append(call)
        is_over = False
        try:
            for event in self.script(call):
                if self.pause_s:
                    await asyncio.sleep(self.pause_s)
                if isinstance(event, int | float):
                    await asyncio.sleep(event)
                elif isinstance(event, Exception):
                    raise event
                else:
                    yield event
            is_over = True
        finally:
            if not is_over:
                self.closed.append(call.id)

    async def ready(self) -> bool:
        return self.is_ready


@contextmanager
def served(app) -> Iterator[str]:
    """Runs an app on a free port of this machine, and gives its address: `http://127.0.0.1:PORT`."""
    config = uvicorn.Config(app, "127.0.0.1", 0, log_level="warning", timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


def wait_for(is_so: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits until something is so.

    Raises:
        AssertionError: it isn't, in all that time.
    """
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be so"
        time.sleep(0.01)
