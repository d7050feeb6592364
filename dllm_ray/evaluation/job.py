"""An evaluation from its settings to results: checks them, asks a pool of workers, writes and records what came of it.

`jobs/evaluate.py` and the pipeline call `prepare` and `run`. Who answers is the caller's affair; no Ray in here.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from dllm_ray.config import check_seed, to_dict
from dllm_ray.errors import ConfigError, DllmRayError, EvaluationError
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig
from dllm_ray.evaluation.suite import Ask, asks
from dllm_ray.models.config import ModelConfig
from dllm_ray.output import writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import TrackingConfig


@dataclass
class EvaluateJob:
    """Settings of jobs/evaluate.py."""

    output_dir: str = "outputs/evaluate"
    """Folder for results, finished answers and, unless the model was trained here, the MLflow database."""
    seed: int = 0
    """Seeds the choice of few-shot examples, sampling where `sampler.seed` is null, and likelihoods."""
    suite: str | None = None
    """Lines of `evaluate.suite` to ask, by name or task, separated by commas; null: all."""
    limit: int | None = None
    """Documents of each task, from the first, whatever lines of a suite say."""
    set: str | None = None
    """Settings that win over those of a suite's lines: `sampler.steps=64, likelihood.mc_num=32`."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run the model's code, in a process with limits and without network."""
    plan: bool = False
    """Print tasks, settings, requests and an estimate of the time they take; ask nothing else."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; `model.path` is needed."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Tasks and workers."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How answers are denoised."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """How likelihoods are estimated."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; null `uri`: where the model's training was recorded, or the output folder."""

    def __post_init__(self):
        if self.model.path is None:
            raise ConfigError("name the model, e.g. --model.path outputs/digits/final", "model.path")
        check_seed(self.seed)
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"must be at least 1, got {self.limit}", "limit")
        if self.sampler.seed is None:
            self.sampler = replace(self.sampler, seed=self.seed)
        if self.confirm_run_unsafe_code or self.plan:  # a plan runs nothing
            self.evaluate.confirm_run_unsafe_code = True
        self.asks()

    def asks(self) -> list[Ask]:
        """What is asked, with all settings worked out."""
        found = asks(self.evaluate, self.sampler, self.likelihood, self.suite, self.set)
        if self.limit is None:
            return found
        return [replace(ask, evaluate=replace(ask.evaluate, limit=self.limit)) for ask in found]


@dataclass(frozen=True)
class Told:
    """What came of one ask."""

    ask: Ask
    results: Mapping[str, Any]
    """lm-eval's, without documents."""
    figures: Mapping[str, float]
    """Of the sampler and the pool."""


def check(asked: list[Ask]) -> None:
    """Makes sure, before a model is at hand, that there are such tasks and that they may be run; raises as
    `run.check_tasks`."""
    from dllm_ray.evaluation.run import check_tasks

    for ask in asked:
        check_tasks(ask.evaluate)


def prepare(job: EvaluateJob):
    """Checks everything that can be known before the model is loaded, and returns who asks (`asking.Asker`).

    Raises:
        DllmRayError: there is no such model or task, data can't be had, or settings can't work on the model.
    """
    from dllm_ray.evaluation.run import check_data
    from dllm_ray.models.load import check_path

    check_path(job.model.path)
    asked = job.asks()
    check(asked)
    from dllm_ray.evaluation.asking import Asker

    asker = Asker(job.model, job.seed)
    for ask in asked:
        asker.check(ask)
        check_data(ask.evaluate)
    return asker


def run(
    job: EvaluateJob,
    asker,
    open_pool: Callable[[str], AbstractContextManager],
    parent: str | None = None,
    model: str | None = None,
) -> tuple[str, list[Told]]:
    """Asks, and leaves results in the output folder and in MLflow.

    Args:
        job: the settings.
        asker: of `prepare`.
        open_pool: name of the MLflow run -> the workers that hold the model (`workers.ModelPool`).
        parent: MLflow run that this one belongs under; None: the model's training run.
        model: what the model is called in MLflow; None: by its path.

    Returns:
        The id of the MLflow run, and what was told.

    Raises:
        DllmRayError: something can't be asked; with several settings, after the others were.
    """
    output_dir = writable_folder(job.output_dir)
    from dllm_ray import tracking
    from dllm_ray.evaluation import report
    from dllm_ray.models.provenance import read_provenance
    from dllm_ray.viz.terminal import table

    provenance = read_provenance(job.model.path)
    store = tracking.beside_training(job.tracking, provenance)
    trained = provenance.get("run_id")
    tags = {"dllm_ray.model": model or job.model.path, "dllm_ray.trained_by": trained}
    facts = tracking.system_facts() | {"seed": job.seed}
    asked = job.asks()
    told: list[Told] = []
    failed: list[str] = []
    with (
        tracking.start("evaluate", to_dict(job), output_dir, store, tags, parent=parent or trained) as run,
        open_pool(tracking.run_name("evaluate", output_dir, store)) as pool,
    ):
        cache = job.evaluate.cache or str(output_dir / "answers")
        for ask in asked:
            try:
                tell = pool.metrics.answering(",".join(ask.evaluate.tasks), ask.name)
                results, figures = asker.ask(ask, pool, cache, on_progress=tell)
                folder = writable_folder(output_dir / ask.name) if ask.name else output_dir
                files = report.write(folder, ask, results, figures, facts)
            except DllmRayError as error:
                if len(asked) == 1:
                    raise
                failed.append(ask.name or "main")
                print(f"failed    {failed[-1]}: {error}")
                continue
            if ask.name:
                settings = to_dict(replace(job, sampler=ask.sampler, likelihood=ask.likelihood))
                label = replace(store, run_name=f"evaluate {ask.name}")
                with tracking.start("evaluate", settings, output_dir, label, tags, parent=run.run_id) as own:
                    report.record(own, ask, results, figures, files)
            else:
                report.record(run, ask, results, figures, files)
            told.append(Told(ask, results, figures))
        if told:
            table(model or job.model.path, report.rows([(one.ask, one.results, one.figures) for one in told]))
        print(f"results   {output_dir}")
        print(f"tracking  run {run.run_id}: {tracking.ui_command(run.uri)}")
        if failed:
            raise EvaluationError(
                f"{len(failed)} of {len(asked)} settings failed: {', '.join(failed)}. What the others gave is kept: "
                "the same command asks what is missing"
            )
    return run.run_id, told
