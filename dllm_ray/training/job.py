"""Settings that every training job has. Imports nothing heavy."""

from dataclasses import dataclass, field, replace

from dllm_ray.config import check_seed, section, to_dict
from dllm_ray.data.config import DataConfig
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.models.config import LoRAConfig, ModelConfig
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.sampling.config import READ_BY_EDITS, SamplerConfig
from dllm_ray.tracking import TrackingConfig
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.strategies import check


@dataclass
class ObserveConfig:
    """Looks at the model while it trains: sample texts, and a small evaluation. They are made from checkpoints, by a
    process beside the training, so that it doesn't wait."""

    every: int | None = None
    """Checkpoints between looks; null: only one at the end."""
    sample_rows: int = 8
    """Validation questions answered with the settings of `sampler`; 0: none."""
    tasks: list[str] = field(default_factory=list)
    """lm-eval tasks, as `evaluate.tasks` of jobs/evaluate.py."""
    limit: int = 64
    """Documents of each task, from the first."""
    include_path: str | None = None
    """A folder with further tasks as lm-eval YAML."""
    data_files: dict[str, str] = field(default_factory=dict)
    """Task -> file or glob of its test rows, for tasks over local data."""
    gpus: float | None = None
    """GPUs that a look reserves; null: 1 where training leaves one free, else none."""

    def __post_init__(self):
        for name, least in (("every", 1), ("sample_rows", 0), ("limit", 1), ("gpus", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"must be at least {least}, got {value}", name)

    def evaluation(self) -> EvaluateConfig | None:
        """What lm-eval is to run; None without tasks."""
        if not self.tasks:
            return None
        return EvaluateConfig(
            tasks=tuple(self.tasks), limit=self.limit, include_path=self.include_path, data_files=self.data_files
        )


@dataclass
class TrainingJob:
    """Settings of a training job."""

    output_dir: str = "outputs/train"
    """Folder for checkpoints, the trained model, and the MLflow database."""
    seed: int = 0
    """Seeds new weights, the order of the data, and the noise."""
    fresh: bool = False
    """Start over: remove the run that is in `output_dir`."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model to start from."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train a low-rank adapter in place of the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation data."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What is minimised."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The training run."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How sample texts are made, and the tasks of `observe` answered."""
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    """Sample texts and small evaluations while the model trains."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self):
        if not self.data.named:
            raise ConfigError("name the training data, e.g. --data.path train.jsonl", "data.path")
        if self.model.adapter:
            raise ConfigError("training starts from a model without adapter", "model.adapter")
        if self.model.quantization and self.lora.rank is None:
            raise ConfigError(
                "quantized weights can't be trained: train an adapter on top, e.g. --lora.rank 16", "model.quantization"
            )
        if self.model.device_map:
            raise ConfigError("each worker holds its model on its own device: use train.strategy", "model.device_map")
        if self.lora.rank is not None and self.model.path is None:
            raise ConfigError("an adapter needs a trained model under it: set model.path", "lora.rank")
        if self.objective.name == "edit_flow" and self.data.padding not in (None, "ignore"):
            raise ConfigError("edit_flow's rows have lengths of their own: leave it out, or say ignore", "data.padding")
        if self.objective.name == "edit_flow" and self.data.packing:
            raise ConfigError("edit_flow's rows change their lengths, so they can't share one", "data.packing")
        check_seed(self.seed)
        with section("sampler"):
            if self.objective.name == "edit_flow":
                self.sampler = _of_edits(self.sampler, self.model.path, self.objective.kappa)
            else:
                self.sampler.require_no_edits()
                self.sampler.blocks()
        with section("train"):
            check(self.train, self.model.quantization)
        if self.train.learning_rate is None:
            rate = 1e-3 if self.model.path is None else 2e-5
            self.train = replace(self.train, learning_rate=rate)
        scratch = self.model.scratch
        if self.model.path is None and self.train.max_length > scratch.max_position_embeddings:
            raise ConfigError(
                f"{self.train.max_length} exceeds model.scratch.max_position_embeddings "
                f"({scratch.max_position_embeddings})",
                "train.max_length",
            )


@dataclass
class SFTJob(TrainingJob):
    """Settings of jobs/sft.py."""

    output_dir: str = "outputs/sft"
    """Folder for checkpoints, the trained model, and the MLflow database."""


@dataclass
class PretrainJob(TrainingJob):
    """Settings of jobs/pretrain.py."""

    output_dir: str = "outputs/pretrain"
    """Folder for checkpoints, the trained model, and the MLflow database."""
    data: DataConfig = field(default_factory=lambda: DataConfig(format="text", padding="ignore", random_length=0.01))
    """Training and validation data."""


def _of_edits(sampler: SamplerConfig, path: str | None, kappa: str) -> SamplerConfig:
    """The settings for a model that learns to edit: without what a masked model brought along and an edited text has
    no use for, and on the objective's schedule.

    Raises:
        ConfigError: a setting of the user's own has no meaning for a model that edits.
    """
    from dllm_ray.models.defaults import sampler_settings

    defaults, given = SamplerConfig(), to_dict(sampler)
    meaningless = {}
    for name, value in (sampler_settings(path) if path else {}).items():
        if name not in READ_BY_EDITS and given.get(name) == value:
            meaningless[name] = getattr(defaults, name)
    sampler = replace(sampler, **meaningless)
    sampler.require_only_edits()
    if sampler.kappa not in (defaults.kappa, kappa):
        raise ConfigError(
            f"the model learns rates of objective.kappa {kappa}, got {sampler.kappa}: leave it out", "kappa"
        )
    return replace(sampler, kappa=kappa)
