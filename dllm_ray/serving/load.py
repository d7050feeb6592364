"""Puts load on a server, and says how it bore it: throughput, latencies and errors.

A closed loop has a number of clients, each of which asks again when it is answered: it finds what the server can do. An
open loop asks at a rate, whatever the server does, as users do: it finds how long they wait.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from dllm_ray.errors import ConfigError, ServerError
from dllm_ray.serving.calls import Text

if TYPE_CHECKING:
    from dllm_ray.serving.client import AsyncClient  # its HTTP library is nothing that `--help` should pay for

# one token each in most vocabularies
# fmt: off
_WORDS = (
    "the", "of", "and", "to", "in", "that", "is", "was", "for", "it", "with", "as", "his", "on", "be", "at", "by",
    "had", "not", "are", "but", "from", "or", "have", "an", "they", "which", "one", "you", "her", "all", "there",
    "would", "their", "we", "him", "been", "has", "when", "who", "will", "more", "no", "if", "out", "so", "said",
    "what", "up",
)
# fmt: on


@dataclass
class LoadConfig:
    """What is asked of the server."""

    requests: int = 64
    """Requests of each measurement."""
    prompt_tokens: float = 48
    """Mean length of the prompts, which are random."""
    new_tokens: float = 32
    """Mean length of the answers."""
    spread: float = 0.0
    """Lengths are drawn from log-normal distributions with these means, whose logarithms have this standard deviation;
    0: all are equal. About those of conversations that people shared (ShareGPT): 1, with 161 tokens in a prompt and 338
    in an answer, the means that the paper on PagedAttention reports (arXiv 2309.06180)."""
    longest: int | None = None
    """Longer ones are drawn again; null: any length."""
    seed: int = 0
    """Seeds prompts, lengths and arrivals."""

    def __post_init__(self):
        for name in ("requests", "prompt_tokens", "new_tokens"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"must be at least 1, got {getattr(self, name)}", name)
        if not 0 <= self.spread <= 3:
            raise ConfigError(f"must lie between 0 and 3, got {self.spread}", "spread")
        if self.longest is not None and not self.longest >= max(self.prompt_tokens, self.new_tokens):
            raise ConfigError(f"is less than a mean length, got {self.longest}", "longest")


@dataclass(frozen=True)
class Question:
    """A request to come."""

    prompt: str | tuple[int, ...]
    """A text, or token ids."""
    new_tokens: int
    """Length of the answer."""
    seed: int
    """Of its draws."""


def questions(config: LoadConfig, vocabulary: Sequence[int] | None = None) -> list[Question]:
    """The requests of a measurement, the same for the same settings.

    Args:
        config: how many and how long.
        vocabulary: token ids that prompts are made of; None: prompts are words, about one for each token.
    """
    source = np.random.default_rng(config.seed)
    prompts, answers = (
        lengths(source, config.requests, mean, config.spread, config.longest)
        for mean in (config.prompt_tokens, config.new_tokens)
    )
    made = []
    for prompt, answer in zip(prompts.tolist(), answers.tolist(), strict=True):
        if vocabulary is None:
            words: str | tuple[int, ...] = " ".join(source.choice(_WORDS, prompt).tolist())
        else:
            words = tuple(source.choice(vocabulary, prompt).tolist())
        made.append(Question(words, answer, int(source.integers(2**31))))
    return made


def lengths(source: np.random.Generator, count: int, mean: float, spread: float, longest: int | None) -> np.ndarray:
    """Log-normal lengths: exp(N(log(mean) - spread^2 / 2, spread^2)), rounded, at least 1.

    Args:
        source: of the draws.
        count: how many.
        mean: of the distribution, before long ones are drawn again.
        spread: standard deviation of the logarithm.
        longest: what is longer is drawn again; None: any length.
    """

    def draw(number: int) -> np.ndarray:
        return np.exp(np.log(mean) - spread**2 / 2 + spread * source.standard_normal(number))

    drawn = draw(count)
    while longest is not None and (too_long := drawn > longest).any():
        drawn[too_long] = draw(int(too_long.sum()))
    return np.maximum(drawn.round(), 1).astype(np.int64)


@dataclass
class Timing:
    """A request that was answered or not; times in seconds from when it was sent."""

    began: float
    """By the clock of `time.perf_counter`."""
    ended: float = 0.0
    """When the answer was complete."""
    texts: list[float] = field(default_factory=list)
    """When each piece of text came."""
    tokens: int = 0
    """Tokens of the answer."""
    prompt_tokens: int = 0
    """Tokens of the prompt."""
    nfe: int = 0
    """Forwards, where the server tells."""
    error: str | None = None
    """Status and code of what went wrong."""


@dataclass
class Run:
    """A measurement."""

    timings: list[Timing] = field(default_factory=list)
    """Of each request."""
    seconds: float = 0.0
    """From the first request to the last answer."""

    def add(self, other: "Run") -> None:
        """Takes in another measurement of the same kind, made before or after this one."""
        self.timings += other.timings
        self.seconds += other.seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all answers per second."""
        return sum(timing.tokens for timing in self.timings) / max(self.seconds, 1e-9)

    def figures(self) -> dict[str, Any]:
        """Throughput; 50th, 95th and 99th percentiles, in seconds, of the time to an answer's end, to its first text,
        and between texts; and errors by status. Latencies are those of requests without an error."""
        well = [timing for timing in self.timings if timing.error is None]
        gaps = [gap for timing in well for gap in np.diff(timing.texts).tolist()]
        return {
            "requests": len(self.timings),
            "seconds": self.seconds,
            "tokens": sum(timing.tokens for timing in well),
            "tokens_per_s": self.tokens_per_s,
            "requests_per_s": len(well) / max(self.seconds, 1e-9),
            "tpf": sum(timing.tokens for timing in well) / max(sum(timing.nfe for timing in well), 1),
            "end": _percentiles([timing.ended for timing in well]),
            "first_text": _percentiles([timing.texts[0] for timing in well if timing.texts]),
            "between_texts": _percentiles(gaps),
            "errors": dict(Counter(timing.error for timing in self.timings if timing.error is not None)),
        }


async def closed_loop(ask: Callable[[Question], Awaitable[Timing]], asked: Sequence[Question], clients: int) -> Run:
    """Asks everything, `clients` questions at a time."""
    waiting = iter(asked)
    run = Run()

    async def client() -> None:
        for question in waiting:
            run.timings.append(await ask(question))

    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())
    run.seconds = time.perf_counter() - began
    return run


async def open_loop(
    ask: Callable[[Question], Awaitable[Timing]], asked: Sequence[Question], rate: float, seed: int = 0
) -> Run:
    """Asks `rate` questions per second on average, whether the earlier ones are answered or not.

    The times between them are drawn from an exponential distribution, so that they arrive as a Poisson process.
    """
    waits = np.random.default_rng(seed).exponential(1 / rate, len(asked))
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for question, due in zip(asked, np.cumsum(waits).tolist(), strict=True):
            await asyncio.sleep(began + due - time.perf_counter())
            tasks.append(group.create_task(ask(question)))
    return Run([task.result() for task in tasks], time.perf_counter() - began)


def asker(
    client: "AsyncClient", model: str, sampler: Mapping[str, Any] | None = None, stream: bool = True
) -> Callable[[Question], Awaitable[Timing]]:
    """What asks a question, and takes the times.

    Args:
        client: of the server.
        model: the model's name.
        sampler: changes to its sampler settings.
        stream: ask for texts while they are written.
    """
    from dllm_ray.serving.client import Answer

    async def ask(question: Question) -> Timing:
        changes = dict(sampler or {}) | {"max_new_tokens": question.new_tokens, "seed": question.seed}
        prompt = question.prompt if isinstance(question.prompt, str) else list(question.prompt)
        timing = Timing(time.perf_counter())
        try:
            async for piece in client.complete(prompt, model, sampler=changes, stream=stream):
                if isinstance(piece, Text):
                    timing.texts.append(time.perf_counter() - timing.began)
                elif isinstance(piece, Answer):
                    timing.tokens = piece.completion_tokens or 0
                    timing.prompt_tokens = piece.prompt_tokens or 0
                    timing.nfe = piece.nfe or 0
        except ServerError as error:
            timing.error = " ".join(map(str, filter(None, (error.status, error.code)))) or "unreachable"
        timing.ended = time.perf_counter() - timing.began
        return timing

    return ask


def compare(figures: Sequence[dict[str, Any]]) -> None:
    """Adds to each of some measurements what it is beside the others of the same settings.

    Args:
        figures: of `Run.figures`, with `settings` (a name), `load` (engine, clients or rate), `amount` (rows in the
            engine's batch, clients, or requests per second) and `stream`. Added are `of_engine`, its tokens per second
            over those of an engine with as many rows; `over_one_client`, the same over those of one client; and
            `first_text_over_rest`, the 99th percentile of its times to the first text over that of one client.
    """

    def find(**which: Any) -> dict[str, Any] | None:
        return next((item for item in figures if which.items() <= item.items()), None)

    for item in figures:
        if item["load"] == "engine":
            continue
        alone = find(settings=item["settings"], load="engine", amount=item["amount"])
        rest = find(settings=item["settings"], load="clients", amount=1, stream=item["stream"])
        if alone is not None and item["load"] == "clients":
            item["of_engine"] = item["tokens_per_s"] / max(alone["tokens_per_s"], 1e-9)
        if rest is not None and rest is not item:
            item["over_one_client"] = item["tokens_per_s"] / max(rest["tokens_per_s"], 1e-9)
            if item["first_text"] and rest["first_text"]:
                item["first_text_over_rest"] = item["first_text"]["p99"] / rest["first_text"]["p99"]


def _percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """None where there are no values."""
    if not values:
        return None
    return dict(zip(("p50", "p95", "p99"), np.percentile(values, (50, 95, 99)).tolist(), strict=True))
