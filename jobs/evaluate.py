"""Evaluates a diffusion language model on lm-eval tasks, its questions fanned out over Ray workers.

    python jobs/evaluate.py --config configs/evaluate/digits.yaml --model.path outputs/digits/final
    python jobs/evaluate.py --model.path MODEL_DIR --evaluate.tasks [gsm8k_file] \\
        --evaluate.data_files.gsm8k_file test.jsonl --sampler.max_new_tokens 256 --sampler.steps 256

Leaves OUTPUT_DIR/results.json in lm-eval's own form, with the sampler's figures, and samples_TASK.jsonl; the same for
each variant of the sampler settings in a folder of its own. MLflow holds it under the model's training run.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from dllm_ray.cli import run_job
from dllm_ray.config import check_seed, read, section, to_dict
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import EvaluateConfig
from dllm_ray.models.config import ModelConfig
from dllm_ray.output import complete_file, writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import TrackingConfig


@dataclass
class EvaluateJob:
    """Settings of jobs/evaluate.py."""

    output_dir: str = "outputs/evaluate"
    """Folder for results and, unless the model was trained here, the MLflow database."""
    seed: int = 0
    """Seeds the choice of few-shot examples, and sampling where `sampler.seed` is null."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; `model.path` is needed."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    """Tasks and workers."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How answers are denoised."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; null `uri`: where the model's training was recorded, or the output folder."""

    def __post_init__(self):
        if self.model.path is None:
            raise ConfigError("name the model, e.g. --model.path outputs/digits/final", "model.path")
        if self.sampler.seed is None:
            self.sampler = replace(self.sampler, seed=self.seed)
        check_seed(self.seed)
        self.samplers()

    def samplers(self) -> dict[str, SamplerConfig]:
        """Name -> settings: the main ones under an empty name, and each variant."""
        with section("sampler"):
            self.sampler.blocks()
        known = to_dict(self.sampler)
        samplers = {"": self.sampler}
        for variant in self.evaluate.variants:
            name = ",".join(f"{key}={value}" for key, value in variant.items())
            try:
                samplers[name] = read(SamplerConfig, known | variant, "sampler")
                samplers[name].blocks()
            except ConfigError as error:
                raise ConfigError(f"{variant}: {error}", "evaluate.variants") from None
        return samplers


def main(job: EvaluateJob) -> None:
    from dllm_ray.evaluation.run import check_tasks
    from dllm_ray.models.load import check_path

    check_path(job.model.path)
    check_tasks(job.evaluate)
    output_dir = writable_folder(job.output_dir)
    from dllm_ray import cluster, tracking
    from dllm_ray.models.load import open_tokenizer
    from dllm_ray.training.checkpoint import read_provenance
    from dllm_ray.viz.terminal import table
    from dllm_ray.workers import ModelPool

    tokenizer, spec, blueprint = open_tokenizer(job.model.path)
    room = {name: _max_prompt(sampler, blueprint.max_length) for name, sampler in job.samplers().items()}
    provenance = read_provenance(job.model.path)
    store = tracking.beside_training(job.tracking, provenance)
    tags = {"dllm_ray.model": job.model.path}
    rows = []
    run_config = job.evaluate
    with (
        tracking.start("evaluate", to_dict(job), output_dir, store, tags, parent=provenance.get("run_id")) as run,
        cluster.connect(run_config.workers or 2),
        ModelPool(
            job.model,
            cluster.shares(run_config.workers, run_config.cpus_per_worker, run_config.gpus_per_worker, "evaluate."),
            run_config.threads_per_worker,
        ) as pool,
    ):
        for name, sampler in job.samplers().items():
            folder = writable_folder(output_dir / name) if name else output_dir
            results, figures = _evaluate(job, sampler, name, pool, tokenizer, spec, room[name])
            files = _write(folder, job, sampler, results, figures)
            if name:
                settings = to_dict(replace(job, sampler=sampler))
                label = replace(store, run_name=f"evaluate {name}")
                with tracking.start("evaluate", settings, output_dir, label, tags, parent=run.run_id) as variant_run:
                    _record(variant_run, results, figures, files)
            else:
                _record(run, results, figures, files)
            rows += _table_rows(name or "main", results, figures)
    table(f"{job.model.path} on {', '.join(job.evaluate.tasks)}", rows)
    print(f"results   {output_dir / 'results.json'}")
    print(f"tracking  run {run.run_id}: {tracking.ui_command(run.uri)}")


def _evaluate(job, sampler, name, pool, tokenizer, spec, max_prompt):
    """lm-eval's results for one setting, and the sampler's figures."""
    from dllm_ray.evaluation.lm import DiffusionHarness
    from dllm_ray.evaluation.run import evaluate
    from dllm_ray.viz.terminal import Progress

    outputs = []

    def answer(prompts):
        progress = Progress(f"evaluate {name}".rstrip(), len(prompts), "document")
        outputs.append(pool.sample(prompts, sampler, job.evaluate.batch_size, progress.update))
        progress.close()
        return outputs[-1]

    harness = DiffusionHarness(answer, tokenizer, max_prompt, job.model.path, spec.eot_text)
    results = evaluate(harness, job.evaluate, job.seed)
    if harness.truncated:
        print(f"note      {harness.truncated} prompts were longer than {max_prompt} tokens and lost their beginning")
    seconds = sum(output.seconds for output in outputs)
    nfe = sum(sum(output.row_nfe) for output in outputs)
    tokens = sum(len(completion) for output in outputs for completion in output.completions)
    figures = {
        "nfe": float(nfe),
        "tpf": tokens / max(nfe, 1),
        "tokens_per_s": tokens / max(seconds, 1e-9),
        "tokens": tokens,
        "seconds": seconds,
        "truncated_prompts": harness.truncated,
    }
    return results, figures


def _max_prompt(sampler: SamplerConfig, limit: int | None) -> int | None:
    """Most tokens of a prompt that leave room for an answer; None where the model states no limit."""
    if limit is None:
        return None
    new = sampler.max_new_tokens or 1
    if new >= limit:
        raise ConfigError(
            f"{new} leaves no room for a prompt in the model's context of {limit}", "sampler.max_new_tokens"
        )
    return limit - new


def _write(folder: Path, job, sampler, results, figures) -> list[Path]:
    from lm_eval.utils import handle_non_serializable

    samples = results.pop("samples", {})
    results["sampler"] = {**figures, "settings": to_dict(sampler), "workers": job.evaluate.workers}
    with complete_file(folder / "results.json") as file:
        json.dump(results, file, indent=2, default=handle_non_serializable, ensure_ascii=False)
    files = [folder / "results.json"]
    for task, documents in samples.items():
        files.append(folder / f"samples_{task}.jsonl")
        with complete_file(files[-1]) as file:
            for document in documents:
                file.write(json.dumps(document, default=handle_non_serializable, ensure_ascii=False) + "\n")
    return files


def _record(run, results, figures, files) -> None:
    from dllm_ray.evaluation.run import metrics

    run.log(
        {f"eval/{task}/{name}": value for task, values in metrics(results).items() for name, value in values.items()}
    )
    run.log({f"sampler/{name}": value for name, value in figures.items()})
    for file in files:
        run.file(file)


def _table_rows(name, results, figures) -> list[dict]:
    from dllm_ray.evaluation.run import metrics

    return [
        {
            "setting": name,
            "task": task,
            "docs": results["n-samples"].get(task, {}).get("effective", ""),  # a group has none of its own
            **values,
            "tok/forward": figures["tpf"],
            "tok/s": round(figures["tokens_per_s"]),
        }
        for task, values in metrics(results).items()
    ]


if __name__ == "__main__":
    sys.exit(run_job(EvaluateJob, main, __doc__))
