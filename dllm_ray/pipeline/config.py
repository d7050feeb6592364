"""Settings of a pipeline: whose settings its stages take, and what a model must reach to be promoted."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from dllm_ray.config import check_seed
from dllm_ray.errors import ConfigError
from dllm_ray.pipeline.rules import Rule
from dllm_ray.tracking import TrackingConfig

_NAME = re.compile(r"[\w.-]{1,200}", re.ASCII)
_ALIAS = re.compile(r"(?!v\d+$)[\w-]{1,200}", re.ASCII)  # MLflow keeps v1, v2, ... for versions


@dataclass
class TrainStage:
    """How the model is trained."""

    job: Literal["sft", "pretrain"] = "sft"
    """The job whose settings these are."""
    config: str | None = None
    """YAML file of the job's settings; a relative path that isn't there is looked for in the repository."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that win over the file's, by dotted name: `{train.max_steps: 3000, data.path: chats.jsonl}`."""


@dataclass
class EvaluateStage:
    """What the model is asked."""

    config: str | None = None
    """YAML file of settings of jobs/evaluate.py, found as `train.config`. Its model is the one that was trained."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that win over the file's, by dotted name: `{evaluate.limit: 100}`."""


@dataclass
class ServeStage:
    """How the model is served."""

    config: str | None = None
    """YAML file of settings of jobs/serve.py, found as `train.config`. Its `model` is the promoted one; of several
    `models`, those that have the path `models:/NAME@ALIAS`."""
    set: dict[str, Any] = field(default_factory=dict)
    """Settings that win over the file's, by dotted name: `{model.replicas: 2}`."""


@dataclass
class PromoteConfig:
    """The model registry, and the rules by which a model becomes the one that is served."""

    name: str = "dllm_ray"
    """Name of the registered model; every run of the pipeline adds a version to it."""
    alias: str = "champion"
    """Alias of the version that is served."""
    rules: list[str] = field(default_factory=list)
    """All must hold for a version to get the alias: `digits/exact_match >= 0.8`, or `digits/exact_match >= champion -
    0.01` against the version that has the alias now, on the same tasks and settings (it holds where there is none). The
    name of a variant or of a suite's line may stand in front: `steps=4: digits/exact_match > champion`. Empty: every
    model is promoted."""

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ConfigError(f"expected letters, digits and . _ - (at most 200), got {self.name!r}", "name")
        if not _ALIAS.fullmatch(self.alias):
            raise ConfigError(f"expected letters, digits, _ and -, and no v1, v2, ..., got {self.alias!r}", "alias")
        self.parsed()

    def parsed(self) -> list[Rule]:
        """The rules.

        Raises:
            ConfigError: one can't be read.
        """
        return [Rule.parse(text) for text in self.rules]

    @property
    def model(self) -> str:
        """How the promoted version is called: `models:/NAME@ALIAS`."""
        return f"models:/{self.name}@{self.alias}"


@dataclass
class PipelineJob:
    """Settings of jobs/pipeline.py."""

    output_dir: str = "outputs/pipeline"
    """Folder for what stages leave and how far they are, and for the MLflow database."""
    seed: int | None = None
    """Seed of training and of evaluation; null: as their own settings say."""
    fresh: bool = False
    """Start over: train again, whatever is in `output_dir`. Versions that were registered stay."""
    deploy: bool = True
    """Serve what was promoted: on the cluster of RAY_ADDRESS, where the server of the same name is updated while it
    answers. Without a cluster the command that serves it is printed."""
    published: str | None = None
    """Published models to compare with, as `published` of jobs/compare.py."""
    train: TrainStage = field(default_factory=TrainStage)
    """Training."""
    evaluate: EvaluateStage = field(default_factory=EvaluateStage)
    """Evaluation."""
    promote: PromoteConfig = field(default_factory=PromoteConfig)
    """Registration, and the rules."""
    serve: ServeStage = field(default_factory=ServeStage)
    """Deployment."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow, of all stages: runs and model registry."""

    def __post_init__(self):
        if self.seed is not None:
            check_seed(self.seed)
