"""What jobs tell Prometheus, through Ray's metrics. Names begin with `ray_dllm_` where Prometheus reads them.

Ray passes a gauge on once, and forgets it some seconds later. What a job says of itself holds until it says otherwise,
so a `Board` repeats its values for as long as the job runs. Telling costs some microseconds; drivers do it, and no step
of training or sampling.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from ray.util.metrics import Counter, Gauge, Histogram

_REPEAT_S = 0.5  # a cluster may be set to pass metrics on every second; left to itself it does so every ten


@dataclass(frozen=True)
class Labels:
    """What a job's metrics are told apart by."""

    command: str
    """`sft`, `evaluate`, ...; the word `job` is Prometheus' own."""
    run: str
    """Name of its MLflow run."""
    model: str
    """Path or hub id, or `scratch:` and the architecture."""


class Board:
    """The metrics of one job in this process; a context manager.

    Args:
        labels: tags of all metrics.
        prefix: what their names begin with, after `dllm_`.
    """

    def __init__(self, labels: Labels, prefix: str):
        self._tags = dict(vars(labels))
        self._prefix = prefix
        self._standing: list[Standing] = []
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._repeat, name=f"metrics of {prefix}", daemon=True)
        self._thread.start()

    def gauge(self, name: str, description: str, *tags: str) -> "Standing":
        """A value that stands until it is set anew; `tags` are those it has beside the labels."""
        standing = Standing(self._made(Gauge, name, description, tags=tags))
        self._standing.append(standing)
        return standing

    def counter(self, name: str, description: str, *tags: str) -> Counter:
        """A sum."""
        return self._made(Counter, name, description, tags=tags)

    def histogram(self, name: str, description: str, bounds: Sequence[float], *tags: str) -> Histogram:
        """Values by size."""
        return self._made(Histogram, name, description, list(bounds), tags=tags)

    def close(self) -> None:
        """Falls silent; Prometheus sees the values end some seconds later."""
        self._closed.set()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def _made(self, kind, name: str, description: str, *arguments, tags: tuple[str, ...]):
        metric = kind(f"dllm_{self._prefix}_{name}", description, *arguments, tag_keys=(*self._tags, *tags))
        metric.set_default_tags(self._tags)
        return metric

    def _repeat(self) -> None:
        while not self._closed.wait(_REPEAT_S):
            for standing in tuple(self._standing):
                standing.repeat()


class Standing:
    """A gauge whose values stand until they are set anew."""

    def __init__(self, gauge: Gauge):
        self._gauge = gauge
        self._values: dict[tuple[tuple[str, str], ...], float] = {}
        self._lock = threading.Lock()

    def set(self, value: float, **tags: str) -> None:
        """Tells a value, from now on."""
        with self._lock:
            self._values[tuple(tags.items())] = float(value)
            self._gauge.set(float(value), tags)

    def repeat(self) -> None:
        """Tells what was told last."""
        with self._lock:
            for tags, value in self._values.items():
                self._gauge.set(value, dict(tags))
