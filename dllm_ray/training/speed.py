"""How fast and how lean training is: the loop under Ray Train, the same loop alone, and what one would write by hand.

Each loop runs in a process of its own, so that peaks of memory don't mix.
"""

import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Any

import torch
import torch.nn.functional as F

from dllm_ray import cluster
from dllm_ray.data.mixture import TrainStream
from dllm_ray.data.prepare import Prepared
from dllm_ray.data.stream import batches as stream_batches
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.models.config import LoRAConfig, ModelConfig
from dllm_ray.models.load import open_model
from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.models.vocabulary import rows_needed
from dllm_ray.objectives import Part, build
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.training import trainer
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, train_steps
from dllm_ray.training.meter import peak_memory_gb
from dllm_ray.training.strategies import wrap

CHUNK = 5
"""Steps of one reading; the median of many short readings is not moved by a passing disturbance."""


@dataclass(frozen=True)
class Workload:
    """What is trained."""

    model: ModelConfig
    lora: LoRAConfig
    tokenizer: Any
    objective: ObjectiveConfig
    train: TrainConfig
    """`max_steps` says how long, warm-up included; one worker."""
    warmup_steps: int
    """Steps that are not measured."""
    seed: int


@dataclass(frozen=True)
class Reading:
    """What one turn of a loop showed."""

    tokens_per_s: list[float]
    """Tokens without padding, every few steps."""
    peak_memory_gb: float
    """Most memory held by the process, or by tensors on the GPU."""
    data_wait: float = 0.0
    """Share of the time spent waiting for data."""


def alone(work: Workload, prepared: Prepared) -> Reading:
    """The training loop over batches in memory, without Ray."""
    return _in_fresh_process(_alone, work, _in_memory(work, prepared))


def bare(work: Workload, prepared: Prepared) -> Reading:
    """What one would write by hand: rows padded to the longest of their batch, the logits of every position, plain
    cross-entropy over the masked ones."""
    return _in_fresh_process(_bare, work, _in_memory(work, prepared))


def under_ray(work: Workload, prepared: Prepared) -> Reading:
    """The training loop as a job runs it. Ray is connected."""
    shares = cluster.shares(1, work.train.cpus_per_worker, work.train.gpus_per_worker, "train.")
    steps = work.train.max_steps
    task = trainer.TrainTask(
        model=work.model,
        lora=work.lora,
        tokenizer=work.tokenizer,
        objective=work.objective,
        vocabulary=rows_needed(work.tokenizer),
        train=replace(work.train, checkpoint_every=steps, log_every=CHUNK),  # nothing but steps in between
        sampler=SamplerConfig(),
        look_every=None,
        seed=work.seed,
        total_steps=steps,
        valid=TokenRows.of([]),
        padding=prepared.padding,
        packed=prepared.batching.rule == "packed",
        settings={},
    )
    run = prepared.run(1.0, steps)
    stream = TrainStream(prepared.feed, prepared.batching, prepared.padding, run, shares.data_cpus)
    measured: list[dict[str, float]] = []

    def on_events(events: list[trainer.Event]) -> None:
        measured.extend(
            event["values"] for event in events if event["kind"] == "metrics" and event["step"] > work.warmup_steps
        )

    with tempfile.TemporaryDirectory() as folder:
        trainer.fit(task, stream, shares, folder, "benchmark", on_events, prepared.where)
    waits = [values["train/data_wait"] for values in measured]
    return Reading(
        [values["train/tokens_per_s"] for values in measured],
        max(values["train/peak_memory_gb"] for values in measured),
        sum(waits) / len(waits),
    )


def _in_memory(work: Workload, prepared: Prepared) -> list[Batch]:
    steps = work.train.max_steps
    made = stream_batches(prepared.feed, prepared.batching, prepared.padding, prepared.run(1.0, steps))
    return [
        Batch(
            {name: torch.from_numpy(array) for name, array in batch.arrays.items()}, Part(0, batch.total), batch.tokens
        )
        for batch in made
    ]


def _in_fresh_process(loop: Callable[..., Reading], work: Workload, batches: Sequence[Batch]) -> Reading:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_with_threads, loop, work, batches).result()


def _with_threads(loop: Callable[..., Reading], work: Workload, batches: Sequence[Batch]) -> Reading:
    torch.set_num_threads(work.train.threads_per_worker or os.cpu_count() or 1)
    return loop(work, batches)


def _alone(work: Workload, batches: Sequence[Batch]) -> Reading:
    lm = open_model(work.model, work.tokenizer, work.seed, device())
    strategy = wrap(lm, work.train)
    objective = build(work.objective, lm.spec)
    clock = _Clock(work)
    for result in train_steps(strategy, objective, batches, work.train, len(batches), work.seed):
        clock.tick(result.step, result.batch.tokens)
    return Reading(clock.readings, peak_memory_gb(lm.device))


def _bare(work: Workload, batches: Sequence[Batch]) -> Reading:
    lm = open_model(work.model, work.tokenizer, work.seed, device())
    model = lm.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=work.train.learning_rate)
    clock = _Clock(work)
    for step, batch in enumerate(batches, start=1):
        ids, labels = batch.tensors["input_ids"].to(lm.device), batch.tensors["labels"].to(lm.device)
        attention_mask = batch.tensors.get("attention_mask")
        if attention_mask is not None:
            attention_mask = attention_mask.to(lm.device)
        t = torch.rand(len(ids), 1, device=lm.device).clamp(min=work.objective.time_epsilon)
        masked = (torch.rand(ids.shape, device=lm.device) < t) & (labels != IGNORE_INDEX)
        noised = torch.where(masked, lm.spec.mask_token_id, ids)
        with torch.autocast(lm.device.type, torch.bfloat16, enabled=work.train.precision == "bf16"):
            logits = model(input_ids=noised, attention_mask=attention_mask).logits
        nll = F.cross_entropy(logits.float().transpose(1, 2), ids, reduction="none")
        loss = (nll * masked / t).sum() / (labels != IGNORE_INDEX).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.tick(step, batch.tokens)
    return Reading(clock.readings, peak_memory_gb(lm.device))


class _Clock:
    """Tokens per second of every few steps after the warm-up."""

    def __init__(self, work: Workload):
        self._warmup = work.warmup_steps
        self._tokens = 0
        self._began = time.perf_counter()
        self.readings: list[float] = []

    def tick(self, step: int, tokens: int) -> None:
        self._tokens += tokens
        if step % CHUNK:
            return
        now = time.perf_counter()
        if step > self._warmup:
            self.readings.append(self._tokens / (now - self._began))
        self._tokens, self._began = 0, now


def device() -> str:
    """Where one process trains."""
    return "cuda" if torch.cuda.is_available() else "cpu"
