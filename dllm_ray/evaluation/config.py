"""Settings of an evaluation."""

from dataclasses import dataclass, field
from typing import Any

from dllm_ray.errors import ConfigError


@dataclass
class EvaluateConfig:
    """What is asked, and who answers."""

    tasks: tuple[str, ...] = ("digits",)
    """lm-eval tasks or groups by name: those of `dllm_ray/evaluation/tasks`, of `include_path`, and lm-eval's own."""
    include_path: str | None = None
    """A folder with further tasks as lm-eval YAML."""
    data_files: dict[str, str] = field(default_factory=dict)
    """Task -> file or glob of its test rows, for tasks over local data, e.g. `{gsm8k_file: test.jsonl}`."""
    limit: int | None = None
    """Documents of each task, from the first; null: all."""
    num_fewshot: int | None = None
    """Solved examples before each question; null: as the task says."""
    chat_template: bool = True
    """Ask as a user's message in the model's chat template; off: the bare text."""
    workers: int | None = None
    """Ray workers that hold the model; null: one for each GPU of the cluster, or 2 where there is none."""
    cpus_per_worker: float | None = None
    """CPUs each worker reserves; null: 1, or less on a small cluster."""
    gpus_per_worker: float | None = None
    """GPUs each worker reserves; fractions share a GPU; null: 1 where the cluster has any."""
    threads_per_worker: int | None = None
    """Torch threads in each worker on a CPU; null: the machine's cores divided by the workers."""
    variants: list[dict[str, Any]] = field(default_factory=list)
    """Further sampler settings to ask the same with, as changes to `sampler`, e.g. `[{steps: 4}, {steps: 2}]`."""
    batch_size: int = 64
    """Documents denoised together by a worker; they go to workers in slices of this size."""

    def __post_init__(self):
        self.tasks = tuple(self.tasks)
        if not self.tasks:
            raise ConfigError("name at least one task", "tasks")
        for name in ("limit", "workers", "threads_per_worker", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        for name in ("num_fewshot", "gpus_per_worker"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ConfigError(f"must not be negative, got {value}", name)
