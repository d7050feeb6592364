"""A server that lives through two thousand requests keeps nothing of them, and answers each as if it were alone."""

import asyncio
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass

import httpx2
import psutil
import pytest
from serving_testing import served, wait_for

from dllm_ray import chat
from dllm_ray.errors import ServerError
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.serving.app import create_app
from dllm_ray.serving.calls import Canvas, Text
from dllm_ray.serving.client import AsyncClient
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.local import LocalModel
from dllm_ray.serving.settings import AppSettings

REQUESTS = 2000
WARM_UP = 500
"""Requests after which memory is to stay as it is."""
CLIENTS = 12
OWN = SamplerConfig(max_new_tokens=12, block_size=4, steps=8)
BAD = [
    b"",
    b"{",
    b"[]",
    b"null",
    b"\xff\xfe",
    b'{"messages": 3}',
    b'{"messages": [{"role": "user"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "model": "gone"}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}',
    b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": 100000}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "diffusion": {"steps": 1, "block_size": 2}}',
    b'{"messages": [{"role": "user", "content": "a"}], "diffusion": {"cache": "all"}}',
    b'{"messages": [{"role": "user", "content": "' + b"9" * 400 + b'"}]}',
    b"[" * 50_000,
]


@dataclass(frozen=True)
class Valid:
    """A request that has an answer."""

    asked: str
    settings: dict
    stop: tuple[str, ...]
    expected: str


@pytest.fixture(scope="module")
def lm(sharp_lm):
    return sharp_lm("llama", seed=1, max_position_embeddings=128)


@pytest.fixture(scope="module")
def questions(lm) -> list[Valid]:
    """Requests with many kinds of settings, and what the sampler alone makes of them."""
    source, made = random.Random(0), []
    for number in range(48):
        settings = {
            "seed": number,
            "steps": source.choice([3, 6, 8]),
            "temperature": source.choice([0.0, 0.0, 0.7]),
            "cache": source.choice(["none", "none", "prefix", "dual"]),
            "policy": source.choice(["low_confidence", "low_confidence", "random", "entropy"]),
            "cfg_scale": source.choice([0.0, 0.0, 0.0, 1.5]),
            "max_new_tokens": source.choice([4, 12, 24]),
        }
        settings["steps"] = max(settings["steps"], settings["max_new_tokens"] // 4)
        asked = "".join(source.choices("abc 123", k=source.randrange(1, 30)))
        config = SamplerConfig(**{"block_size": 4} | settings)
        output = Sampler(lm, config).sample([chat.encode_prompt(lm.tokenizer, asked)])
        text = chat.decode(lm.tokenizer, output.completions[0], lm.spec.eot_text)
        stop = (text[len(text) // 2],) if number % 4 == 0 and text else ()
        made.append(Valid(asked, settings, stop, text.partition(stop[0])[0] if stop else text))
    assert len({question.expected for question in made}) > 24
    return made


class Soak:
    """Asks one request after the other, of a kind that is drawn, and notes what came of it."""

    def __init__(self, url: str, questions: list[Valid], seed: int = 0):
        self.url, self.questions, self.random = url, questions, random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []

    async def run(self, requests: int) -> None:
        """So many requests, of a few clients at a time."""
        kinds: dict[Callable, int] = {
            self._whole: 25,
            self._streamed: 25,
            self._left: 20,
            self._late: 10,
            self._bad: 10,
            self._huge: 5,
            self._gone: 5,
        }
        drawn = iter(self.random.choices(list(kinds), list(kinds.values()), k=requests))

        async def client() -> None:
            async with AsyncClient(self.url) as ours, httpx2.AsyncClient(base_url=self.url, timeout=60) as plain:
                for kind in drawn:
                    await kind(ours, plain)

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(client())

    def _ask(self, client: AsyncClient, question: Valid, **options):
        messages = [{"role": "user", "content": question.asked}]
        return client.chat(messages, "small", sampler=question.settings, stop=question.stop, **options)

    def _note(self, kind: str, question: Valid, text: str) -> None:
        self.seen[kind] += 1
        if text != question.expected:
            self.wrong.append(f"{kind}: {question}: {text!r}")

    async def _whole(self, client: AsyncClient, _) -> None:
        question = self.random.choice(self.questions)
        async with aclosing(self._ask(client, question, stream=False)) as pieces:
            self._note("whole", question, (await anext(pieces)).text)

    async def _streamed(self, client: AsyncClient, _) -> None:
        question, canvas = self.random.choice(self.questions), self.random.random() < 0.5
        pieces = [piece async for piece in self._ask(client, question, canvas=canvas)]
        self._note("streamed", question, pieces[-1].text)
        if canvas and not any(isinstance(piece, Canvas) for piece in pieces):
            self.wrong.append(f"no canvas: {question}")

    async def _left(self, client: AsyncClient, _) -> None:
        """A client that goes away at some time, before or after the answer begins."""
        question, stream = self.random.choice(self.questions), self.random.random() < 0.7

        async def read() -> None:
            text = ""
            async with aclosing(self._ask(client, question, stream=stream)) as pieces:
                async for piece in pieces:
                    text += piece.text if isinstance(piece, Text) else ""
                    if not question.expected.startswith(text):
                        self.wrong.append(f"left: {question}: {text!r}")

        with suppress(TimeoutError):
            async with asyncio.timeout(self.random.random() ** 2 * 0.2):
                await read()
        self.seen["left"] += 1

    async def _late(self, client: AsyncClient, _) -> None:
        """A deadline that may be too early."""
        question = self.random.choice(self.questions)
        stream, seconds = self.random.random() < 0.5, 10 ** self.random.uniform(-4, -0.5)
        try:
            pieces = [piece async for piece in self._ask(client, question, stream=stream, timeout_s=seconds)]
            self._note("in time", question, pieces[-1].text)
        except ServerError as error:
            self.seen["too late"] += 1
            if error.code != "deadline_exceeded":
                self.wrong.append(f"late: {error.status} {error}")

    async def _bad(self, _, plain: httpx2.AsyncClient) -> None:
        body = self.random.choice(BAD)
        response = await plain.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
        self._refused("bad", response, body)

    async def _huge(self, _, plain: httpx2.AsyncClient) -> None:
        async def endless() -> Iterator[bytes]:
            for _ in range(40):
                yield b" " * 100_000

        announced = self.random.random() < 0.5
        with suppress(httpx2.WriteError, httpx2.ReadError, httpx2.RemoteProtocolError):  # it need not listen to the end
            content = b" " * 2_000_000 if announced else endless()
            response = await plain.post(
                "/v1/chat/completions", content=content, headers={"Content-Type": "application/json"}
            )
            if response.status_code != 413:
                self.wrong.append(f"huge: {response.status_code} {response.text}")
        self.seen["huge"] += 1

    async def _gone(self, _, plain: httpx2.AsyncClient) -> None:
        path = self.random.choice(["/v1/nothing", "/v1/models/gone", "/page/../app.py", "/v1/chat/completions"])
        self._refused("gone", await plain.get(path), path.encode())

    def _refused(self, kind: str, response: httpx2.Response, asked: bytes) -> None:
        self.seen[kind] += 1
        if not (400 <= response.status_code < 500 and response.json()["error"]["message"]):
            self.wrong.append(f"{kind}: {asked[:80]!r}: {response.status_code} {response.text[:200]}")


@pytest.mark.slow
def test_two_thousand_mixed_requests_leave_nothing_behind_and_are_answered_as_if_alone(lm, questions):
    process = psutil.Process()
    model = LocalModel("small", lm, Limits(max_rows=8, max_new_tokens=64), OWN)

    def is_idle() -> bool:
        figures = model.figures()
        return figures.active == 0 and figures.queued == 0

    def memory() -> float:
        gc.collect()
        return process.memory_info().rss

    with served(create_app({"small": model}, AppSettings())) as url:
        soak = Soak(url, questions)
        asyncio.run(soak.run(WARM_UP))
        wait_for(is_idle)
        before, files, threads = memory(), process.num_fds(), process.num_threads()
        asyncio.run(soak.run(REQUESTS - WARM_UP))
        wait_for(is_idle)
        after = memory()
        assert soak.wrong == []
        assert {"whole", "streamed", "left", "too late", "bad", "huge", "gone"} <= set(soak.seen)
        assert sum(soak.seen.values()) == REQUESTS
        assert after <= 1.05 * before, f"{before / 2**20:.0f} -> {after / 2**20:.0f} MiB"
        assert process.num_fds() <= files + 2 and process.num_threads() <= threads + 8
    assert not model.writer.loop._active and not model.writer.loop._queues and not model.writer.loop._waiting
    model.close()
