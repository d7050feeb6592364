"""A training job from its settings to a finished model: looks the data up, trains, watches, exports.

`jobs/sft.py` and `jobs/pretrain.py` call `run`; they differ in their settings alone.
"""

import contextlib
from pathlib import Path
from typing import Any

from dllm_ray import cluster, tracking
from dllm_ray.config import section, to_dict, without_secrets
from dllm_ray.data import prepare
from dllm_ray.data.config import DataConfig
from dllm_ray.data.mixture import TrainStream, map_shards
from dllm_ray.data.prepare import Corpus, Prepared
from dllm_ray.data.tokenize import texts
from dllm_ray.errors import ConfigError, ModelError
from dllm_ray.metrics import Board, Labels
from dllm_ray.models import adapters, blueprint, load, scratch, tokenizers
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.models.vocabulary import rows_needed
from dllm_ray.objectives import Objective, build
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.training import checkpoint, report, trainer
from dllm_ray.training.config import Elastic, TrainConfig
from dllm_ray.training.job import TrainingJob
from dllm_ray.training.metrics import TrainMetrics
from dllm_ray.training.observe import Look, Observer, free_gpu
from dllm_ray.training.run_folder import CHECKPOINTS, FINAL, TOKENIZER, RunFolder

_TOKENIZER_ROWS = 100_000
"""Rows that a tokenizer from scratch is trained on, at most."""


def run(job: TrainingJob, name: str, parent: str | None = None) -> None:
    """Trains, or goes on with the run that is in the job's output folder.

    Args:
        job: the settings.
        name: the job's name in the tracking store: `sft`, `pretrain`.
        parent: MLflow run that this one belongs under.

    Raises:
        DllmRayError: bad input, before anything expensive starts; or training failed.
    """
    folder = RunFolder(job.output_dir, without_secrets(to_dict(job)), job.fresh)
    try:
        if folder.finished:
            print(f"{folder.path / FINAL} is finished already; --fresh would train it again")
        else:
            _train(job, name, folder, parent)
    finally:
        folder.close()


def _train(job: TrainingJob, name: str, folder: RunFolder, parent: str | None) -> None:
    if job.observe.tasks:
        from dllm_ray.evaluation.run import check_tasks

        check_tasks(job.observe.evaluation(), "observe")
    with section("data"):
        corpus = prepare.resolve(job.data, job.train.max_length, job.seed)
        valid_corpus = prepare.resolve_valid(job.data, job.train.max_length, job.seed)
    tokenizer, spec, context = _tokenizer_and_spec(job, folder, corpus)
    objective = _objective(job, spec, tokenizer, context)  # what doesn't fit the model is known now

    with contextlib.ExitStack() as stack:
        early = prepare.needs_ray(corpus, job.train.max_steps)
        if early:
            shares = _join_cluster(job.train, stack)
        mapper = map_shards if early else map
        prepared = prepare_data(
            job.data, corpus, valid_corpus, tokenizer, spec, job.objective, job.train, job.seed, mapper
        )
        print(report.data_line(prepared), flush=True)
        folder.begin(prepared.fingerprint)
        if not early:
            shares = _join_cluster(job.train, stack)

        tags = {
            "dllm_ray.model": _model_name(job),
            "dllm_ray.family": spec.family,
            "dllm_ray.objective": job.objective.name,
            "dllm_ray.data_fingerprint": prepared.fingerprint,
        }
        resume = folder.state.get("mlflow_run")
        record = stack.enter_context(
            tracking.start(name, to_dict(job), folder.path, job.tracking, tags, resume, parent)
        )
        folder.update(mlflow_run=record.run_id)
        record.json("data.json", report.data_facts(prepared))
        labels = Labels(name, tracking.run_name(name, folder.path, job.tracking), _model_name(job))
        board = stack.enter_context(Board(labels, "train"))
        _fit(job, name, folder, prepared, tokenizer, objective, shares, record, board)


def _objective(job: TrainingJob, spec: DiffusionSpec, tokenizer, context: int | None) -> Objective:
    with section("objective"):
        objective = build(job.objective, spec, rows_needed(tokenizer), context, job.seed)
    if objective.name == "edit_flow" and spec.edit_heads is None and job.lora.rank is not None:
        raise ConfigError(
            "an adapter needs its base's edit heads: make a model with some first, python jobs/convert.py "
            f"--model.path {job.model.path} --to editflow --output_dir EDITS",
            "lora.rank",
        )
    return objective


def prepare_data(
    data: DataConfig,
    corpus: Corpus,
    valid_corpus: Corpus | None,
    tokenizer,
    spec: DiffusionSpec,
    objective: ObjectiveConfig,
    train: TrainConfig,
    seed: int,
    mapper: prepare.Mapper = map,
) -> Prepared:
    """The data of a run of `train` over `corpus`, for a model and an objective; raises as `prepare.prepare`."""
    with section("data"):
        return prepare.prepare(
            data,
            corpus,
            valid_corpus,
            tokenizer,
            spec.stop_token_ids,
            spec.pad_token_id,
            seed,
            batch_size=train.batch_size,
            max_length=train.max_length,
            max_steps=train.max_steps,
            padding="ignore" if objective.name == "edit_flow" else spec.padding,
            block_size=objective.block_size if objective.name == "bd3lm" else spec.block_size,
            mapper=mapper,
        )


def _fit(
    job: TrainingJob,
    name: str,
    folder: RunFolder,
    prepared: Prepared,
    tokenizer,
    objective: Objective,
    shares: cluster.Shares,
    record: tracking.Run,
    board: Board,
) -> None:
    settings = without_secrets(to_dict(job))
    plan = prepared.run(job.train.epochs, job.train.max_steps)
    task = trainer.TrainTask(
        model=job.model,
        lora=job.lora,
        tokenizer=tokenizer,
        objective=job.objective,
        vocabulary=rows_needed(tokenizer),
        train=job.train,
        sampler=job.sampler,
        look_every=job.observe.every,
        seed=job.seed,
        total_steps=plan.steps,
        valid=prepared.valid,
        padding=prepared.padding,
        packed=job.data.packing,
        settings=settings,
    )
    stream = TrainStream(prepared.feed, prepared.batching, prepared.padding, plan, shares.data_cpus, objective.pairs)
    watcher = report.Watcher(plan.steps, record, prepared)
    metrics = TrainMetrics(board, plan.steps)
    look = Look(job.model, job.sampler, prepared.valid, job.observe.sample_rows, job.observe.evaluation(), job.seed)
    gpus = job.observe.gpus
    observer = Observer(look, shares.data_cpus, free_gpu(shares) if gpus is None else gpus)

    def on_events(events: list[trainer.Event]) -> None:
        watcher.on_events(events)
        metrics.on_events(events)
        for event in events:
            if event["kind"] == "checkpoint":
                folder.update(checkpoint_step=event["step"])
                if event["checkpoint"] is not None and event["step"] < plan.steps:
                    observer.offer(event["step"], event["checkpoint"])
        for seen in observer.ready():
            watcher.on_seen(seen)

    shared = job.train.storage_path
    storage, place = (shared, folder.state["name"]) if shared else (str(folder.path), CHECKPOINTS)
    last = trainer.fit(task, stream, shares, storage, place, on_events, prepared.where)

    provenance = {
        "run_id": record.run_id,
        "tracking_uri": without_secrets({"uri": record.uri})["uri"],
        "step": plan.steps,
        "data": list(prepared.accounts),
        "data_fingerprint": prepared.fingerprint,
    }
    card = report.model_card(settings, name, prepared, watcher)
    target = folder.path / FINAL
    with last.as_directory() as directory:
        checkpoint.export(Path(directory), target, card, provenance)
    record.text("model_card.md", card)
    record.tag({"dllm_ray.checkpoint": str(target)})
    folder.update(finished=True)
    observer.offer(plan.steps, last)
    for seen in observer.rest():
        watcher.on_seen(seen)
    watcher.close()
    print(f"model     {target}")
    print(f"tracking  run {record.run_id}: {tracking.ui_command(record.uri)}")


def _tokenizer_and_spec(job: TrainingJob, folder: RunFolder, corpus: Corpus) -> tuple[Any, DiffusionSpec, int | None]:
    """The model's tokenizer (trained on the data for a model from scratch), spec and context; checks its length."""
    if job.model.path is not None:
        load.check_path(job.model.path)
        if adapters.is_adapter(job.model.path):
            raise ModelError(
                f"{job.model.path} is an adapter, and training starts from a model: merge it into its base first, "
                f"python jobs/convert.py --model.path {job.model.path} --output_dir MERGED"
            )
        tokenizer, spec, loaded = load.open_tokenizer(job.model.path)
        limit = loaded.max_length
        if spec.attention == "block_causal" and job.objective.name == "mdlm":
            print("note      this model's attention is block-causal: objective.name bd3lm trains it as it is sampled")
        if limit is not None and job.train.max_length > limit:
            raise ConfigError(f"{job.train.max_length} exceeds the model's context of {limit}", "train.max_length")
        return tokenizer, spec, limit
    kept = folder.path / TOKENIZER
    if folder.resumed and kept.is_dir():
        tokenizer = tokenizers.load_tokenizer(str(kept))
    else:
        tokenizer = tokenizers.train_bpe(
            texts(corpus.shards, corpus.rules, _TOKENIZER_ROWS), job.model.scratch.vocab_size
        )
        tokenizer.save_pretrained(kept)
    scratch.check(job.model.scratch, tokenizer)
    spec = blueprint.describe(job.model.scratch.architecture, tokenizer)
    return tokenizer, spec, job.model.scratch.max_position_embeddings


def _model_name(job: TrainingJob) -> str:
    return job.model.path or f"scratch:{job.model.scratch.architecture}"


def _join_cluster(train: TrainConfig, stack: contextlib.ExitStack) -> cluster.Shares:
    workers, most = train.workers, None
    if isinstance(workers, Elastic):
        workers, most = workers.min, workers.max
    stack.enter_context(cluster.connect(most or workers or 2))
    return cluster.shares(workers, train.cpus_per_worker, train.gpus_per_worker, "train.", most)
