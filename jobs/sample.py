"""Answers prompts with a diffusion language model.

    python jobs/sample.py --model.path outputs/digits/final --prompt "reverse 4096" --show
    python jobs/sample.py --model.path MODEL_DIR --prompts questions.jsonl --output_dir outputs/answers

A prompts file has a column `prompt`, `question`, `instruction` or `messages`; it is answered by Ray workers, in order,
into OUTPUT_DIR/samples.jsonl. A single --prompt is answered in this process, without Ray.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from dllm_ray.cli import run_job
from dllm_ray.config import section, to_dict
from dllm_ray.errors import ConfigError, DataError
from dllm_ray.models.config import ModelConfig
from dllm_ray.output import complete_file, writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import TrackingConfig


@dataclass
class SampleJob:
    """Settings of jobs/sample.py."""

    output_dir: str = "outputs/samples"
    """Folder for samples.jsonl and, unless the model was trained here, the MLflow database."""
    prompt: str | None = None
    """One question."""
    prompts: str | None = None
    """A file of questions: jsonl, json, csv or parquet."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other column names in the file, e.g. `{prompt: query}`."""
    limit: int | None = None
    """Questions of the file, from the first; null: all."""
    show: bool = False
    """Print the canvas of the first prompt after each denoising step."""
    workers: int | None = None
    """Ray workers that hold the model; null: one for each GPU of the cluster, or 2 where there is none."""
    batch_size: int = 64
    """Prompts denoised together by a worker."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; `model.path` is needed."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How to denoise."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; null `uri`: where the model's training was recorded, or the output folder."""

    def __post_init__(self):
        if self.model.path is None:
            raise ConfigError("name the model, e.g. --model.path outputs/digits/final", "model.path")
        if (self.prompt is None) == (self.prompts is None):
            raise ConfigError("give one question with --prompt, or a file with --prompts", "prompt")
        with section("sampler"):
            self.sampler.blocks()
        for name in ("limit", "workers", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)


def main(job: SampleJob) -> None:
    from dllm_ray.models.load import check_path

    check_path(job.model.path)
    conversations = _conversations(job)
    output_dir = writable_folder(job.output_dir)
    from dllm_ray import chat, tracking
    from dllm_ray.models.load import open_tokenizer
    from dllm_ray.training.checkpoint import read_provenance

    provenance = read_provenance(job.model.path)
    tokenizer, spec, blueprint = open_tokenizer(job.model.path)
    prompts = [chat.encode_prompt(tokenizer, messages) for messages in conversations]
    _require_room(job, prompts, blueprint.max_length)
    store = tracking.beside_training(job.tracking, provenance)
    tags = {"dllm_ray.model": job.model.path}
    parent = provenance.get("run_id")
    with tracking.start("sample", to_dict(job), output_dir, store, tags, parent=parent) as run:
        answers = _answer_here(job, tokenizer, prompts) if job.prompt is not None else _answer_by_workers(job, prompts)
        path = _write(output_dir, tokenizer, spec.eot_text, conversations, answers)
        figures = answers.figures()
        run.log({f"sampler/{name}": value for name, value in figures.items()})
        run.file(path)
    if job.prompt is not None:
        print(chat.decode(tokenizer, answers.completions[0], spec.eot_text))
    print(
        f"{len(prompts)} answers in {path}: {figures['tpf']:.2f} tokens per forward, "
        f"{figures['tokens_per_s']:,.0f} tokens/s",
        file=sys.stderr,
    )


def _conversations(job: SampleJob) -> list[list[dict]]:
    from dllm_ray.data import formats, sources

    if job.prompt is not None:
        rows = [("--prompt", {"prompt": job.prompt})]
        columns = {}
    else:
        rows = sources.head(sources.resolve(job.prompts), job.limit or sys.maxsize)
        columns = job.columns
        formats.check_columns(columns)
    conversations = []
    for where, row in rows:
        try:
            conversations.append(formats.to_prompt(row, columns))
        except formats.RowError as error:
            raise DataError(f"{where}: {error}: {sources.snippet(row)}") from None
    if not conversations:
        raise DataError(f"{job.prompts}: holds no rows")
    return conversations


def _require_room(job: SampleJob, prompts: list[list[int]], limit: int | None) -> None:
    """Makes sure that every prompt fits the model together with its answer, before any is answered."""
    new = job.sampler.max_new_tokens or 1
    for number, prompt in enumerate(prompts, start=1):
        if limit is not None and len(prompt) + new > limit:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens: with {new} of an answer it doesn't fit the model's context "
                f"of {limit}. Shorten it, or lower sampler.max_new_tokens"
            )


def _answer_here(job: SampleJob, tokenizer, prompts: list[list[int]]):
    import torch

    from dllm_ray.models.load import open_model
    from dllm_ray.sampling.sampler import Sampler
    from dllm_ray.viz.terminal import denoising

    lm = open_model(job.model, device="cuda" if torch.cuda.is_available() else "cpu")
    output = Sampler(lm, job.sampler).sample(prompts, trace=job.show)
    if job.show:
        denoising(tokenizer, lm.spec, output.history[0].tolist(), len(prompts[0]))
    return output


def _answer_by_workers(job: SampleJob, prompts: list[list[int]]):
    from dllm_ray import cluster
    from dllm_ray.viz.terminal import Progress
    from dllm_ray.workers import ModelPool

    with cluster.connect(job.workers or 2), ModelPool(job.model, cluster.shares(job.workers, None, None, "")) as pool:
        progress = Progress("sample", len(prompts), "prompt")
        answers = pool.sample(prompts, job.sampler, job.batch_size, progress.update)
        progress.close()
    return answers


def _write(output_dir: Path, tokenizer, eot_text, conversations, answers) -> Path:
    from dllm_ray import chat

    path = output_dir / "samples.jsonl"
    with complete_file(path) as file:
        for messages, completion, nfe in zip(conversations, answers.completions, answers.row_nfe, strict=True):
            row = {
                "messages": messages,
                "completion": chat.decode(tokenizer, completion, eot_text),
                "completion_tokens": len(completion),
                "nfe": nfe,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


if __name__ == "__main__":
    sys.exit(run_job(SampleJob, main, __doc__))
