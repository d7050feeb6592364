"""Sweeps over sampler settings on Ray Tune, and shows what speed costs.

    python jobs/sweep.py --config configs/sweep/digits.yaml --model.path outputs/digits/final
    python jobs/sweep.py --config configs/sweep/digits.yaml --model.path MODEL_DIR --dry-run
    python jobs/sweep.py --config configs/evaluate/llada-8b-instruct.yaml --config configs/sweep/parallelism.yaml \\
        --line gsm8k_cot --sweep.documents 200

All settings are asked of one pool of workers that hold the model; answers are kept in OUTPUT_DIR/answers (or
`--evaluate.cache`, shared with jobs/evaluate.py). The same command goes on where it was broken off.

Leaves in OUTPUT_DIR: front.html and front.png (accuracy against speed), sweep.json, configs/sampler.yaml (the
recommended settings, for any job that samples) and configs/front-N.yaml; every setting's results in lm-eval's form
below settings/. MLflow holds one run, with a child for each setting.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.config import check_seed, to_dict
from dllm_ray.errors import ConfigError, EvaluationError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.evaluation.suite import Ask, asks
from dllm_ray.models.config import ModelConfig
from dllm_ray.output import writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import TrackingConfig
from dllm_ray.tuning.config import SweepConfig


@dataclass
class SweepJob:
    """Settings of jobs/sweep.py."""

    output_dir: str = "outputs/sweep"
    """Folder for results, finished answers and, unless the model was trained here, the MLflow database."""
    seed: int = 0
    """Seeds the choice of few-shot examples, sampling where `sampler.seed` is null, and the searchers."""
    line: str | None = None
    """The line of `evaluate.suite` that is swept, by name or task."""
    dry_run: bool = False
    """Print what would be asked, and ask nothing."""
    fresh: bool = False
    """Begin anew where the folder holds an earlier sweep; answers on disk are kept."""
    confirm_run_unsafe_code: bool = False
    """Allow tasks that run the model's code, in a process with limits and without network."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; `model.path` is needed."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """The task and the workers."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """The official setting: what the sweep begins with, and what winners are compared with."""
    sweep: SweepConfig = field(default_factory=SweepConfig)
    """Which settings are tried."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; null `uri`: where the model's training was recorded, or the output folder."""

    def __post_init__(self):
        if self.model.path is None:
            raise ConfigError("name the model, e.g. --model.path outputs/digits/final", "model.path")
        check_seed(self.seed)
        if self.sampler.seed is None:
            self.sampler = replace(self.sampler, seed=self.seed)
        if self.confirm_run_unsafe_code:
            self.evaluate.confirm_run_unsafe_code = True
        self.ask()

    def ask(self) -> Ask:
        """What is asked, under the official setting."""
        from dllm_ray.evaluation.config import LikelihoodConfig

        if self.evaluate.variants:
            raise ConfigError("sweep.space says which settings are tried: leave variants out", "evaluate.variants")
        try:
            found = asks(self.evaluate, self.sampler, LikelihoodConfig(), self.line)
        except ConfigError as error:  # `asks` calls it as jobs/evaluate.py does
            raise ConfigError(error.message, "line" if error.field == "suite" else error.field) from None
        if len(found) > 1:
            raise ConfigError("the suite has several lines: name one, e.g. --line gsm8k_cot", "line")
        return found[0]


def main(job: SweepJob) -> None:
    from dllm_ray.evaluation.asking import Asker
    from dllm_ray.evaluation.run import check_tasks, look_up
    from dllm_ray.models.load import check_path
    from dllm_ray.tuning import published, scores
    from dllm_ray.tuning.plan import plan, rows

    check_path(job.model.path)
    ask = job.ask()
    if job.sweep.background is not None:
        published.curves(job.sweep.background)
    check_tasks(ask.evaluate)
    asker = Asker(job.model, job.seed)
    asker.check(ask)
    tasks = look_up(ask.evaluate)
    score = scores.choose(tasks, job.sweep.metric)
    planned = plan(job.sweep, tasks, ask.sampler, ask.evaluate.limit, job.seed, asker.check_sampler)
    for candidate in planned.candidates or ():
        asker.check(replace(ask, name=candidate.name, sampler=candidate.sampler))
    if job.dry_run:
        from dllm_ray.viz.terminal import table

        table(f"{job.model.path}, compared by {scores.label(tasks, score)}", rows(planned, job.sweep, tasks))
        table("settings", [{"setting": one.name} for one in planned.candidates or planned.space.sample(12, job.seed)])
        return
    _run(job, ask, planned, score, scores.label(tasks, score))


def _run(job: SweepJob, ask: Ask, planned, score: tuple[str, str], label: str) -> None:
    from dllm_ray import tracking
    from dllm_ray.answers import model_key
    from dllm_ray.models.provenance import read_provenance
    from dllm_ray.tuning import record, report
    from dllm_ray.tuning.answered import Answered
    from dllm_ray.tuning.sweep import State, Sweep, state_key
    from dllm_ray.tuning.watch import Watch
    from dllm_ray.viz.terminal import table

    output_dir = writable_folder(job.output_dir)
    state = State(output_dir, state_key(model_key(job.model), job.sweep, ask, job.seed), job.fresh)
    provenance = read_provenance(job.model.path)
    store = tracking.beside_training(job.tracking, provenance)
    tags = {"dllm_ray.model": job.model.path, "dllm_ray.eval.task": ",".join(ask.evaluate.tasks)}
    parent = provenance.get("run_id")
    facts = tracking.system_facts() | {"seed": job.seed}
    cache = job.evaluate.cache or str(output_dir / "answers")
    name = tracking.run_name("sweep", output_dir, store)
    sweep = Sweep(job.model, ask, job.sweep, planned, score, job.seed, output_dir, cache, name)
    with (
        state,
        tracking.start("sweep", to_dict(job), output_dir, store, tags, resume=state.run_id, parent=parent) as run,
    ):
        state.note(run_id=run.run_id)
        children = record.Children(run)
        with Watch(planned.trials, planned.asked) as watch:

            def listen(told, answered) -> None:
                watch.tell(told, answered)
                children.tell(told, answered)

            found, took, told = sweep.run(facts, state, watch.begin, listen)
        for one in told:
            children.tell(one, Answered.read(one.folder))
        subject = report.Subject(
            job.model.path,
            ",".join(ask.evaluate.tasks),
            label,
            planned.asked,
            job.sweep.confidence,
            job.sweep.background,
        )
        files = report.write(output_dir, found, subject, facts)
        record.findings(run, found, took, files)
        table(f"{subject.score}: settings that no other one beats", report.front_rows(found))
        if found.held_out:
            table(
                f"{found.held_out[0].documents} held-out documents, against the official setting",
                report.held_out_rows(found),
            )
        for sentence in report.sentences(found, subject):
            print(sentence)
        print(
            f"took      {took.trials} settings ({took.different} different) in {took.seconds:.0f} s, {took.asked} "
            f"documents answered; {took.overhead_s:.2f} s a setting beside answering"
        )
        print(f"results   {output_dir}")
        print(f"tracking  run {run.run_id}: {tracking.ui_command(run.uri)}")
        failed = [one for one in told if one.error is not None]
        if failed:
            raise EvaluationError(
                f"{len(failed)} of {len(told)} settings failed, the first, {failed[0].name}: {failed[0].error}. What "
                "the others gave is kept: the same command tries those that failed again"
            )


if __name__ == "__main__":
    sys.exit(run_job(SweepJob, main, __doc__))
