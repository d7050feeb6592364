"""Calls to a backend as one HTTP answer: whole, or a stream of server-sent events. A client that leaves ends them."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from dllm_ray.serving.backend import Backend
from dllm_ray.serving.calls import Call, Event, Text
from dllm_ray.serving.errors import ApiError
from dllm_ray.serving.middleware import Served, served
from dllm_ray.serving.replies import Reply

LOGGER = logging.getLogger("dllm_ray.serving")

_GRACE_S = 1.0  # a backend keeps deadlines by itself; one that doesn't is given up after this
_FIRST_S = 2.0  # a stream begins after this even if there is nothing to send yet; before, errors have their own status
_PIECE = 64 * 1024  # bytes after which a piece of a stream is sent even if more is there
_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
_COMMENT = b": still at it\n\n"


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class Events:
    """The events of several calls, as they come.

    Args:
        backend: asked all of the calls at once.
        calls: whose events are told apart by their number.
    """

    def __init__(self, backend: Backend, calls: tuple[Call, ...]):
        self._queue: asyncio.Queue[tuple[int, Event | Exception | None]] = asyncio.Queue()
        self._open = len(calls)
        self._tasks = [asyncio.create_task(self._pump(number, backend, call)) for number, call in enumerate(calls)]

    async def next(self, seconds: float) -> tuple[int, Event] | None:
        """The next event with its call's number; None: there are no more.

        Raises:
            TimeoutError: none came in so many seconds.
            Exception: what the backend raised.
        """
        while self._open:
            if self._queue.empty():
                async with asyncio.timeout(max(seconds, 0)):
                    number, event = await self._queue.get()
            else:
                number, event = self._queue.get_nowait()
            if isinstance(event, Exception):
                raise event
            if event is not None:
                return number, event
            self._open -= 1
        return None

    @property
    def has_more(self) -> bool:
        """Whether `next` returns at once."""
        return not self._queue.empty()

    async def aclose(self) -> None:
        """Cancels the calls that are not finished."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _pump(self, number: int, backend: Backend, call: Call) -> None:
        end: Exception | None = None
        try:
            async with aclosing(backend.generate(call)) as events:
                async for event in events:
                    self._queue.put_nowait((number, event))
        except Exception as error:
            end = error
        self._queue.put_nowait((number, end))


class Answer(Response):
    """What a route returns: it asks the backend when it is to be sent.

    Args:
        backend: the model.
        reply: what is made of its events.
        keepalive_s: between comments of a stream that has nothing to send.
    """

    def __init__(self, backend: Backend, reply: Reply, keepalive_s: float):
        super().__init__()
        self._backend = backend
        self._reply = reply
        self._keepalive_s = keepalive_s
        self._end = max(call.deadline for call in reply.asked.calls) + _GRACE_S
        self._is_sent = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = served(scope)
        answer = self._stream if self._reply.asked.stream else self._whole

        async def watched_send(message: Message) -> None:
            # Servers tell of a disconnect also when all is sent.
            self._is_sent = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        try:
            await self._while_connected(answer(scope, receive, watched_send, record), receive)
        except ClientLeft:
            record.outcome = "cancelled"
        except ApiError as error:
            record.outcome = error.code
            await error.response()(scope, receive, send)
        finally:
            usage = self._reply.usage()
            record.prompt_tokens, record.completion_tokens = usage["prompt_tokens"], usage["completion_tokens"]
            record.nfe = usage["diffusion"]["nfe"]

    async def _whole(self, scope: Scope, receive: Receive, send: Send, record: Served) -> None:
        async with aclosing(Events(self._backend, self._reply.asked.calls)) as events:
            while not self._reply.is_complete:
                await self._take(events, record, self._left())
        await JSONResponse(self._reply.body())(scope, receive, send)

    async def _stream(self, scope: Scope, receive: Receive, send: Send, record: Served) -> None:
        async with aclosing(Events(self._backend, self._reply.asked.calls)) as events:
            first = await self._take(events, record, min(_FIRST_S, self._left()))
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM})
            # A client that stops reading holds what waits for it in memory, so it is left at the end of its time.
            with suppress(TimeoutError):
                async with asyncio.timeout(self._left() + _GRACE_S):
                    async for piece in self._pieces(events, first, record):
                        await send({"type": "http.response.body", "body": piece, "more_body": True})
                    await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pieces(self, events: Events, first: list[dict] | None, record: Served) -> AsyncIterator[bytes]:
        """The stream, in pieces to be sent: all that is there, as often as there is something. What goes wrong now is
        told as an event, and ends it.
        """
        piece = _told(self._reply.opening()) + (_COMMENT if first is None else _told(first))
        try:
            while not self._reply.is_complete:
                if piece and (not events.has_more or len(piece) > _PIECE):
                    yield piece
                    piece = b""
                chunks = await self._take(events, record, min(self._keepalive_s, self._left()))
                piece += _COMMENT if chunks is None else _told(chunks)
            piece += _told(self._reply.closing()) + b"data: [DONE]\n\n"
        except ApiError as error:
            record.outcome = error.code
            piece += _event(error.body())
        except Exception:
            LOGGER.exception(json.dumps({"request_id": record.request_id, "error": "a defect in a stream"}))
            record.outcome = "internal_error"
            piece += _event(ApiError(500, "a defect of the server").body())
        yield piece

    async def _take(self, events: Events, record: Served, seconds: float) -> list[dict[str, Any]] | None:
        """The chunks of the next event; None: none came in so many seconds.

        Raises:
            ApiError: the request can't be answered.
        """
        try:
            found = await events.next(seconds)
        except TimeoutError:
            if self._left() > 0:
                return None
            raise ApiError(504, "there was not enough time for the answer") from None
        if found is None:
            raise ApiError(503, "the model stopped answering: try again")
        number, event = found
        if record.first_text_s is None and isinstance(event, Text):
            record.first_text_s = time.perf_counter() - record.began
        return self._reply.take(number, event)

    async def _while_connected(self, answer: Awaitable[None], receive: Receive) -> None:
        """Runs a task for as long as its client is there.

        Raises:
            ClientLeft: it isn't.
        """
        task = asyncio.ensure_future(answer)
        watch = asyncio.create_task(_left_by(receive))
        try:
            await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done() and not self._is_sent:
                raise ClientLeft
            await task
        finally:
            task.cancel()
            watch.cancel()
            await asyncio.gather(task, watch, return_exceptions=True)

    def _left(self) -> float:
        return self._end - time.time()


async def _left_by(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _told(chunks: list[dict[str, Any]]) -> bytes:
    return b"".join(map(_event, chunks))


def _event(data: dict[str, Any]) -> bytes:
    """A server-sent event. JSON has no line break, so one line of it is enough."""
    return b"data: " + _JSON.encode(data).encode() + b"\n\n"
