"""What evaluations, sweeps and bulk sampling tell Prometheus (`dllm_ray.metrics`): workers and progress."""

from collections.abc import Callable

from dllm_ray.answers import Progress
from dllm_ray.metrics import Board, Labels

_SECONDS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0]
_ASKED = ("task", "setting", "kind")


class BulkMetrics(Board):
    """Of one job that asks a pool of workers.

    Args:
        labels: of the job.
    """

    def __init__(self, labels: Labels):
        super().__init__(labels, "bulk")
        self._workers = self.gauge("workers", "Workers by what they do: busy, idle or loading.", "state")
        self._last: dict[str, int] = {}
        self._lost = self.gauge("lost_workers", "Workers that died and were replaced.")
        self._lost_count = 0
        self._seconds = self.histogram("slice_seconds", "Of each slice: time it took its worker.", _SECONDS)
        self._requests = self.gauge("requests", "Requests: prompts to answer, or texts to score.", *_ASKED)
        self._done = self.gauge("requests_done", "Requests answered, those from disk included.", *_ASKED)
        self._slices = self.gauge("slices", "Slices of requests that workers are given.", *_ASKED)
        self._slices_done = self.gauge("slices_done", "Slices that workers have finished.", *_ASKED)
        self._tpf = self.gauge("tokens_per_forward", "Tokens written over the forwards they took.", *_ASKED)
        self._speed = self.gauge("tokens_per_second", "Tokens written per second, with all workers busy.", *_ASKED)
        self._nfe = self.gauge("forwards_per_answer", "Forwards that a written answer took part in.", *_ASKED)
        self._answered = self.counter("answers", "Requests answered by workers, or from disk.", *_ASKED, "source")
        self._tokens = self.counter("tokens", "Tokens written by workers.", *_ASKED)
        self._forwards = self.counter("forwards", "Forwards that written answers took part in.", *_ASKED)
        self._noisy = self.counter("noisy_sequences", "Noisy copies of texts, scored for likelihoods.", *_ASKED)
        self._lost.set(0)

    def workers(self, busy: int, idle: int, loading: int) -> None:
        """Takes note of what the pool's workers do."""
        states = {"busy": busy, "idle": idle, "loading": loading}
        if states != self._last:
            self._last = states
            for state, count in states.items():
                self._workers.set(count, state=state)

    def finished(self, seconds: float) -> None:
        """Takes note of a slice that a worker has finished."""
        self._seconds.observe(seconds)

    def lost(self) -> None:
        """Takes note of a worker that was lost."""
        self._lost_count += 1
        self._lost.set(self._lost_count)

    def answering(self, task: str, setting: str = "") -> Callable[[Progress], None]:
        """Takes note of the progress of requests.

        Args:
            task: what is asked.
            setting: name of the settings it is asked with.

        Returns:
            What is told of the progress, from its beginning on.
        """
        began = before = Progress(0)

        def tell(now: Progress) -> None:
            nonlocal began, before
            tags = {"task": task, "setting": setting, "kind": now.kind}
            if now.slices_done == 0:  # what lies on disk is no work of these workers
                began = before = now
                self._add(self._answered, now.from_disk, {**tags, "source": "disk"})
            self._add(self._answered, now.done - before.done, {**tags, "source": "workers"})
            self._add(self._tokens, now.tokens - before.tokens, tags)
            self._add(self._forwards, now.nfe - before.nfe, tags)
            self._add(self._noisy, now.noisy - before.noisy, tags)
            before = now
            self._requests.set(now.requests, **tags)
            self._done.set(now.done, **tags)
            self._slices.set(now.slices, **tags)
            self._slices_done.set(now.slices_done, **tags)
            tokens, nfe = now.tokens - began.tokens, now.nfe - began.nfe
            if nfe:
                self._tpf.set(tokens / nfe, **tags)
                self._nfe.set(nfe / (now.done - began.done), **tags)
                self._speed.set(tokens / max(now.seconds - began.seconds, 1e-9), **tags)

        return tell

    @staticmethod
    def _add(counter, amount: float, tags: dict[str, str]) -> None:
        if amount > 0:
            counter.inc(amount, tags)
