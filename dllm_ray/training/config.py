"""Settings of a training run."""

from dataclasses import dataclass
from typing import Literal

from dllm_ray.errors import ConfigError


@dataclass
class Elastic:
    """A number of workers that follows what the cluster has."""

    min: int
    """Fewest workers to train with; below it the run waits."""
    max: int
    """Most workers."""

    def __post_init__(self):
        if not 1 <= self.min <= self.max:
            raise ConfigError(f"expected 1 <= min <= max, got min {self.min}, max {self.max}", "min")


@dataclass
class TrainConfig:
    """How long, how fast, on how many workers, and what is kept."""

    strategy: Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"] = "ddp"
    """How the model is spread over workers. ddp: a copy on each. fsdp2: weights, gradients and optimizer state in
    shards, gathered layer by layer (torch's `fully_shard`, arXiv 2304.11277). zero1, zero2, zero3: DeepSpeed ZeRO
    (arXiv 1910.02054), which shards the optimizer state, then gradients too, then weights too."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What lies in host memory between its uses. optimizer: state and update of AdamW (zero1 to zero3); all: the
    weights too (fsdp2, zero3)."""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer for the backward pass and compute the rest again: less memory, about a third
    more work."""
    workers: int | Elastic | None = None
    """Ray Train workers; null: one for each GPU of the cluster, or 2 where there is none. `{min: 1, max: 8}`: as many
    as the cluster has room for, again after a node is lost or added."""
    cpus_per_worker: float | None = None
    """CPUs each worker reserves; null: 1, or less where the cluster would have none left for data and evaluation."""
    gpus_per_worker: float | None = None
    """GPUs each worker reserves; null: 1 where the cluster has any."""
    threads_per_worker: int | None = None
    """Torch threads in each worker on a CPU; null: the machine's cores divided by the workers."""
    batch_size: int = 64
    """Rows in a step, over all workers."""
    micro_batch_size: int | None = None
    """Most rows in one forward of one worker; null: the worker's whole part of the batch. The loss doesn't change."""
    epochs: float = 3.0
    """Passes over the data; ignored when `max_steps` is set."""
    max_steps: int | None = None
    """Optimizer steps; null: as many as `epochs` takes."""
    max_length: int = 512
    """Most tokens in a row, prompt and answer together."""
    learning_rate: float | None = None
    """Peak learning rate; null: 2e-5 for a loaded model, 1e-3 for one built from scratch."""
    lr_schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Course of the learning rate after the warm-up: down to 0 along a cosine or a line, or level."""
    warmup: float = 0.05
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.01
    """AdamW weight decay of matrices; vectors (norms, biases) have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW decay rates of the first and second moment."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient; 0: no clipping."""
    precision: Literal["bf16", "float32"] = "bf16"
    """Matrix products in bfloat16 (autocast; weights stay in `model.dtype`), or everything in `model.dtype`."""
    log_every: int = 10
    """Steps between logged metrics."""
    validate_every: int | None = None
    """Steps between validations, beside one before the first step and one at the end; null: ten over the run."""
    checkpoint_every: int | None = None
    """Steps between checkpoints, beside one at the end; null: at every second validation."""
    keep_checkpoints: int = 2
    """Checkpoints kept: the best by validation nll, and always the latest."""
    on_nan: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that isn't finite leads to: the run ends and names the rows, or the step is left out."""
    max_failures: int = 3
    """Restarts from the last checkpoint after lost workers before the run is given up."""
    storage_path: str | None = None
    """Where workers write checkpoints: a folder all nodes share, or s3://, gs://...; null: the output folder."""

    def __post_init__(self):
        at_least_one = ("threads_per_worker", "batch_size", "micro_batch_size", "max_steps", "max_length")
        for name in (*at_least_one, "log_every", "validate_every", "checkpoint_every", "keep_checkpoints"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        for name in ("cpus_per_worker", "epochs", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"must be above 0, got {value}", name)
        for name in ("gpus_per_worker", "weight_decay", "clip_norm", "max_failures"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"must not be negative, got {value}", name)
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"is a share of the steps, between 0 and 1; got {self.warmup}", "warmup")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"must lie in [0, 1), got {list(self.betas)}", "betas")
        self.betas = tuple(self.betas)
        if isinstance(self.workers, int) and self.workers < 1:
            raise ConfigError(f"must be at least 1, got {self.workers}", "workers")
        most = self.workers.max if isinstance(self.workers, Elastic) else self.workers
        if most is not None and self.batch_size < most:
            raise ConfigError(f"{self.batch_size} rows can't be shared by {most} workers", "batch_size")
        if self.offload == "optimizer" and not self.strategy.startswith("zero"):
            raise ConfigError(f"optimizer offload is for zero1, zero2 and zero3, not {self.strategy}", "offload")
        if self.offload == "all" and self.strategy not in ("fsdp2", "zero3"):
            raise ConfigError(f"the weights are offloaded by fsdp2 and zero3, not {self.strategy}", "offload")
