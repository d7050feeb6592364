"""Ray Train around the loop: places workers, feeds them, keeps checkpoints, restarts after failures.

Workers talk to the driver through a small actor, `_Mailbox`: metrics, validation results, sample texts. So the driver
alone draws progress and writes to the tracking store, wherever the workers are.
"""

import dataclasses
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.torch
import torch

from dllm_ray import chat
from dllm_ray.cluster import Shares
from dllm_ray.data.batches import PaddingRule, deal, pad
from dllm_ray.data.mixture import GlobalBatches, TrainStream, WorkerBatches
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import ConfigError, DllmRayError, TrainingError
from dllm_ray.models.adapters import add_lora
from dllm_ray.models.config import LoRAConfig, ModelConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import open_model
from dllm_ray.models.spec import IGNORE_INDEX, DiffusionSpec
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.objectives.mdlm import MDLM, Part
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.training import checkpoint as checkpoints
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, StepResult, train_steps, validate
from dllm_ray.training.meter import Meter
from dllm_ray.training.strategies import wrap
from dllm_ray.training.strategies.base import Strategy

# Train looks after its workers at this interval, and `report` takes about as long; the default is 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")

_DRIVER_PATIENCE_S = 30.0

Event = dict[str, Any]
"""What a worker tells the driver: `kind` (start, metrics, valid, checkpoint, samples), `step`, and values."""


@dataclass(frozen=True)
class TrainTask:
    """Everything a worker needs to know."""

    model: ModelConfig
    lora: LoRAConfig
    tokenizer: Any
    objective: ObjectiveConfig
    train: TrainConfig
    """Resolved: no field that the run depends on is null."""
    sampler: SamplerConfig
    """How the sample texts at the end are made."""
    sample_rows: int
    """How many validation rows get a sample text."""
    seed: int
    total_steps: int
    epoch_rows: int
    """Rows in one pass over the data."""
    valid: TokenRows
    padding: PaddingRule
    settings: Mapping[str, Any]
    """The resolved settings of the job, saved with each checkpoint."""


def total_steps(config: TrainConfig, rows: int) -> tuple[int, int]:
    """Optimizer steps and rows of a run over a data set of `rows` rows."""
    if config.max_steps is not None:
        return config.max_steps, config.max_steps * config.batch_size
    all_rows = max(round(config.epochs * rows), 1)
    return -(-all_rows // config.batch_size), all_rows


def fit(
    task: TrainTask,
    stream: TrainStream,
    shares: Shares,
    storage_path: str,
    name: str,
    on_events: Callable[[list[Event]], None],
) -> ray.train.Checkpoint:
    """Trains, and returns the last checkpoint.

    An earlier run of the same name in the same storage is gone on with from its last checkpoint.

    Args:
        task: the run.
        stream: its data.
        shares: workers and what each reserves.
        storage_path: folder or URL that every node can reach.
        name: folder below it for the run's checkpoints.
        on_events: called in this thread with what workers report, every half second.

    Raises:
        DllmRayError: a worker met a user error.
        TrainingError: workers failed more often than `train.max_failures` allows.
    """
    mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
    scored = {"checkpoint_score_attribute": "valid_nll", "checkpoint_score_order": "min"} if len(task.valid) else {}
    resources = {"CPU": shares.cpus} | ({"GPU": shares.gpus} if shares.gpus else {})
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"task": task, "mailbox": mailbox},
        scaling_config=ray.train.ScalingConfig(
            num_workers=shares.workers, use_gpu=shares.gpus > 0, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=task.train.keep_checkpoints, **scored),
            failure_config=ray.train.FailureConfig(max_failures=task.train.max_failures),
        ),
        datasets={"train": stream},
        dataset_config=GlobalBatches(),
    )
    # In a thread of its own, so that an interrupt reaches us and not Train, which would end the process with status 0.
    outcome: dict[str, Any] = {}
    thread = threading.Thread(target=_fit_into, args=(trainer, outcome), daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        events = ray.get(mailbox.drain.remote())
        on_events(events)
        for event in events:
            if event["kind"] == "user_error":
                raise event["error"]
    on_events(ray.get(mailbox.drain.remote()))
    if "error" in outcome:
        raise TrainingError(_reason(outcome["error"])) from outcome["error"]
    result = outcome["result"]
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint")
    return result.checkpoint


def _fit_into(trainer: ray.train.torch.TorchTrainer, outcome: dict[str, Any]) -> None:
    try:
        outcome["result"] = trainer.fit()
    except BaseException as error:
        outcome["error"] = error


def _reason(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = next(iter(failures.items()))
        return f"worker {rank} failed, and no restart was left: {_cause(str(failure))}"
    return f"{type(error).__name__}: {error}"


def _cause(traceback: str) -> str:
    """The line that says most in a chain of tracebacks: the last error of ours, or the last of anybody's."""
    lines = traceback.strip().splitlines()
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Exit)\b", line)]
    ours = [line.partition(": ")[2] for line in named if line.startswith(DllmRayError.__module__)]
    return (ours or named or lines)[-1]


class _Mailbox:
    """Carries events from workers to the driver; never blocks either."""

    def __init__(self):
        self._events: list[Event] = []

    def post(self, event: Event) -> None:
        self._events.append(event)

    def drain(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def waiting(self) -> int:
        """Events that the driver has not taken yet."""
        return len(self._events)


def _train_worker(config: dict[str, Any]) -> None:
    """Runs on each worker: wires model, data, objective and strategy to the loop."""
    task, mailbox = config["task"], config["mailbox"]
    try:
        _Worker(task, mailbox).run()
    except DllmRayError as error:
        # restarting can't mend it: tell the driver, which ends the run
        ray.get(mailbox.post.remote({"kind": "user_error", "step": 0, "error": error}))
        raise


class _Worker:
    def __init__(self, task: TrainTask, mailbox):
        self.task = task
        self.mailbox = mailbox
        self.context = ray.train.get_context()
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(task.train.threads_per_worker or max(cores // self.context.get_local_world_size(), 1))
        lm = open_model(task.model, task.tokenizer, task.seed, str(device))
        lm.spec = with_sampler(lm.spec, task.sampler)
        if task.lora.rank is not None:
            lm = add_lora(lm, task.lora, task.seed)
        self.strategy: Strategy = wrap(lm, task.train)
        self.objective = build_objective(task.objective, self.strategy.lm)
        self.valid_nll: float | None = None

    def run(self) -> None:
        task, train = self.task, self.task.train
        step = self._restore()
        model = self.strategy.lm.model
        self._post(
            "start",
            step,
            workers=self.strategy.world_size,
            device=str(self.strategy.lm.device),
            architecture=self.strategy.lm.architecture,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trainable=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        )
        if step == 0:
            self._validate(step)
        shard: WorkerBatches = ray.train.get_dataset_shard("train")
        meter = Meter(self._batches(shard, step))
        validate_every = train.validate_every or max(task.total_steps // 10, 1)
        checkpoint_every = train.checkpoint_every or 2 * validate_every
        for result in train_steps(
            self.strategy, self.objective, meter, train, task.total_steps, task.seed, start_step=step
        ):
            meter.count(result.tokens)
            step = result.step
            last = step == task.total_steps
            due = last or step % checkpoint_every == 0
            if due or step == 1 or step % train.log_every == 0:
                self._log(result, meter)
            if due or step % validate_every == 0:
                with meter.paused():
                    self._validate(step)
                    if due:
                        self._checkpoint(step)
        if step == task.total_steps:
            self._samples(step)

    def _restore(self) -> int:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0
        with checkpoint.as_directory() as directory:
            state = checkpoints.restore(Path(directory), self.strategy)
        self.valid_nll = state["valid_nll"]
        return state["step"]

    def _batches(self, shard: WorkerBatches, step: int) -> Iterator[Batch]:
        for batch in shard.start(step):
            tensors = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
            yield Batch(tensors, Part(batch.start, batch.total), batch.tokens)

    def _log(self, result: StepResult, meter: Meter) -> None:
        loss, nll_sum, targets = self.strategy.sum(result.loss, result.nll_sum, result.targets)
        if not (loss.isfinite() and result.grad_norm.isfinite()):
            raise TrainingError(
                f"the run diverged: at step {result.step} the loss is {loss.item():g} and the gradient's norm "
                f"{result.grad_norm.item():g}, with a learning rate of {result.learning_rate:.3g}. Lower "
                "train.learning_rate, or raise train.warmup"
            )
        self._post(
            "metrics",
            result.step,
            values={
                "train/loss": loss.item(),
                "train/nll": (nll_sum / targets.clamp(min=1)).item(),
                "train/grad_norm": result.grad_norm.item(),
                "train/learning_rate": result.learning_rate,
                "train/epoch": result.step * self.task.train.batch_size / self.task.epoch_rows,
                **meter.read(),
            },
        )

    def _validate(self, step: int) -> None:
        if not len(self.task.valid):
            return
        nll, _ = validate(self.strategy, self.objective, self._valid_batches(), self.task.train, self.task.seed)
        self.valid_nll = nll
        self._post("valid", step, values={"valid/nll": nll, "valid/ppl": float(torch.tensor(nll).exp())})

    def _valid_batches(self) -> Iterator[Batch]:
        valid, size = self.task.valid, self.task.train.batch_size
        for start in range(0, len(valid), size):
            rows = valid.take(np.arange(start, min(start + size, len(valid))))
            parts = deal(pad(rows, self.task.padding), self.strategy.world_size)
            own = parts[self.strategy.rank]
            tensors = {name: torch.from_numpy(array) for name, array in own.items()}
            part = Part(self.strategy.rank * len(parts[0]["input_ids"]), len(rows))
            yield Batch(tensors, part, int(rows.lengths.sum()))

    def _checkpoint(self, step: int) -> None:
        metrics = {"step": step} | ({} if self.valid_nll is None else {"valid_nll": self.valid_nll})
        with tempfile.TemporaryDirectory() as folder:
            state = {"step": step, "valid_nll": self.valid_nll}
            checkpoints.save(Path(folder), self.strategy, self.task.settings, state)
            if self.strategy.rank == 0:
                self._until_told()
            files = ray.train.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
            ray.train.report(metrics, checkpoint=files)
            # `report` returns before Train has the checkpoint on record; a failure now would go back to the one before
            committed = ray.train.CheckpointConsistencyMode.COMMITTED
            ray.train.get_all_reported_checkpoints(consistency_mode=committed)
        self._post("checkpoint", step)

    def _until_told(self) -> None:
        """Waits until the driver has every event: a run that resumes at a checkpoint won't repeat the steps before it,
        so their metrics must not die with the driver."""
        given_up = time.monotonic() + _DRIVER_PATIENCE_S
        while ray.get(self.mailbox.waiting.remote()) and time.monotonic() < given_up:
            time.sleep(0.05)

    def _samples(self, step: int) -> None:
        task = self.task
        if self.strategy.rank or not task.sample_rows or not len(task.valid):
            return
        lm = DiffusionLM(self.strategy.lm.model.eval(), self.strategy.lm.tokenizer, self.strategy.lm.spec)
        samples, problem = [], None
        try:
            samples = sample_texts(lm, task.valid, task.sample_rows, task.sampler)
        except DllmRayError as error:  # settings of the sampler must not cost the trained model
            problem = str(error)
        self._post("samples", step, samples=samples, problem=problem)
        ray.get(self._sent)  # a worker that ends takes messages under way with it

    def _post(self, kind: str, step: int, **values: Any) -> None:
        if self.strategy.rank == 0:
            self._sent = self.mailbox.post.remote({"kind": kind, "step": step, **values})


def build_objective(config: ObjectiveConfig, lm: DiffusionLM) -> MDLM:
    """The objective that settings name, for a model."""
    return MDLM(lm.spec, config.schedule, config.weight, config.norm, None, config.time_epsilon, config.stratified)


def with_sampler(spec: DiffusionSpec, config: SamplerConfig) -> DiffusionSpec:
    """A model's spec whose default sampler settings are those it was trained beside; a seed belongs to a run."""
    defaults = SamplerConfig()
    chosen = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name in spec.sampler or getattr(config, field.name) != getattr(defaults, field.name)
    }
    chosen.pop("seed", None)
    return dataclasses.replace(spec, sampler=dict(spec.sampler) | chosen)


def sample_texts(lm: DiffusionLM, rows: TokenRows, count: int, config: SamplerConfig) -> list[dict[str, str]]:
    """Answers to the questions of token rows, beside the answers the rows hold.

    The first `count` questions are taken that leave room for `config.max_new_tokens` in the model's context.

    Raises:
        ConfigError: there are none, or the sampler's settings don't fit the model.
    """
    starts = rows.lengths.cumsum() - rows.lengths
    room = (lm.max_length or math.inf) - (config.max_new_tokens or 1)
    prompts, answers = [], []
    for start, length in zip(starts.tolist(), rows.lengths.tolist(), strict=True):
        ids, labels = rows.ids[start : start + length], rows.labels[start : start + length]
        begin = int((labels != IGNORE_INDEX).argmax())
        if begin <= room and len(prompts) < count:
            prompts.append(ids[:begin].tolist())
            answers.append(ids[begin:].tolist())
    if not prompts:
        raise ConfigError("no validation prompt leaves room for it in the model's context", "sampler.max_new_tokens")
    output = Sampler(lm, config).sample(prompts)
    return [
        {
            "prompt": chat.decode(lm.tokenizer, prompt),
            "expected": chat.decode(lm.tokenizer, answer, lm.spec.eot_text),
            "sampled": chat.decode(lm.tokenizer, sampled, lm.spec.eot_text),
        }
        for prompt, answer, sampled in zip(prompts, answers, output.completions, strict=True)
    ]
