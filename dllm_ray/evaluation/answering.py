"""Answers to lm-eval's requests, as token ids: `LocalAnswers` asks a model in this process, `PooledAnswers` a pool of
Ray workers.

Requests are cut into slices of about equal cost, costliest first, and a slice is one batch of work. Slices follow from
the requests alone, so the answers don't depend on who gives them. Knows nothing of text, of tasks or of Ray.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import dllm_ray
from dllm_ray.answers import Answer, Progress, ended_by_stop
from dllm_ray.config import to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.cache import AnswerCache, digest
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.evaluation.likelihood import Likelihood, Pair, estimate
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler

# Of likelihoods:
_SLICE_TOKENS = 1 << 20  # most tokens that a slice sends through the model: a minute or so of a large one
_FEWEST_SLICES = 16  # so that a few long requests keep several workers busy, as long as a slice has
_SLICE_FORWARDS = 4  # this many full forwards


@dataclass
class Figures:
    """What answering took."""

    documents: int = 0
    """Requests answered."""
    asked: int = 0
    """Requests that were computed; equal ones count once."""
    from_disk: int = 0
    """Requests whose answers an earlier run had left; equal ones count once."""
    tokens: int = 0
    """Tokens written before the ends of texts."""
    nfe: int = 0
    """Forwards that written answers took part in, summed over answers."""
    forwards: int = 0
    """Noisy sequences that likelihoods sent through the model."""
    sampling_seconds: float = 0.0
    """Workers' time for written answers, divided by the workers; answers from disk bring what they took then."""
    scoring_seconds: float = 0.0
    """The same for likelihoods."""

    @property
    def seconds(self) -> float:
        """Workers' time divided by the workers."""
        return self.sampling_seconds + self.scoring_seconds

    @property
    def tpf(self) -> float:
        """Tokens per forward."""
        return self.tokens / max(self.nfe, 1)

    @property
    def tokens_per_s(self) -> float:
        """Tokens before the ends of texts per second of sampling."""
        return self.tokens / max(self.sampling_seconds, 1e-9)


class Answerer(Protocol):
    """Who answers requests; both methods keep their order."""

    figures: Figures

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Answer]:
        """Continues prompts, each with its own seed."""

    def score(
        self, pairs: Sequence[Pair], seeds: Sequence[int], groups: Sequence[Sequence[int]], sizes: Sequence[float]
    ) -> list[Likelihood]:
        """Log-likelihoods of targets, each with its own seed; `groups` and `sizes` as in `likelihood.estimate`."""


class Pool(Protocol):
    """What is needed of a `ModelPool`."""

    workers: int

    def run(self, function: Callable[..., Any], work: Sequence[tuple]) -> Iterator[tuple[int, Any, float]]:
        """Calls `function(lm, *arguments)` for each piece of work; yields (index, result, seconds) as calls finish."""


class _Unit(NamedTuple):
    """Requests that are answered together: one, or the choices of a question that are scored against each other."""

    key: str
    requests: tuple[tuple, ...]
    """(prompt, seed) each, or (prefix, target, seed, size)."""
    cost: float

    @property
    def size(self) -> int:
        return len(self.requests)


@dataclass
class _Slices:
    """The order in which units are answered."""

    most: int
    """Requests in a slice."""
    cost: float = math.inf
    """Cost of a slice."""
    even: bool = False
    """Slices are of equal cost, though they may hold more requests; else none holds more than `most`."""
    fewest: int = 1
    """Slices, where there are as many requests."""

    def plan(self, units: Sequence[_Unit], missing: Callable[[_Unit], bool]) -> list[list[_Unit]]:
        """Slices of what is missing. Those that miss all of theirs stay what they are without a cache, and with them
        the batches that a model sees in half precision; what the others miss is cut anew."""
        cut = self.cut(units)
        whole = [part for part in cut if all(map(missing, part))]
        rest = [unit for part in cut if not all(map(missing, part)) for unit in part if missing(unit)]
        return sorted(whole + self.cut(rest), key=lambda part: -sum(unit.cost for unit in part))

    def cut(self, units: Sequence[_Unit]) -> list[list[_Unit]]:
        """Slices of units of like cost, costliest first."""
        units = sorted(units, key=lambda unit: -unit.cost)  # stable: equal ones stay in order
        requests, cost = sum(unit.size for unit in units), sum(unit.cost for unit in units)
        count = max(math.ceil(requests / self.most), math.ceil(cost / self.cost), self.fewest)
        slices: list[list[_Unit]] = [[] for _ in range(min(count, len(units)))]
        done, total = 0, cost if self.even else requests
        for unit in units:
            slices[int(done * len(slices) / total)].append(unit)
            done += unit.cost if self.even else unit.size
        return [part for part in slices if part]


class _Answers(ABC):
    """What local and pooled answering share: who computes, `_run`, is theirs."""

    def __init__(
        self,
        sampler: SamplerConfig,
        likelihood: LikelihoodConfig,
        batch_size: int,
        cache: AnswerCache | None,
        on_progress: Callable[[Progress], None] | None,
        workers: int,
    ):
        self.figures = Figures()
        self._sampler, self._likelihood, self._batch_size = sampler, likelihood, batch_size
        self._cache, self._on_progress, self._workers = cache, on_progress, workers

    @abstractmethod
    def _run(self, function: Callable[..., Any], work: Sequence[tuple]) -> Iterable[tuple[int, Any, float]]:
        """As `Pool.run`."""

    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Answer]:
        """Continues prompts, each with its own seed.

        Raises:
            ConfigError: `max_new_tokens` is null, or a prompt doesn't fit the model.
        """
        new = self._sampler.max_new_tokens
        if new is None:
            raise ConfigError(
                "set it: with max_length an answer's room depends on which prompts are answered together",
                "sampler.max_new_tokens",
            )
        units = [
            _Unit(digest([list(prompt), seed]), ((list(prompt), seed),), len(prompt) + new)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        settings = {name: value for name, value in to_dict(self._sampler).items() if name != "seed"}
        slices = _Slices(self._batch_size)
        answered, took = self._answer(units, slices, _generate, self._sampler, {"sampler": settings}, Answer)
        self.figures.documents += len(units)
        self.figures.tokens += took.tokens
        self.figures.nfe += took.nfe
        self.figures.sampling_seconds += took.seconds
        return [answered[unit.key][0] for unit in units]

    def score(
        self, pairs: Sequence[Pair], seeds: Sequence[int], groups: Sequence[Sequence[int]], sizes: Sequence[float]
    ) -> list[Likelihood]:
        """Log-likelihoods of targets, each with its own seed.

        Args:
            pairs: prefix and target of each request; no target is empty.
            seeds: of each request.
            groups: places of the choices of each question; every request is in one of them. Only an adaptive estimate
                looks at them.
            sizes: what likelihoods are divided by for a ranking that is fair to long choices.
        """
        config = self._likelihood
        requests = [
            (list(prefix), list(target), seed, float(size))
            for (prefix, target), seed, size in zip(pairs, seeds, sizes, strict=True)
        ]
        together = groups if config.adaptive else [[row] for row in range(len(requests))]
        units = [self._scored([requests[row] for row in rows]) for rows in together]
        settings = {name: value for name, value in to_dict(config).items() if name != "batch_size"}
        full = sum(self._copies(target) for _, target, *_ in requests) // (config.batch_size * _SLICE_FORWARDS)
        slices = _Slices(self._batch_size, _SLICE_TOKENS, True, max(min(full, _FEWEST_SLICES), 1))
        answered, took = self._answer(units, slices, _score, config, {"likelihood": settings}, Likelihood)
        self.figures.documents += len(requests)
        self.figures.forwards += took.noisy
        self.figures.scoring_seconds += took.seconds
        found: dict[int, Likelihood] = {}
        for rows, unit in zip(together, units, strict=True):
            found |= zip(rows, answered[unit.key], strict=True)
        return [found[row] for row in range(len(requests))]

    def _scored(self, requests: list[tuple]) -> _Unit:
        """A unit whose cost is the tokens it sends through the model at most."""
        cost = sum(self._copies(target) * (len(prefix) + len(target)) for prefix, target, *_ in requests)
        # sizes count only where choices are ranked while they are scored
        known = requests if self._likelihood.adaptive else [request[:3] for request in requests]
        return _Unit(digest(known), tuple(requests), float(cost))

    def _copies(self, target: list[int]) -> int:
        """Most noisy copies of a target."""
        return min(self._likelihood.mc_num, 2 ** min(len(target), 30))

    def _answer(
        self,
        units: Sequence[_Unit],
        slices: _Slices,
        function: Callable[..., list[list[Any]]],
        config: Any,
        settings: dict[str, Any],
        form: Callable[..., Any],
    ) -> tuple[dict[str, list[Any]], Progress]:
        """Answers by units' keys, and what they took; what is on disk is not asked."""
        cache = self._cache and self._cache.under({**settings, "dllm_ray": dllm_ray.__version__})
        units = list({unit.key: unit for unit in units}.values())
        answered: dict[str, list[Any]] = {}
        now = Progress(sum(unit.size for unit in units), "generate" if form is Answer else "score")
        for unit in units if cache is not None else ():
            entry = cache.get(unit.key)
            if entry is not None:
                answered[unit.key] = [form(*values) for values in entry["answers"]]
                now = self._further(now, answered[unit.key], entry["seconds"])
        parts = slices.plan(units, lambda unit: unit.key not in answered)
        now = self._tell(replace(now, from_disk=now.done, slices=len(parts)))
        work = [([unit.requests for unit in part], config) for part in parts]
        for index, answers, took in self._run(function, work):
            part = parts[index]
            share = took / self._workers / len(part)
            answered |= zip((unit.key for unit in part), answers, strict=True)
            if cache is not None:
                cache.add(
                    {
                        unit.key: {"answers": [_values(answer) for answer in group], "seconds": share}
                        for unit, group in zip(part, answers, strict=True)
                    }
                )
            now = self._further(now, [answer for group in answers for answer in group], share * len(part))
            now = self._tell(replace(now, slices_done=now.slices_done + 1))
        self.figures.from_disk += now.from_disk
        self.figures.asked += now.requests - now.from_disk
        return answered, now

    def _further(self, now: Progress, answers: Sequence[Answer | Likelihood], seconds: float) -> Progress:
        """The progress with further answers."""
        texts = [answer for answer in answers if isinstance(answer, Answer)]
        copies = sum(answer.copies for answer in answers if not isinstance(answer, Answer))
        return replace(
            now,
            done=now.done + len(answers),
            tokens=now.tokens + sum(len(text.tokens) for text in texts),
            nfe=now.nfe + sum(text.nfe for text in texts),
            noisy=now.noisy + copies * (2 if self._likelihood.cfg_scale else 1),
            seconds=now.seconds + seconds,
        )

    def _tell(self, now: Progress) -> Progress:
        if self._on_progress is not None:
            self._on_progress(now)
        return now


class LocalAnswers(_Answers):
    """Answers from a model in this process.

    Args:
        lm: the model.
        sampler: how to denoise; each request brings its own seed.
        likelihood: how to score.
        batch_size: documents denoised together.
        on_progress: told of the progress of requests that were handed in together, from 0 on.
    """

    def __init__(
        self,
        lm: DiffusionLM,
        sampler: SamplerConfig,
        likelihood: LikelihoodConfig,
        batch_size: int,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        super().__init__(sampler, likelihood, batch_size, None, on_progress, workers=1)
        self._lm = lm

    def _run(self, function: Callable[..., Any], work: Sequence[tuple]) -> Iterable[tuple[int, Any, float]]:
        for index, arguments in enumerate(work):
            began = time.perf_counter()
            result = function(self._lm, *arguments)
            yield index, result, time.perf_counter() - began


class PooledAnswers(_Answers):
    """Answers from a pool of workers.

    Args:
        pool: the workers.
        sampler: how to denoise; each request brings its own seed.
        likelihood: how to score.
        batch_size: documents in a slice, denoised together by a worker.
        cache: finished answers of the same model (`answers.model_key`); every finished slice is added at once. None:
            nothing is kept.
        on_progress: told of the progress of requests that were handed in together, from what lies on disk on.
    """

    def __init__(
        self,
        pool: Pool,
        sampler: SamplerConfig,
        likelihood: LikelihoodConfig,
        batch_size: int,
        cache: AnswerCache | None,
        on_progress: Callable[[Progress], None] | None = None,
    ):
        super().__init__(sampler, likelihood, batch_size, cache, on_progress, pool.workers)
        self._pool = pool

    def _run(self, function: Callable[..., Any], work: Sequence[tuple]) -> Iterable[tuple[int, Any, float]]:
        return self._pool.run(function, work)


def _generate(lm: DiffusionLM, units: list[tuple[tuple, ...]], config: SamplerConfig) -> list[list[Answer]]:
    prompts = [prompt for ((prompt, _),) in units]
    output = Sampler(lm, config).sample(prompts, seeds=[seed for ((_, seed),) in units])
    ended = ended_by_stop(prompts, output, lm.spec.stop_token_ids)
    return [[answer] for answer in map(Answer, output.completions, output.row_nfe, ended)]


def _score(lm: DiffusionLM, units: list[tuple[tuple, ...]], config: LikelihoodConfig) -> list[list[Likelihood]]:
    requests = [request for unit in units for request in unit]
    starts = [0]
    for unit in units:
        starts.append(starts[-1] + len(unit))
    groups = [list(range(start, start + len(unit))) for start, unit in zip(starts, units, strict=False)]
    found = estimate(
        lm,
        [(prefix, target) for prefix, target, *_ in requests],
        config,
        [seed for _, _, seed, _ in requests],
        groups,
        [size for *_, size in requests],
    )
    return [[found[row] for row in rows] for rows in groups]


def _values(answer: Answer | Likelihood) -> list[Any]:
    return list(answer) if isinstance(answer, tuple) else list(vars(answer).values())
