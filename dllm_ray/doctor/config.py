"""Settings of jobs/doctor.py. Those that jobs and cluster files have too go by the same names."""

from dataclasses import dataclass, field

from dllm_ray.errors import ConfigError
from dllm_ray.tracking import TrackingConfig


@dataclass
class TrainPlaces:
    """Where training keeps things."""

    storage_path: str | None = None
    """Where workers write checkpoints: a folder all nodes share, or s3://, gs://...; null: the output folder."""


@dataclass
class DataPlaces:
    """Where tokenized rows are kept."""

    cache_dir: str | None = None
    """Folder or URL of tokenized rows; null: they aren't kept."""


@dataclass
class EvaluatePlaces:
    """Where answers are kept."""

    cache: str | None = None
    """Folder or URL of answers that runs share; null: the output folder."""


@dataclass
class DoctorConfig:
    """Settings of jobs/doctor.py."""

    nodes: int | None = None
    """Nodes that the cluster should have; null: as many as it has."""
    output_dir: str = "outputs"
    """Folder of jobs' results. Every node must reach it where `train.storage_path` is null."""
    storage: list[str] = field(default_factory=list)
    """Further folders or URLs that every node must reach."""
    json: str | None = None
    """File to write findings and facts to, for machines."""
    timeout_s: float = 60.0
    """Longest wait for the nodes' answers to one check."""
    pair_timeout_s: float = 20.0
    """Longest wait for two nodes to reach each other."""
    max_clock_skew_s: float = 1.0
    """How far a node's clock may be off."""
    min_free_gb: float = 10.0
    """Free space, in 10^9 bytes, under which a folder or disk gets a warning."""
    train: TrainPlaces = field(default_factory=TrainPlaces)
    data: DataPlaces = field(default_factory=DataPlaces)
    evaluate: EvaluatePlaces = field(default_factory=EvaluatePlaces)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self):
        for name in ("timeout_s", "pair_timeout_s", "max_clock_skew_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"must be above 0, got {getattr(self, name)}", name)
        if not 0 <= self.min_free_gb < float("inf"):
            raise ConfigError(f"must not be negative, got {self.min_free_gb}", "min_free_gb")
        if self.nodes is not None and self.nodes < 1:
            raise ConfigError(f"must be at least 1, got {self.nodes}", "nodes")
        for name in ("output_dir", "json"):
            if getattr(self, name) == "":
                raise ConfigError("expected a path, got an empty one", name)
