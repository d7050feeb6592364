"""Answers a task's documents under any sampler settings: one process with lm-eval, in front of one pool of workers that
hold the model. Trials ask it, several at a time; no model is loaded again, and no answer that is on disk asked twice.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dllm_ray.bulk_metrics import BulkMetrics
from dllm_ray.cluster import Shares
from dllm_ray.config import read, to_dict
from dllm_ray.evaluation import report
from dllm_ray.evaluation.asking import Asker
from dllm_ray.evaluation.cache import digest
from dllm_ray.evaluation.suite import Ask
from dllm_ray.metrics import Labels
from dllm_ray.models.config import ModelConfig
from dllm_ray.output import writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sharing import SharedPool
from dllm_ray.tuning.answered import Answered
from dllm_ray.tuning.scores import per_document
from dllm_ray.workers import ModelPool


@dataclass(frozen=True)
class Budget:
    """How much may be asked."""

    until: float | None = None
    """Time (`time.time()`) at which answering ends; None: no limit."""
    documents: int | None = None
    """Documents answered, those from disk not counted, after which no further ones are begun; None: no limit."""


class _Spent(Exception):
    """The budget is."""


class Judge:
    """Asks a task under settings. Its methods may be called from several threads.

    Args:
        model: what the workers hold.
        shares: how many workers, and what each reserves.
        threads: torch threads of each worker on a CPU.
        ask: the task, and how it is asked apart from the sampler's settings.
        seed: of requests and few-shot examples.
        cache: folder or URI of finished answers.
        score: metric and filter that settings are compared by.
        budget: how much may be asked.
        facts: what results depend on beside settings, for their files.
        labels: of the sweep's metrics.
    """

    def __init__(
        self,
        model: ModelConfig,
        shares: Shares,
        threads: int | None,
        ask: Ask,
        seed: int,
        cache: str,
        score: tuple[str, str],
        budget: Budget,
        facts: Mapping[str, Any],
        labels: Labels,
    ):
        self._metrics = BulkMetrics(labels)
        self._models = ModelPool(model, shares, threads, self._metrics)
        self._pool = SharedPool(self._models)
        self._busy_s = 0.0
        self._asker = Asker(model, seed)
        self._ask, self._cache, self._score, self._budget, self._facts = ask, cache, score, budget, facts
        self._asked = 0
        self._harness = threading.RLock()  # lm-eval and tasks know one evaluation at a time
        self._settings: dict[str, threading.Lock] = defaultdict(threading.Lock)  # nobody asks what is being asked

    def answer(self, settings: Mapping[str, Any], documents: range, folder: str, name: str) -> Answered | None:
        """Answers documents under settings.

        Args:
            settings: of the sampler, all of them.
            documents: places of the documents of each task.
            folder: where results are written.
            name: what the settings are called.

        Returns:
            None: the budget is spent.

        Raises:
            DllmRayError: settings don't work, or a worker met an error.
        """
        sampler = read(SamplerConfig, settings, "sampler")
        ask = replace(self._ask, name=name, sampler=sampler)
        self._asker.check(ask)
        key = digest(to_dict(sampler))
        with self._harness:
            lock = self._settings[key]
        with lock, self._harness:
            if self._spent(begun=False):
                return None
            pool = _Turns(self._pool, self._harness, self._count, lambda: self._spent(begun=True))
            try:
                tell = self._metrics.answering(",".join(ask.evaluate.tasks), name)
                results, figures = self._asker.ask(ask, pool, self._cache, documents, tell)
            except _Spent:
                return None
            metric, way = self._score
            scores = per_document(results, metric, way)
            unique = max(figures["asked"] + figures["from_disk"], 1)  # equal requests are answered once
            answered = Answered(
                scores=scores,
                tpf=figures["tpf"],
                tokens_per_s=figures["tokens_per_s"],
                nfe=figures["nfe"] / unique,
                asked=int(figures["asked"]),
                seconds=figures["seconds"],
                truncated=int(figures["truncated_prompts"]),
            )
            place = writable_folder(folder)
            report.write(place, ask, results, figures, self._facts)
            answered.write(place)
            return answered

    def work(self) -> tuple[int, float]:
        """Documents answered so far, those from disk not counted, and the workers' time for them, divided by the
        workers."""
        return self._asked, self._busy_s / self._pool.workers

    def close(self) -> None:
        """Ends the workers."""
        self._models.close()
        self._metrics.close()

    def _count(self, requests: int, seconds: float) -> None:
        self._asked += requests
        self._busy_s += seconds

    def _spent(self, begun: bool) -> bool:
        """Whether the budget is; documents are counted when settings, or more documents of theirs, are begun."""
        if self._budget.until is not None and time.time() >= self._budget.until:
            return True
        return not begun and self._budget.documents is not None and self._asked >= self._budget.documents


class _Turns:
    """A pool that lets others use the harness while its caller waits for answers."""

    def __init__(
        self, pool: SharedPool, lock: threading.RLock, count: Callable[[int, float], None], spent: Callable[[], bool]
    ):
        self.workers = pool.workers
        self._pool, self._lock, self._count, self._spent = pool, lock, count, spent

    def run(self, function: Callable[..., Any], work: Sequence[tuple]) -> Iterator[tuple[int, Any, float]]:
        finished = self._pool.run(function, work)
        try:
            for _ in work:
                if self._spent():
                    raise _Spent
                self._lock.release()
                try:
                    index, result, seconds = next(finished)
                finally:
                    self._lock.acquire()
                self._count(len(work[index][0]), seconds)
                yield index, result, seconds
        finally:
            finished.close()
