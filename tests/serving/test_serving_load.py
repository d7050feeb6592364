"""Load is what it says it is: as many at a time, as many a second, as long; and its figures are what was seen."""

import asyncio
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving_testing import FakeBackend, answer, served

from dllm_ray.errors import ConfigError
from dllm_ray.serving.app import create_app
from dllm_ray.serving.calls import Refused
from dllm_ray.serving.client import AsyncClient
from dllm_ray.serving.load import (
    LoadConfig,
    Question,
    Run,
    Timing,
    asker,
    closed_loop,
    compare,
    lengths,
    open_loop,
    questions,
)
from dllm_ray.serving.settings import AppSettings

ASKED = questions(LoadConfig(requests=12, prompt_tokens=3, new_tokens=4))


# --- what is asked


def test_questions_come_again_with_their_seed_and_are_as_long_as_asked():
    config = LoadConfig(requests=5, prompt_tokens=7, new_tokens=9, seed=3)
    made = questions(config, range(10, 20))
    assert made == questions(config, range(10, 20)) and made != questions(LoadConfig(requests=5, seed=4))
    assert len(made) == 5 and len({question.prompt for question in made}) == 5
    for question in made:
        assert len(question.prompt) == 7 and set(question.prompt) <= set(range(10, 20)) and question.new_tokens == 9
    assert all(len(question.prompt.split()) == 7 for question in questions(config))


@given(
    mean=st.floats(1, 500),
    spread=st.sampled_from([0.0, 0.5, 1.0, 1.5]),
    seed=st.integers(0, 2**31),
    room=st.none() | st.floats(1, 20),
)
def test_lengths_have_their_mean_and_their_bounds(mean, spread, seed, room):
    longest = None if room is None else max(round(mean * room), 1 + round(mean))
    drawn = lengths(np.random.default_rng(seed), 4000, mean, spread, longest)
    assert drawn.min() >= 1 and (longest is None or drawn.max() <= longest)
    if spread == 0:
        assert len(set(drawn.tolist())) == 1 and abs(drawn[0] - mean) <= 0.5 + 1e-9
    elif longest is None and mean > 20:
        # the standard error of the mean of n log-normal numbers is mean * sqrt((exp(spread^2) - 1) / n)
        assert drawn.mean() == pytest.approx(mean, rel=6 * np.sqrt(np.expm1(spread**2) / 4000))
        assert np.median(drawn) == pytest.approx(mean * np.exp(-(spread**2) / 2), rel=0.15)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"requests": 0}, "requests: must be at least 1"),
        ({"new_tokens": float("nan")}, "new_tokens: must be at least 1"),
        ({"spread": -1}, "spread: must lie between 0 and 3"),
        ({"longest": 10}, "longest: is less than a mean length"),
    ],
)
def test_loads_that_can_not_be_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LoadConfig(**settings)


# --- how it is asked


class Counting:
    """Answers after a while, and counts how many are asked at a time."""

    def __init__(self, seconds: float):
        self.seconds, self.now, self.most, self.asked, self.times = seconds, 0, 0, [], []

    async def __call__(self, question: Question) -> Timing:
        self.now += 1
        self.most = max(self.most, self.now)
        self.asked.append(question)
        self.times.append(time.perf_counter())
        await asyncio.sleep(self.seconds)
        self.now -= 1
        return Timing(self.times[-1], self.seconds, tokens=question.new_tokens)


@pytest.mark.parametrize("clients", [1, 3, 20])
def test_a_closed_loop_asks_so_many_at_a_time_and_everything_once(clients):
    ask = Counting(0.01)
    run = asyncio.run(closed_loop(ask, ASKED, clients))
    assert ask.most == min(clients, len(ASKED)) and ask.asked == ASKED and len(run.timings) == len(ASKED)
    assert run.seconds >= 0.01 * -(-len(ASKED) // clients)


def test_an_open_loop_asks_at_its_rate_whatever_is_answered():
    ask = Counting(0.5)
    run = asyncio.run(open_loop(ask, ASKED, rate=100, seed=1))
    assert ask.most == len(ASKED) and ask.asked == ASKED
    due = np.cumsum(np.random.default_rng(1).exponential(0.01, len(ASKED)))
    assert np.allclose(np.diff(ask.times), np.diff(due), atol=0.05)
    assert run.seconds >= due[-1] + 0.5


def test_times_are_those_of_the_server():
    backend = FakeBackend(pause_s=0.02)  # `answer` has a role, then words one by one

    async def measure(stream: bool) -> Run:
        async with AsyncClient(url) as client:
            ask = asker(client, "fake", {"steps": 5}, stream)
            return await closed_loop(ask, [Question("a b", 6, 3), Question((4, 5), 7, 4)], 1)

    with served(create_app({"fake": backend}, AppSettings())) as url:
        streamed, whole = asyncio.run(measure(True)), asyncio.run(measure(False))
    words, tokens, *_ = backend.calls
    assert (words.prompt, words.max_tokens, words.seed, words.sampler) == ("a b", 6, 3, {"steps": 5})
    assert (tokens.prompt, tokens.max_tokens) == ((4, 5), 7)
    assert [len(timing.texts) for timing in streamed.timings] == [5, 5]
    for timing in streamed.timings:
        assert timing.error is None and (timing.tokens, timing.prompt_tokens, timing.nfe) == (5, 7, 5)
        assert timing.texts[0] >= 0.02 and timing.texts == sorted(timing.texts)
        assert max(timing.texts[-1], 0.12) <= timing.ended < 5  # five words and the end
    assert [timing.texts for timing in whole.timings] == [[], []]
    assert whole.figures()["first_text"] is None and whole.figures()["tokens"] == 10


def test_errors_are_counted_by_status_and_the_rest_goes_on():
    def script(call):
        return [Refused("full", "later", retry_after_s=1.0)] if call.max_tokens == 2 else answer(call)

    async def measure() -> Run:
        async with AsyncClient(url) as client, AsyncClient("http://127.0.0.1:9") as nobody:
            run = await closed_loop(asker(client, "fake"), [Question("a", n, 0) for n in (1, 2, 3)], 2)
            run.add(await closed_loop(asker(nobody, "fake"), [Question("a", 1, 0)], 1))
            return run

    with served(create_app({"fake": FakeBackend(script)}, AppSettings())) as url:
        figures = asyncio.run(measure()).figures()
    assert figures["errors"] == {"429 queue_full": 1, "unreachable": 1}
    assert figures["requests"] == 4 and figures["tokens"] == 8
    assert figures["requests_per_s"] == pytest.approx(2 / figures["seconds"])


# --- what it comes to


def test_figures_are_percentiles_and_rates():
    run = Run(
        [Timing(0.0, ended=n / 100, texts=[n / 200, n / 200 + 0.25], tokens=10, nfe=5) for n in range(1, 101)], 4.0
    )
    run.add(Run([Timing(0.0, ended=99.0, error="503")], 1.0))
    figures = run.figures()
    assert (figures["tokens_per_s"], figures["requests_per_s"], figures["tpf"]) == (200.0, 20.0, 2.0)
    assert figures["end"] == pytest.approx({"p50": 0.505, "p95": 0.9505, "p99": 0.9901})
    assert figures["first_text"]["p50"] == pytest.approx(0.2525)
    assert figures["between_texts"]["p99"] == pytest.approx(0.25)
    assert figures["errors"] == {"503": 1}
    empty = Run().figures()
    assert empty["end"] is None and empty["tokens_per_s"] == 0


def test_loads_stand_beside_the_engine_and_one_client_of_the_same_settings():
    def row(load: str, amount: float, tokens_per_s: float, p99: float | None = None, **changes) -> dict:
        first = None if p99 is None else {"p50": 0.0, "p95": 0.0, "p99": p99}
        row = {"settings": "a", "load": load, "amount": amount, "stream": p99 is not None}
        return row | {"tokens_per_s": tokens_per_s, "first_text": first} | changes

    rows = [
        row("engine", 1, 100.0, settings="b"),
        row("engine", 1, 50.0),
        row("clients", 1, 40.0, 0.5),
        row("engine", 8, 200.0),
        row("clients", 8, 160.0, 1.0),
        row("clients", 8, 180.0),
        row("rate", 8, 20.0, 2.0),
    ]
    compare(rows)
    assert rows[2]["of_engine"] == 0.8 and "over_one_client" not in rows[2]
    assert (rows[4]["of_engine"], rows[4]["over_one_client"], rows[4]["first_text_over_rest"]) == (0.8, 4.0, 2.0)
    assert rows[5]["of_engine"] == 0.9 and "over_one_client" not in rows[5]
    assert "of_engine" not in rows[6] and rows[6]["first_text_over_rest"] == 4.0
