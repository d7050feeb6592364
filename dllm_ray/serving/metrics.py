"""What a server tells Prometheus, through Ray's metrics. Names begin with `ray_dllm_` where Prometheus reads them.

Ray's metrics cost some microseconds each, and a step of a small model about a millisecond. So what steps did is added
up and told a few times a second.
"""

import threading
import time
from collections.abc import Sequence

from ray.util.metrics import Counter, Gauge, Histogram

from dllm_ray.serving.calls import Call, Done, Event, Refused, Text
from dllm_ray.serving.middleware import Served

_EVERY_S = 0.25  # how often what steps did is told
_SECONDS = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0]
_PER_TOKEN = [0.0002, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0]
_ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
_TPF = [0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32]
_PARTS = ("model",)


class RequestMetrics:
    """Of one ingress; called with each request that was answered (`create_app`)."""

    def __init__(self):
        tags = ("model", "status", "outcome")
        self._requests = Counter("dllm_requests", "HTTP requests, by status and outcome.", tag_keys=tags)
        self._seconds = Histogram("dllm_request_seconds", "Of each request to a model.", _SECONDS, tag_keys=_PARTS)
        self._first = Histogram(
            "dllm_stream_first_text_seconds",
            "From a request to the first text of its stream.",
            _SECONDS,
            tag_keys=_PARTS,
        )

    def __call__(self, served: Served) -> None:
        model = {"model": served.model or ""}
        self._requests.inc(tags=model | {"status": str(served.status), "outcome": served.outcome})
        if served.model is not None:
            self._seconds.observe(served.seconds, model)
        if served.first_text_s is not None:
            self._first.observe(served.first_text_s, model)


class ReplicaMetrics:
    """Of one replica.

    Args:
        model: the name that clients call the model by.
    """

    def __init__(self, model: str):
        tags = {"model": model}

        def made(kind, name: str, description: str, *arguments, tag_keys=_PARTS):
            metric = kind(f"dllm_{name}", description, *arguments, tag_keys=tag_keys)
            metric.set_default_tags(tags)
            return metric

        reason = ("model", "reason")
        self.calls = made(Counter, "calls", "Calls that were answered or refused, by reason.", tag_keys=reason)
        self.queued = made(Gauge, "queued_calls", "Calls that wait for room in the batch.")
        self.active = made(Gauge, "active_rows", "Texts being denoised.")
        self.rows = made(Histogram, "step_rows", "Texts in the batch of a step, averaged over some steps.", _ROWS)
        self.steps = made(Counter, "steps", "Forwards of the batch.")
        self.tokens = made(Counter, "tokens", "Tokens written.")
        self.busy = made(Counter, "busy_seconds", "Time spent in steps.")
        self.tpf = made(Histogram, "tokens_per_forward", "Of each text: tokens over the forwards it took.", _TPF)
        self.first = made(Histogram, "first_text_seconds", "From a call to the first text that is sent.", _SECONDS)
        self.whole = made(Histogram, "call_seconds", "From a call to the end of its last text.", _SECONDS)
        self.each = made(Histogram, "token_seconds", "Of each text: time over its tokens.", _PER_TOKEN)
        self._lock = threading.Lock()
        self._told = time.monotonic()
        self._sums = [0, 0, 0, 0.0]  # steps, rows, tokens, seconds since then

    def step(self, rows: int, tokens: int, seconds: float) -> None:
        """Takes note of one step of the engine."""
        with self._lock:
            sums = [before + new for before, new in zip(self._sums, (1, rows, tokens, seconds), strict=True)]
            now = time.monotonic()
            self._sums = sums
            if now - self._told < _EVERY_S:
                return
            self._sums, self._told = [0, 0, 0, 0.0], now
        steps, rows, tokens, seconds = sums
        self.steps.inc(steps)
        self.rows.observe(rows / steps)
        if tokens:
            self.tokens.inc(tokens)
        self.busy.inc(seconds)

    def load(self, queued: int, active: int) -> None:
        """Takes note of what is waiting and under way."""
        self.queued.set(queued)
        self.active.set(active)

    def answer(self, call: Call) -> "Answer":
        """Watches one call."""
        return Answer(self)


class Answer:
    """One call, as its events pass by."""

    def __init__(self, metrics: ReplicaMetrics):
        self._metrics = metrics
        self._began = time.monotonic()
        self._has_text = False
        self.reasons: list[str] = []
        """How its texts ended, or why it was refused."""
        self.nfe = 0
        self.tokens = 0

    @property
    def seconds(self) -> float:
        """Since it came."""
        return time.monotonic() - self._began

    def saw(self, events: Sequence[Event]) -> None:
        """Takes note of events that are sent."""
        for event in events:
            if isinstance(event, Text | Done) and not self._has_text:
                self._has_text = True
                self._metrics.first.observe(self.seconds)
            if isinstance(event, Done):
                self.reasons.append(event.reason)
                self.nfe += event.nfe
                self.tokens += event.completion_tokens
                if event.nfe:
                    self._metrics.tpf.observe(event.completion_tokens / event.nfe)
                if event.completion_tokens:
                    self._metrics.each.observe(event.seconds / event.completion_tokens)
            elif isinstance(event, Refused):
                self.reasons.append(event.kind)

    def end(self, texts: int) -> None:
        """Takes note of its end; fewer than `texts` endings: its client has gone."""
        if not self.reasons or (len(self.reasons) < texts and self.reasons[0] in ("stop", "length")):
            self.reasons.append("cancelled")
        self._metrics.calls.inc(tags={"reason": self.reasons[-1]})
        self._metrics.whole.observe(self.seconds)
