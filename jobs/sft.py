"""Trains a diffusion language model on conversations.

    python jobs/sft.py                                            # the demo: configs/sft/digits.yaml
    python jobs/sft.py --config configs/sft/gsm8k_tiny.yaml --data.path train.jsonl
    python jobs/sft.py --model.path MODEL_DIR --data.path chats.jsonl --output_dir outputs/my-run
    ray job submit --working-dir . -- python jobs/sft.py --output_dir /shared/my-run

The same command again goes on where a killed run stopped; --fresh starts over. Leaves OUTPUT_DIR/final, a Hugging Face
directory, and records the run in MLflow.
"""

import contextlib
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout need not be installed

from dllm_ray.cli import run_job
from dllm_ray.config import check_seed, section, to_dict, without_secrets
from dllm_ray.data.config import DataConfig
from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.models.config import LoRAConfig, ModelConfig
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import TrackingConfig
from dllm_ray.training.config import TrainConfig

TOKENIZER_ROWS = 100_000
"""Rows that a tokenizer from scratch is trained on, at most."""

DEMO = Path(__file__).resolve().parents[1] / "configs" / "sft" / "digits.yaml"


@dataclass
class SFTJob:
    """Settings of jobs/sft.py."""

    output_dir: str = "outputs/sft"
    """Folder for checkpoints, the trained model, and the MLflow database."""
    seed: int = 0
    """Seeds new weights, the order of the data, and the noise."""
    fresh: bool = False
    """Start over: remove the run that is in `output_dir`."""
    sample_rows: int = 8
    """Validation questions answered at the end, with the settings of `sampler`, as sample texts for MLflow."""
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
    """How sample texts are made."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self):
        if self.data.path is None:
            raise ConfigError("name the training data, e.g. --data.path chats.jsonl", "data.path")
        if self.model.adapter or self.model.quantization:
            name = "model.adapter" if self.model.adapter else "model.quantization"
            raise ConfigError("training starts from a model without adapter or quantization", name)
        if self.lora.rank is not None and self.model.path is None:
            raise ConfigError("an adapter needs a trained model under it: set model.path", "lora.rank")
        check_seed(self.seed)
        with section("sampler"):
            self.sampler.blocks()
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


def main(job: SFTJob) -> None:
    from dllm_ray.training.run_folder import FINAL, RunFolder

    folder = RunFolder(job.output_dir, without_secrets(to_dict(job)), job.fresh)
    try:
        if folder.finished:
            print(f"{folder.path / FINAL} is finished already; --fresh would train it again")
        else:
            _train(job, folder)
    finally:
        folder.close()


def _train(job, folder) -> None:
    from dllm_ray import tracking
    from dllm_ray.data import prepare
    from dllm_ray.training import report

    corpus = prepare.resolve(job.data, job.data.path, job.train.max_length)
    valid_corpus = None
    if job.data.valid_path is not None and job.data.valid_rows:
        valid_corpus = prepare.resolve(job.data, job.data.valid_path, job.train.max_length)
    tokenizer, spec = _tokenizer_and_spec(job, folder, corpus)

    with contextlib.ExitStack() as stack:
        mapper = map
        if corpus.size > prepare.LOCAL_BYTES:
            shares = _join_cluster(job, stack)
            from dllm_ray.data.mixture import map_shards as mapper
        prepared = prepare.prepare(
            job.data,
            corpus,
            valid_corpus,
            tokenizer,
            spec.stop_token_ids,
            spec.pad_token_id,
            job.seed,
            mapper,
            spec.padding,
        )
        print(report.data_line(prepared), flush=True)
        folder.begin(prepared.account.digest)
        if corpus.size <= prepare.LOCAL_BYTES:
            shares = _join_cluster(job, stack)

        tags = {
            "dllm_ray.model": job.model.path or f"scratch:{job.model.scratch.architecture}",
            "dllm_ray.family": spec.family,
            "dllm_ray.objective": job.objective.name,
            "dllm_ray.data_fingerprint": prepared.account.digest,
        }
        resume = folder.state.get("mlflow_run")
        run = stack.enter_context(tracking.start("sft", to_dict(job), folder.path, job.tracking, tags, resume))
        folder.update(mlflow_run=run.run_id)
        run.json("data.json", report.data_facts(prepared))
        _fit(job, folder, prepared, tokenizer, shares, run)


def _fit(job, folder, prepared, tokenizer, shares, run) -> None:
    from dllm_ray import tracking
    from dllm_ray.data.mixture import TrainStream
    from dllm_ray.training import checkpoint, report, trainer
    from dllm_ray.training.run_folder import CHECKPOINTS, FINAL

    steps, rows = trainer.total_steps(job.train, prepared.plan.rows)
    task = trainer.TrainTask(
        model=job.model,
        lora=job.lora,
        tokenizer=tokenizer,
        objective=job.objective,
        train=job.train,
        sampler=job.sampler,
        sample_rows=job.sample_rows,
        seed=job.seed,
        total_steps=steps,
        epoch_rows=prepared.plan.rows,
        valid=prepared.valid,
        padding=prepared.padding,
        settings=without_secrets(to_dict(job)),
    )
    stream = TrainStream(prepared, job.train.batch_size, rows, shares.data_cpus)
    watcher = report.Watcher(steps, run)

    def on_events(events: list[trainer.Event]) -> None:
        watcher.on_events(events)
        for event in events:
            if event["kind"] == "checkpoint":
                folder.update(checkpoint_step=event["step"])

    shared = job.train.storage_path
    storage, name = (shared, folder.state["name"]) if shared else (str(folder.path), CHECKPOINTS)
    last = trainer.fit(task, stream, shares, storage, name, on_events)
    watcher.close()

    provenance = {
        "run_id": run.run_id,
        "tracking_uri": without_secrets({"uri": run.uri})["uri"],
        "step": steps,
        "data": job.data.path,
        "data_fingerprint": prepared.account.digest,
    }
    card = report.model_card(without_secrets(to_dict(job)), prepared, watcher)
    target = folder.path / FINAL
    with last.as_directory() as directory:
        checkpoint.export(Path(directory), target, card, provenance)
    run.text("model_card.md", card)
    run.tag({"dllm_ray.checkpoint": str(target)})
    folder.update(finished=True)
    print(f"model     {target}")
    print(f"tracking  run {run.run_id}: {tracking.ui_command(run.uri)}")


def _tokenizer_and_spec(job, folder, corpus):
    """The model's tokenizer (trained on the data for a model from scratch) and spec; checks the context length."""
    from dllm_ray.data.tokenize import texts
    from dllm_ray.models import adapters, blueprint, load, scratch, tokenizers
    from dllm_ray.training.run_folder import TOKENIZER

    if job.model.path is not None:
        load.check_path(job.model.path)
        if adapters.is_adapter(job.model.path):
            raise ModelError(
                f"{job.model.path} is an adapter, and training starts from a model: merge it into its base first, "
                f"python jobs/convert.py --model.path {job.model.path} --output_dir MERGED"
            )
        tokenizer, spec, loaded = load.open_tokenizer(job.model.path)
        limit = loaded.max_length
        if spec.attention == "block_causal":
            print("note      this model's attention is block-causal; MDLM lets its blocks see noise in earlier ones")
        if limit is not None and job.train.max_length > limit:
            raise ConfigError(f"{job.train.max_length} exceeds the model's context of {limit}", "train.max_length")
        return tokenizer, spec
    kept = folder.path / TOKENIZER
    if folder.resumed and kept.is_dir():
        tokenizer = tokenizers.load_tokenizer(str(kept))
    else:
        tokenizer = tokenizers.train_bpe(
            texts(corpus.shards, corpus.rules, TOKENIZER_ROWS), job.model.scratch.vocab_size
        )
        tokenizer.save_pretrained(kept)
    scratch.check(job.model.scratch, tokenizer)
    return tokenizer, blueprint.describe(job.model.scratch.architecture, tokenizer)


def _join_cluster(job, stack):
    from dllm_ray import cluster

    stack.enter_context(cluster.connect(job.train.workers or 2))
    train = job.train
    return cluster.shares(train.workers, train.cpus_per_worker, train.gpus_per_worker, "train.")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    names_its_data = any(word.startswith(("--config", "--data.path", "-h", "--help")) for word in arguments)
    if not names_its_data:
        arguments = ["--config", str(DEMO), *arguments]
    sys.exit(run_job(SFTJob, main, __doc__, arguments))
