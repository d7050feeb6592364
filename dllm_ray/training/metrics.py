"""What a training run tells Prometheus (`dllm_ray.metrics`), from what its workers report to the driver anyway."""

from collections.abc import Mapping, Sequence
from typing import Any

from dllm_ray.metrics import Board

_VALUES = {
    "train/loss": ("loss", "Loss of the last step that was logged.", 1.0),
    "train/nll": ("nll", "Weighted cross-entropy per target token, in nats.", 1.0),
    "train/grad_norm": ("gradient_norm", "Norm of the gradient before clipping.", 1.0),
    "train/learning_rate": ("learning_rate", "Learning rate.", 1.0),
    "train/epoch": ("epoch", "Passes over the data that were begun before this one.", 1.0),
    "train/peak_memory_gb": ("peak_memory_bytes", "Most memory that the first worker has held at once.", 1e9),
    "train/tokens_per_s": ("tokens_per_second", "Tokens without padding per second, of all workers.", 1.0),
    "train/data_wait": ("data_wait_ratio", "Share of the time spent waiting for data.", 1.0),
    "valid/nll": ("valid_nll", "Negative ELBO per target token over the validation rows, in nats.", 1.0),
}
"""What workers report -> name, description, and what it is multiplied by."""


class TrainMetrics:
    """Of one run.

    Args:
        board: `train` metrics of the job.
        steps: steps of the whole run.
    """

    def __init__(self, board: Board, steps: int):
        self._values = {
            key: (board.gauge(name, description), factor) for key, (name, description, factor) in _VALUES.items()
        }
        self._step = board.gauge("step", "Steps done.")
        self._workers = board.gauge("workers", "Training workers.")
        self._starts = board.gauge("starts", "Times that workers were started: the first time, and after failures.")
        self._checkpoints = board.gauge("checkpoints", "Checkpoints saved since the job began.")
        self._checkpoint_step = board.gauge("checkpoint_step", "Step of the last checkpoint.")
        self._skipped = board.gauge("skipped_steps", "Steps left out, as their gradient wasn't finite.")
        self._tokens = board.gauge("source_tokens", "Tokens that a source of data gave to the run.", "source")
        self._counts = dict.fromkeys(("start", "checkpoint", "not_finite"), 0)
        board.gauge("planned_steps", "Steps of the whole run.").set(steps)
        self._checkpoints.set(0)
        self._skipped.set(0)

    def on_events(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Takes note of events of `dllm_ray.training.trainer`."""
        for event in events:
            kind = event["kind"]
            if kind in self._counts:
                self._counts[kind] += 1
            for key, value in event.get("values", {}).items():
                if key in self._values:
                    gauge, factor = self._values[key]
                    gauge.set(value * factor)
            if kind in ("start", "metrics"):
                self._step.set(event["step"])
            if kind == "start":
                self._workers.set(event["workers"])
                self._starts.set(self._counts[kind])
            elif kind == "checkpoint":
                self._checkpoints.set(self._counts[kind])
                self._checkpoint_step.set(event["step"])
                for source, (_, tokens) in event["given"].items():
                    self._tokens.set(tokens, source=source)
            elif kind == "not_finite":
                self._skipped.set(self._counts[kind])
