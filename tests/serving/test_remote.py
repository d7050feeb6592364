"""A model behind a handle of Serve: lost replicas are asked again where nobody can tell, and never else."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from dllm_ray.serving.calls import Call, Done, ModelFacts, Refused, Text
from dllm_ray.serving.remote import RemoteModel

DONE = Done(0, "hello", "stop", 3, 5, 5, 0.1, 7)
LOST = RayActorError()
LEAVING = [Refused("draining", "going away")]
FACTS = ModelFacts("it", "mdlm", 1, 64, True, True, {"steps": 4})


class Handle:
    """A handle whose replica does what a script says: for each time it is asked, messages, an error, or a wait."""

    def __init__(self, *script: Sequence):
        self.script = list(script)
        self.asked: list[tuple[str, tuple]] = []
        self.cancelled = 0

    def options(self, method_name: str, stream: bool = False) -> "Method":
        return Method(self, method_name, stream)


class Method:
    def __init__(self, handle: Handle, name: str, stream: bool):
        self.handle, self.name, self.stream = handle, name, stream

    def remote(self, *arguments) -> "Response":
        self.handle.asked.append((self.name, arguments))
        return Response(self.handle, self.handle.script.pop(0))


class Response:
    def __init__(self, handle: Handle, steps: Sequence):
        self.handle, self.steps = handle, steps

    def cancel(self) -> None:
        self.handle.cancelled += 1

    def __await__(self):
        return anext(aiter(self)).__await__()

    async def __aiter__(self) -> AsyncIterator:
        for step in self.steps:
            if isinstance(step, Exception):
                raise step
            if isinstance(step, float):
                await asyncio.sleep(step)
            else:
                yield step


def ask(handle: Handle, room: int = 8, **call) -> list:
    """The events of one call."""

    async def collect() -> list:
        return [event async for event in RemoteModel("it", handle, room).generate(Call("id", prompt="x", **call))]

    return asyncio.run(collect())


def test_a_call_that_is_not_streamed_is_one_message():
    handle = Handle([[DONE]])
    assert ask(handle) == [DONE]
    assert [name for name, _ in handle.asked] == ["answer"]


def test_a_stream_is_passed_on_in_order():
    first, second = Text(0, "hel"), Text(0, "lo")
    assert ask(Handle([[first], [second, DONE]]), stream=True) == [first, second, DONE]


def test_a_lost_replica_is_not_seen_where_nothing_was_sent():
    assert ask(Handle([LOST], [[DONE]])) == [DONE]
    assert ask(Handle([LOST], [[Text(0, "hello")], [DONE]]), stream=True) == [Text(0, "hello"), DONE]


def test_a_replica_that_leaves_is_not_seen_either():
    assert ask(Handle([LEAVING], [[DONE]])) == [DONE]


def test_a_stream_that_has_begun_ends_with_what_happened_and_is_not_asked_again():
    handle = Handle([[Text(0, "hel")], LOST])
    first, last = ask(handle, stream=True)
    assert first == Text(0, "hel")
    assert (last.kind, last.retry_after_s) == ("draining", 1.0)
    assert len(handle.asked) == 1


def test_a_call_is_asked_twice_at_most():
    handle = Handle([LOST], [LOST], [[DONE]])
    (refused,) = ask(handle)
    assert refused.kind == "draining"
    assert len(handle.asked) == 2


def test_a_replica_that_leaves_at_the_second_attempt_is_told():
    (refused,) = ask(Handle([LOST], [LEAVING]))
    assert refused == LEAVING[0]


def test_a_model_without_replicas_is_unavailable():
    (refused,) = ask(Handle([DeploymentUnavailableError("it")]))
    assert refused.kind == "draining"
    assert "it" not in refused.message.split()  # nothing of Serve's own words


def test_more_calls_than_all_replicas_take_are_refused_without_asking():
    async def crowd() -> tuple[list, list, list, int]:
        handle = Handle([0.05, [DONE]], [[DONE]])
        model = RemoteModel("it", handle, room=1)

        async def one() -> list:
            return [event async for event in model.generate(Call("id", prompt="x"))]

        first = asyncio.create_task(one())
        await asyncio.sleep(0.01)
        refused = await one()
        asked = len(handle.asked)
        return await first, refused, await one(), asked

    first, (refused,), after, asked = asyncio.run(crowd())
    assert (first, after) == ([DONE], [DONE])
    assert (refused.kind, asked) == ("full", 1)
    assert refused.retry_after_s > 0


def test_a_closed_stream_is_cancelled_and_gives_its_place_back():
    async def leave() -> tuple[int, list]:
        handle = Handle([[Text(0, "hel")], 10.0, [DONE]], [[DONE]])
        model = RemoteModel("it", handle, room=1)
        events = model.generate(Call("id", prompt="x", stream=True))
        await anext(events)
        await events.aclose()
        return handle.cancelled, [event async for event in model.generate(Call("next", prompt="x"))]

    assert asyncio.run(leave()) == (1, [DONE])


def test_a_cancelled_wait_is_cancelled_at_the_replica():
    async def leave(stream: bool) -> int:
        handle = Handle([10.0, [DONE]])
        events = RemoteModel("it", handle, room=1).generate(Call("id", prompt="x", stream=stream))
        waiting = asyncio.create_task(anext(events))
        await asyncio.sleep(0.01)
        waiting.cancel()
        await asyncio.wait({waiting})
        return handle.cancelled

    assert asyncio.run(leave(stream=False)) == 1
    assert asyncio.run(leave(stream=True)) == 1


def test_facts_are_those_that_a_replica_tells_and_it_is_ready_then():
    async def watch() -> tuple[bool, bool, ModelFacts]:
        model = RemoteModel("it", Handle([LOST], [FACTS]), room=1)
        before = await model.ready()
        model.watch()
        async with asyncio.timeout(10):
            while not await model.ready():
                await asyncio.sleep(0.01)
        return before, await model.ready(), model.facts

    assert asyncio.run(watch()) == (False, True, FACTS)
