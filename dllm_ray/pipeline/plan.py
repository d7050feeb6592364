"""What a pipeline's settings come to: the jobs of its stages with all their settings, checked before anything runs."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dllm_ray.cluster_file import ClusterFile
from dllm_ray.config import flatten, load_yaml, parse, section, to_dict, without_secrets
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.job import EvaluateJob
from dllm_ray.models.defaults import sampler_settings
from dllm_ray.pipeline.config import EvaluateStage, PipelineJob, ServeStage, TrainStage
from dllm_ray.serving.config import ServeConfig
from dllm_ray.tracking import TrackingConfig, resolved
from dllm_ray.training.job import PretrainJob, SFTJob, TrainingJob
from dllm_ray.training.run_folder import FINAL

T = TypeVar("T")
Stage = TrainStage | EvaluateStage | ServeStage

_TRAININGS = {"sft": SFTJob, "pretrain": PretrainJob}


class Plan:
    """The stages' jobs.

    Args:
        job: the pipeline's settings.
        output_dir: its folder.
        repository: where files of settings are looked for that aren't in the working directory.

    Raises:
        ConfigError: a stage's settings can't be read, or can't be; the stage is named.
    """

    def __init__(self, job: PipelineJob, output_dir: Path, repository: Path):
        self.job = job
        self.folder = output_dir
        self.repository = repository
        self.tracking: TrackingConfig = resolved(job.tracking, output_dir)
        """The store of all runs."""
        self.rules = job.promote.parsed()
        self.model = output_dir / "train" / FINAL
        """Where the trained model will be."""
        self.training: TrainingJob = self._training()
        self.serving: ServeConfig = self._serving()
        self.evaluation()

    def evaluation(self) -> EvaluateJob:
        """The evaluation of the trained model; as long as it isn't there, without sampler settings of its own."""
        stage = self.job.evaluate
        forced = {"model.path": str(self.model), "plan": False, **self._forced("evaluate")}

        def sampler(given: Mapping[str, Any]) -> dict[str, Any]:
            return sampler_settings(given["model.path"])

        return self._read(EvaluateJob, "evaluate", stage, forced, {"sampler": sampler})

    def label(self, stage: str) -> TrackingConfig:
        """The store, with a name for the run of a stage."""
        return replace(self.tracking, run_name=f"{self.tracking.run_name or self.folder.name} {stage}")

    def serve_command(self) -> str:
        """The command that serves the promoted model, without a cluster."""
        stage = self.job.serve
        words = ["python jobs/serve.py", *(["--config", self._found(stage.config)] if stage.config else [])]
        words += [f"--{name} '{_word(value)}'" for name, value in flatten(without_secrets(stage.set)).items()]
        if not self.serving.models:
            words.append(f"--model.path {self.job.promote.model}")
        uri = without_secrets({"uri": self.serving.tracking_uri})["uri"]
        return " ".join([*words, f"--tracking_uri {uri}"])

    def _training(self) -> TrainingJob:
        stage = self.job.train

        def sampler(given: Mapping[str, Any]) -> dict[str, Any]:
            path = given.get("model.path")
            return sampler_settings(path) if path else {}

        forced = self._forced("train") | {"fresh": self.job.fresh}
        return self._read(_TRAININGS[stage.job], "train", stage, forced, {"sampler": sampler})

    def _serving(self) -> ServeConfig:
        stage, model = self.job.serve, self.job.promote.model
        file = load_yaml(Path(self._found(stage.config))) if stage.config else {}
        given = flatten(file) | flatten(stage.set)
        forced = {} if given.get("models") else {"model.path": model}
        if given.get("tracking_uri") is None:
            forced["tracking_uri"] = self.tracking.uri
        serving = self._read(ServeConfig, "serve", stage, forced)
        served = [one for one in serving.served() if model in (one.path, one.adapter)]
        if not served:
            raise ConfigError(f"none of the models is {model}: give one that path", "serve.models")
        for one in served:
            with section("serve.model"):
                one.sampler_for(self.training.model.path or str(self.model))
        return serving

    def _forced(self, stage: str) -> dict[str, Any]:
        """What the pipeline says of a stage's job, whatever the stage's settings are."""
        forced = {
            "output_dir": str(self.folder / stage),
            **{f"tracking.{name}": value for name, value in to_dict(self.label(stage)).items()},
        }
        return forced if self.job.seed is None else forced | {"seed": self.job.seed}

    def _read(
        self,
        cls: type[T],
        name: str,
        stage: Stage,
        forced: Mapping[str, Any],
        defaults: Mapping[str, Callable[[Mapping[str, Any]], Mapping]] | None = None,
    ) -> T:
        """A stage's job, with the settings of its file, of the stage, of the cluster, and those that are forced."""
        options = [f"--{key}={_word(value)}" for key, value in {**flatten(stage.set), **forced}.items()]
        files = ["--config", self._found(stage.config)] if stage.config else []
        try:
            return parse(cls, [*files, *options], "", "", defaults, ClusterFile.named)
        except ConfigError as error:
            raise ConfigError(f"in the settings of this stage, {error}", name) from None

    def _found(self, file: str) -> str:
        """The file, or that of the repository."""
        of_ours = self.repository / file
        return file if Path(file).exists() or not of_ours.exists() else str(of_ours)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
