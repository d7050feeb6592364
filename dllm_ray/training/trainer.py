"""Ray Train around the loop: places workers, feeds them, keeps checkpoints, restarts after failures.

Workers talk to the driver through a small actor, `Mailbox`: metrics, validation results, sample texts. So the driver
alone draws progress and writes to the tracking store, wherever the workers are. The other way, it carries the wish to
stop: after an interrupt the workers save a checkpoint and end.
"""

import dataclasses
import errno
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
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dllm_ray.cluster import Shares
from dllm_ray.data.batches import PaddingRule, deal, pad
from dllm_ray.data.mixture import GlobalBatches, TrainStream, WorkerBatches
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import DllmRayError, TrainingError
from dllm_ray.models import edit_heads
from dllm_ray.models.adapters import add_lora, count_parameters
from dllm_ray.models.config import LoRAConfig, ModelConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import open_model
from dllm_ray.models.probe import check_training, unused_parameters
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.objectives import Part, build
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.training import checkpoint as checkpoints
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, StepResult, train_steps, validate
from dllm_ray.training.mailbox import Event, Mailbox
from dllm_ray.training.meter import Meter, peak_memory_gb
from dllm_ray.training.process_group import GroupConfig
from dllm_ray.training.strategies import wrap
from dllm_ray.training.strategies.base import Strategy

# Train looks after its workers at this interval, and `report` takes about as long; the default is 2 s.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1.0")

_START_PATIENCE = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_ELASTIC_START_S = 5.0
_DRIVER_PATIENCE_S = 30.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

_VALIDATION = 1 << 40  # keeps what the objective draws for validation rows apart from the steps'

_MOST_SKIPPED = 10
"""Steps in a row that may be left out for a gradient that isn't finite, before the run has diverged."""


@dataclass(frozen=True)
class TrainTask:
    """Everything a worker needs to know."""

    model: ModelConfig
    lora: LoRAConfig
    tokenizer: Any
    objective: ObjectiveConfig
    vocabulary: int
    """Tokens of the tokenizer."""
    train: TrainConfig
    """Resolved: no field that the run depends on is null."""
    sampler: SamplerConfig
    """Kept with the model as its default settings."""
    look_every: int | None
    """Checkpoints between those that hold the model for an observer; None: only the last does."""
    seed: int
    total_steps: int
    valid: TokenRows
    padding: PaddingRule
    packed: bool
    """Whether rows hold several samples."""
    settings: Mapping[str, Any]
    """The resolved settings of the job, saved with each checkpoint."""


def fit(
    task: TrainTask,
    stream: TrainStream,
    shares: Shares,
    storage_path: str,
    name: str,
    on_events: Callable[[list[Event]], None],
    where: Callable[[int, int, int], str],
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
        where: names a row of the data by source, shard and number (`Prepared.where`).

    Raises:
        DllmRayError: a worker met a user error.
        TrainingError: workers failed more often than `train.max_failures` allows.
        KeyboardInterrupt: the user interrupted, and the workers have saved a checkpoint; at once at a second time, or
            before training began.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()  # another node may be lost
    scored = {"checkpoint_score_attribute": "valid_nll", "checkpoint_score_order": "min"} if len(task.valid) else {}
    _limit_patience(shares)
    resources = {"CPU": shares.cpus} | ({"GPU": shares.gpus} if shares.gpus else {})
    trainer = ray.train.torch.TorchTrainer(
        _train_worker,
        train_loop_config={"task": task, "mailbox": mailbox},
        torch_config=GroupConfig(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=shares.workers if shares.most is None else (shares.workers, shares.most),
            use_gpu=shares.gpus > 0,
            resources_per_worker=resources,
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
    ended = threading.Event()  # an interrupted `Thread.join` would take the thread for ended
    threading.Thread(target=_fit_into, args=(trainer, outcome, ended), daemon=True).start()
    began = interrupted = False
    while not ended.is_set():
        try:
            ended.wait(0.5)
            events = _drain(mailbox, where)
            on_events(events)
        except KeyboardInterrupt:
            if interrupted or not began:
                raise
            interrupted = True
            print("\ninterrupted: saving a checkpoint; a second interrupt ends the run at once", flush=True)
            mailbox.stop.remote()
            continue
        began = began or any(event["kind"] == "start" for event in events)
        for event in events:
            if event["kind"] == "user_error":
                raise event["error"]
    on_events(_drain(mailbox, where))
    if "error" in outcome:
        raise TrainingError(_reason(outcome["error"])) from outcome["error"]
    result = outcome["result"]
    if result.checkpoint is None:
        raise TrainingError("training ended without a checkpoint")
    if interrupted and result.metrics["step"] < task.total_steps:
        raise KeyboardInterrupt
    return result.checkpoint


def _limit_patience(shares: Shares) -> None:
    """Has Train wait for the places of an elastic run's workers for seconds only, before it counts the cluster again.

    It asks for as many as it has counted room for, so there is nothing to wait for but a node that was lost: that is
    still counted for some 20 seconds, and would then be waited for as long as a fixed number of workers.
    """
    if shares.most is not None:
        os.environ[_START_PATIENCE] = str(_ELASTIC_START_S)


def _drain(mailbox, where: Callable[[int, int, int], str]) -> list[Event]:
    """The workers' events; those that name rows by number get their names."""
    events = ray.get(mailbox.drain.remote())
    for event in events:
        if event["kind"] == "not_finite":
            names = [where(source, shard, number) for _, source, shard, number in event["origins"]]
            blame = f"; rows whose loss isn't finite: {'; '.join(names)}" if names else ""
            event["what"] = f"step {event['step']}: the gradient's norm is {event['norm']:g}{blame}"
            if event["fatal"]:
                advice = (
                    "Mend or filter the rows, or leave such steps out with --train.on_nan skip"
                    if names
                    else f"Lower train.learning_rate (now {event['learning_rate']:.3g}), or raise train.warmup"
                )
                event |= {
                    "kind": "user_error",
                    "error": TrainingError(f"the run diverged at {event['what']}. {advice}"),
                }
    return events


def _fit_into(trainer: ray.train.torch.TorchTrainer, outcome: dict[str, Any], ended: threading.Event) -> None:
    try:
        outcome["result"] = trainer.fit()
    except BaseException as error:
        outcome["error"] = error
    ended.set()


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


def _train_worker(config: dict[str, Any]) -> None:
    """Runs on each worker: wires model, data, objective and strategy to the loop."""
    task, mailbox = config["task"], config["mailbox"]
    try:
        _Worker(task, mailbox).run()
    except DllmRayError as error:
        # restarting can't mend it: tell the driver, which ends the run at the first such event
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
        check_training(lm.model, task.padding.masks, task.packed or task.objective.name == "bd3lm")
        lm = trained_lm(lm, task.objective, task.sampler, task.seed)
        for name in unused_parameters(lm.model):  # DDP would wait for their gradients
            lm.model.get_parameter(name).requires_grad_(False)
        if task.lora.rank is not None:
            lm = add_lora(lm, task.lora, task.seed)
        self.parameters, self.trainable = count_parameters(lm.model)  # a strategy may cut them up
        self.strategy: Strategy = wrap(lm, task.train)
        self.objective = build(task.objective, lm.spec, task.vocabulary, lm.max_length, task.seed)
        self.shard: WorkerBatches = ray.train.get_dataset_shard("train")
        self.valid_nll: float | None = None
        self.checkpoints = 0
        self.skipped, self._last_skipped = 0, -1
        self._stopping: ray.ObjectRef | None = None
        self._sent: ray.ObjectRef | None = None

    def run(self) -> None:
        task, train = self.task, self.task.train
        step, cursor = self._restore()
        first_on_its_node = float(self.context.get_local_rank() == 0)
        (nodes,) = self.strategy.sum(torch.tensor(first_on_its_node, device=self.strategy.device))
        self._post(
            "start",
            step,
            workers=self.strategy.world_size,
            nodes=int(nodes),
            device=str(self.strategy.device),
            architecture=self.strategy.lm.architecture,
            parameters=self.parameters,
            trainable=self.trainable,
        )
        if step == 0:
            self._validate(step)
        meter = Meter(self._batches(step, cursor))
        validate_every = train.validate_every or max(task.total_steps // 10, 1)
        checkpoint_every = train.checkpoint_every or 2 * validate_every
        for result in train_steps(
            self.strategy, self.objective, meter, train, task.total_steps, task.seed, step, self._asked_to_stop
        ):
            step = result.step
            meter.count(result.batch.tokens)
            if not result.finite:
                with meter.paused():
                    self._not_finite(result)
            last = step == task.total_steps or result.stop
            due = last or step % checkpoint_every == 0
            if not result.stop and (due or step % validate_every == 0):
                with meter.paused():
                    self._validate(step)
            if result.finite and (due or step == 1 or step % train.log_every == 0):
                self._log(result, meter)
            if due:
                with meter.paused():
                    self._checkpoint(step, result.batch.cursor)
            if last:
                break
        if self._sent is not None:
            ray.get(self._sent)  # a worker that ends takes messages under way with it

    def _restore(self) -> tuple[int, Mapping[str, Any] | None]:
        """The step to go on from, and where the data stood then."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return 0, None
        with checkpoint.as_directory() as directory:
            state = checkpoints.restore(Path(directory), self.strategy)
        self.valid_nll, self.checkpoints = state["valid_nll"], state["checkpoints"]
        return state["step"], state["data"]

    def _batches(self, step: int, cursor: Mapping[str, Any] | None) -> Iterator[Batch]:
        for batch in self.shard.start(step, cursor):
            tensors = {name: torch.from_numpy(array) for name, array in batch.arrays.items()}
            yield Batch(tensors, Part(batch.start, batch.total), batch.tokens, batch.origins, batch.cursor)

    def _asked_to_stop(self) -> bool:
        """Asks the mailbox without waiting for its answer: what it said last."""
        if self.strategy.rank:
            return False
        if self._stopping is None:
            self._stopping = self.mailbox.stopping.remote()
        if not ray.wait([self._stopping], timeout=0)[0]:
            return False
        stop, self._stopping = ray.get(self._stopping), None
        return stop

    def _not_finite(self, result: StepResult) -> None:
        """Tells the driver which rows are to blame; ends the run unless the settings say to leave such steps out."""
        self.skipped = self.skipped + 1 if self._last_skipped == result.step - 1 else 1
        self._last_skipped = result.step
        fatal = self.task.train.on_nan == "stop" or self.skipped >= _MOST_SKIPPED
        rows = np.isin(result.batch.origins[:, 0], result.poisoned)
        self._post(
            "not_finite",
            result.step,
            fatal=fatal,
            norm=result.grad_norm.item(),
            learning_rate=result.learning_rate,
            origins=result.batch.origins[rows].tolist(),
        )
        if fatal:
            if self._sent is not None:
                ray.get(self._sent)
            self.strategy.sum(torch.zeros((), device=self.strategy.device))  # the names reach the driver first
            raise TrainingError(f"the run diverged at step {result.step}")

    def _log(self, result: StepResult, meter: Meter) -> None:
        loss, nll_sum, targets = self.strategy.sum(result.loss, result.nll_sum, result.targets)
        self._post(
            "metrics",
            result.step,
            values={
                "train/loss": loss.item(),
                "train/nll": (nll_sum / targets.clamp(min=1)).item(),
                "train/grad_norm": result.grad_norm.item(),
                "train/learning_rate": result.learning_rate,
                "train/epoch": result.batch.cursor["epoch"],
                "train/peak_memory_gb": peak_memory_gb(self.strategy.device),
                **meter.read(),
            },
        )

    def _validate(self, step: int) -> None:
        if not len(self.task.valid):
            return
        nll, _ = validate(self.strategy, self.objective, self._valid_batches(), self.task.seed)
        self.valid_nll = nll
        self._post("valid", step, values={"valid/nll": nll, "valid/ppl": float(torch.tensor(nll).exp())})

    def _valid_batches(self) -> Iterator[Batch]:
        valid, size = self.task.valid, self.task.train.batch_size
        for start in range(0, len(valid), size):
            rows = valid.take(np.arange(start, min(start + size, len(valid))))
            arrays = pad(rows, self.task.padding)
            if self.objective.pairs is not None:
                arrays = self.objective.pairs(arrays, _VALIDATION + start)
            parts = deal(arrays, self.strategy.world_size)
            own = parts[self.strategy.rank]
            tensors = {name: torch.from_numpy(array) for name, array in own.items()}
            part = Part(self.strategy.rank * len(parts[0]["input_ids"]), len(rows))
            yield Batch(tensors, part, int(rows.lengths.sum()))

    def _checkpoint(self, step: int, cursor: Mapping[str, Any]) -> None:
        task = self.task
        self.checkpoints += 1
        metrics = {"step": step} | ({} if self.valid_nll is None else {"valid_nll": self.valid_nll})
        state = {"step": step, "valid_nll": self.valid_nll, "checkpoints": self.checkpoints, "data": cursor}
        looked_at = task.look_every is not None and self.checkpoints % task.look_every == 0
        model = looked_at or step == task.total_steps
        try:
            with tempfile.TemporaryDirectory() as folder:
                checkpoints.save(Path(folder), self.strategy, task.settings, state, model)
                if self.strategy.rank == 0:
                    self._until_told()
                files = ray.train.Checkpoint.from_directory(folder) if any(Path(folder).iterdir()) else None
                ray.train.report(metrics, checkpoint=files)
        except OSError as error:
            if error.errno in _NO_ROOM or any(os.strerror(number) in str(error) for number in _NO_ROOM):
                raise TrainingError(
                    f"the checkpoint of step {step} can't be written: {error}. Those before it are intact: make room, "
                    "and the same command goes on from the last one"
                ) from error
            raise
        # `report` returns before Train has the checkpoint on record; a failure now would go back to the one before
        committed = ray.train.CheckpointConsistencyMode.COMMITTED
        reported = ray.train.get_all_reported_checkpoints(consistency_mode=committed)
        self._post(
            "checkpoint",
            step,
            checkpoint=reported[-1].checkpoint if looked_at else None,
            given=cursor["given"],
            accounts=self.shard.accounts(),
        )

    def _until_told(self) -> None:
        """Waits until the driver has every event: a run that resumes at a checkpoint won't repeat the steps before it,
        so their metrics must not die with the driver."""
        given_up = time.monotonic() + _DRIVER_PATIENCE_S
        while ray.get(self.mailbox.waiting.remote()) and time.monotonic() < given_up:
            time.sleep(0.05)

    def _post(self, kind: str, step: int, **values: Any) -> None:
        if self.strategy.rank == 0:
            self._sent = self.mailbox.post.remote({"kind": kind, "step": step, **values})


def trained_lm(lm: DiffusionLM, objective: ObjectiveConfig, sampler: SamplerConfig, seed: int) -> DiffusionLM:
    """The model as an objective trains it: with the facts of `trained_spec`, and for Edit Flow with edit heads."""
    if objective.name == "edit_flow" and lm.spec.edit_heads is None:
        lm = edit_heads.attach(lm, objective.edit_time, seed)
    return DiffusionLM(lm.model, lm.tokenizer, trained_spec(lm, objective, sampler))


def trained_spec(lm: DiffusionLM, objective: ObjectiveConfig, sampler: SamplerConfig) -> DiffusionSpec:
    """The facts of a model after training: BD3LM makes its attention block-causal, Edit Flow's sampler follows the
    objective's schedule, and the default sampler settings are those it was trained beside."""
    spec = with_sampler(lm.spec, sampler)
    if objective.name == "edit_flow":
        return dataclasses.replace(spec, sampler=dict(spec.sampler) | {"kappa": objective.kappa})
    if objective.name != "bd3lm":
        return spec
    fits = {"block_size": objective.block_size}
    if lm.layers is not None and spec.sampler.get("cache", "none") == "none":
        fits["cache"] = "block"
    return dataclasses.replace(
        spec, attention="block_causal", block_size=objective.block_size, sampler=dict(spec.sampler) | fits
    )


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
