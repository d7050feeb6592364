"""Evaluates a diffusion language model on lm-eval tasks, its requests fanned out over Ray workers.

    python jobs/evaluate.py --config configs/evaluate/digits.yaml --model.path outputs/digits/final
    python jobs/evaluate.py --model.path MODEL_DIR --evaluate.tasks [gsm8k_file] \\
        --evaluate.data_files.gsm8k_file test.jsonl --sampler.max_new_tokens 256 --sampler.steps 256
    python jobs/evaluate.py --config configs/evaluate/llada-8b-instruct.yaml --suite gsm8k_cot --limit 100 --plan

Leaves OUTPUT_DIR/results.json in lm-eval's own form, with the sampler's figures, and samples_TASK.jsonl; the same for
each variant of the sampler settings, or each line of a suite, in a folder of its own. Finished answers are kept in
OUTPUT_DIR/answers: the same command goes on where it was broken off. MLflow holds it all under the model's training
run.
"""

import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
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


def main(job: EvaluateJob) -> None:
    from dllm_ray.evaluation.run import check_data, check_tasks
    from dllm_ray.models.load import check_path

    check_path(job.model.path)
    asked = job.asks()
    for ask in asked:
        check_tasks(ask.evaluate)
    from dllm_ray.evaluation.asking import Asker

    asker = Asker(job.model, job.seed)
    for ask in asked:
        asker.check(ask)
        check_data(ask.evaluate)
    if job.plan:
        _show_plan(job, asker, asked)
    else:
        _run(job, asker, asked)


def _run(job: EvaluateJob, asker, asked: list[Ask]) -> None:
    output_dir = writable_folder(job.output_dir)
    from dllm_ray import tracking
    from dllm_ray.evaluation import report
    from dllm_ray.training.checkpoint import read_provenance
    from dllm_ray.viz.terminal import table

    provenance = read_provenance(job.model.path)
    store = tracking.beside_training(job.tracking, provenance)
    tags = {"dllm_ray.model": job.model.path}
    facts = tracking.system_facts() | {"seed": job.seed}
    told: list[tuple] = []
    failed: list[str] = []
    with (
        tracking.start("evaluate", to_dict(job), output_dir, store, tags, parent=provenance.get("run_id")) as run,
        _pool(job, tracking.run_name("evaluate", output_dir, store)) as pool,
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
            told.append((ask, results, figures))
        if told:
            table(job.model.path, report.rows(told))
        print(f"results   {output_dir}")
        print(f"tracking  run {run.run_id}: {tracking.ui_command(run.uri)}")
        if failed:
            raise EvaluationError(
                f"{len(failed)} of {len(asked)} settings failed: {', '.join(failed)}. What the others gave is kept: "
                "the same command asks what is missing"
            )


def _show_plan(job: EvaluateJob, asker, asked: list[Ask]) -> None:
    from dllm_ray.evaluation.plan import timed
    from dllm_ray.viz.terminal import duration, table

    with _pool(job, "plan") as pool:
        planned = [plan for ask in asked for plan in timed(asker.plan(ask), ask, pool, asker.context)]
    table(f"{job.model.path}, {pool.workers} workers", [plan.row() for plan in planned])
    print(f"in all    {duration(sum(plan.seconds or 0.0 for plan in planned))} at most, and what loading takes")


@contextmanager
def _pool(job: EvaluateJob, run_name: str):
    """Workers that hold the model, for a run of that name."""
    from dllm_ray import cluster
    from dllm_ray.bulk_metrics import BulkMetrics
    from dllm_ray.metrics import Labels
    from dllm_ray.workers import ModelPool

    config = job.evaluate
    with cluster.connect(config.workers or 2):
        shares = cluster.shares(config.workers, config.cpus_per_worker, config.gpus_per_worker, "evaluate.")
        with (
            BulkMetrics(Labels("evaluate", run_name, job.model.path)) as metrics,
            ModelPool(job.model, shares, config.threads_per_worker, metrics) as pool,
        ):
            yield pool


if __name__ == "__main__":
    sys.exit(run_job(EvaluateJob, main, __doc__))
