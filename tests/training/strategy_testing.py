"""Runs strategies in process groups of their own, over gloo and without Ray. `test_strategies` says what must hold.

The processes fork from a server that has the heavy imports behind it.
"""

import multiprocessing
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from dllm_ray.errors import ConfigError
from dllm_ray.models import edit_heads
from dllm_ray.models.adapters import add_lora
from dllm_ray.models.config import LoRAConfig, ScratchConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.probe import unused_parameters
from dllm_ray.models.scratch import build
from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.models.tokenizers import train_bpe
from dllm_ray.objectives import MDLM, EditFlow, Objective, Part
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.loop import Batch, StepResult, train_steps, validate
from dllm_ray.training.strategies import deepspeed, wrap
from dllm_ray.training.strategies.base import Strategy

STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
OFFLOADS = {
    "ddp": (),
    "fsdp2": ("all",),
    "zero1": ("optimizer",),
    "zero2": ("optimizer",),
    "zero3": ("optimizer", "all"),
}
STEPS = 30
SAVED = 15
"""Steps done when a checkpoint is written."""
ROWS = 24

_Task = Callable[..., Any]


def in_group(workers: int, folder: Path, task: _Task, *arguments: Any) -> list[Any]:
    """What `task(*arguments)` returns on each worker of a new process group.

    Args:
        workers: how many.
        folder: an empty one, for the workers to meet in.
        task: a function of a module that workers can import.
    """
    folder.mkdir(parents=True)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "deepspeed"])
    processes = [server.Process(target=_work, args=(rank, workers, folder, task, arguments)) for rank in range(workers)]
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    with mock.patch.dict(os.environ, environment):  # the server starts with the first of them
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    failures = [path.read_text() for path in sorted(folder.glob("failure-*"))]
    assert not failures, "\n".join(failures)
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(workers)]


def _work(rank: int, workers: int, folder: Path, task: _Task, arguments: tuple) -> None:
    torch.set_num_threads(1)
    try:
        if workers > 1:
            store = dist.FileStore(str(folder / "store"), workers)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
        result = task(*arguments)
        torch.save(result, folder / f"result-{rank}.pt")
    except BaseException:
        (folder / f"failure-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the others must not wait for it


@cache
def tokenizer():
    return train_bpe(["the quick brown fox jumps over the lazy dog"] * 8, 300)


def make_lm(architecture: str = "bert", seed: int = 0, **sizes: Any) -> DiffusionLM:
    defaults = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    return build(ScratchConfig(architecture=architecture, vocab_size=300, **(defaults | sizes)), tokenizer(), seed)


def make_batches(
    strategy: Strategy, start: int = 0, stop: int = STEPS, objective: Objective | None = None
) -> list[Batch]:
    """This worker's part of the same global batches on any number of workers."""
    generator = torch.Generator().manual_seed(5)
    own = ROWS // strategy.world_size
    first = own * strategy.rank
    batches = []
    for step in range(stop):
        ids = torch.randint(10, 200, (ROWS, 12), generator=generator)
        labels = ids.clone()
        labels[:, :4] = IGNORE_INDEX
        arrays = {"input_ids": ids.numpy(), "labels": labels.numpy()}
        if objective is not None and objective.pairs is not None:
            arrays = objective.pairs(arrays, step)
        tensors = {name: torch.from_numpy(array[first : first + own]) for name, array in arrays.items()}
        batches.append(Batch(tensors, Part(first, ROWS), ids.numel()))
    return batches[start:]


def settings(strategy: str, workers: int, parts: int = 1, **changes: Any) -> TrainConfig:
    defaults = {"learning_rate": 3e-3, "precision": "float32", "max_steps": STEPS, "clip_norm": 0.5}
    size = ROWS // workers // parts
    return TrainConfig(strategy=strategy, micro_batch_size=size, **(defaults | changes))


def train(
    strategy: Strategy, config: TrainConfig, start: int = 0, stop: int = STEPS, objective: Objective | None = None
) -> list[tuple[float, float]]:
    """(loss, norm of the gradient) of each step."""
    objective = objective or MDLM(strategy.lm.spec)
    batches = make_batches(strategy, start, stop, objective)

    def figures(result: StepResult) -> tuple[float, float]:
        return strategy.sum(result.loss)[0].item(), result.grad_norm.item()

    return [figures(result) for result in train_steps(strategy, objective, batches, config, STEPS, 0, start)]


def valid_nll(strategy: Strategy) -> float:
    return validate(strategy, MDLM(strategy.lm.spec), make_batches(strategy, 0, 2), 0)[0]


def curves(workers: int, exports: Path, checkpoints: Path | None = None) -> dict[str, dict[str, Any]]:
    """Trains under each strategy, with each worker's rows at once and in four parts; the latter is saved on the way."""
    keep_nothing_whole()
    found = {}
    for name in STRATEGIES:
        whole, parts = settings(name, workers), settings(name, workers, parts=4)
        strategy = wrap(make_lm(), whole)
        at_once = train(strategy, whole)
        strategy.export(exports / name)
        strategy = wrap(make_lm(), parts)
        accumulated = train(strategy, parts, stop=SAVED)
        if checkpoints is not None:
            save(strategy, checkpoints / name)
        nll = valid_nll(strategy)
        accumulated += train(strategy, parts, start=SAVED)
        found[name] = {"at once": at_once, "accumulated": accumulated, "nll": nll}
    return found


def save(strategy: Strategy, directory: Path) -> None:
    """Every worker writes into a folder of its own, and the folders are merged, as Ray Train does it."""
    own = directory.with_name(f"{directory.name}-{strategy.rank}")
    own.mkdir(parents=True)
    strategy.save(own)
    shutil.copytree(own, directory, dirs_exist_ok=True)
    strategy.sum(torch.zeros(()))  # all are done


def go_on(workers: int, checkpoints: Path, steps: int, written_by: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Restores checkpoints into other weights, and trains a few steps more.

    Args:
        workers: how many there are.
        checkpoints: the folder of all checkpoints.
        steps: how many to take.
        written_by: strategy that restores -> strategy that saved.
    """
    keep_nothing_whole()
    found = {}
    for name, origin in written_by.items():
        config = settings(name, workers)
        lm = make_lm()
        for parameter in lm.model.parameters():
            parameter.data.mul_(1.5)
        strategy = wrap(lm, config)
        strategy.load(checkpoints / origin)
        nll = valid_nll(strategy)
        found[name] = {"nll": nll, "steps": train(strategy, config, SAVED, SAVED + steps)}
    return found


def refused(checkpoints: Path, written_by: dict[str, str]) -> dict[str, str]:
    """What strategies say about the checkpoints of others, by name."""
    found = {}
    for name, origin in written_by.items():
        try:
            wrap(make_lm(), settings(name, 1)).load(checkpoints / origin)
        except ConfigError as error:
            found[name] = str(error)
    return found


def variants(folder: Path) -> dict[tuple[str, str], Any]:
    """What the options of strategies come to: (option, strategy) -> the first steps."""
    keep_nothing_whole()
    found: dict[tuple[str, str], Any] = {}
    steps = 3

    def run(option: str, name: str, lm: DiffusionLM, **changes: Any) -> tuple[Strategy, TrainConfig]:
        config = settings(name, 2, parts=2, **changes)
        strategy = wrap(lm, config)
        found[option, name] = train(strategy, config, stop=steps)
        return strategy, config

    for name in STRATEGIES:
        strategy, _ = run("none", name, make_lm("llama"))
        found["untouched", name] = unless_finite(strategy)
        layers = Calls()
        lm = make_lm("llama")
        lm.model.base_model.layers[0].mlp.register_forward_pre_hook(layers.count)
        run("activation checkpointing", name, lm, activation_checkpointing=True)
        found["calls", name] = layers.number
        for offload in OFFLOADS[name]:
            strategy, config = run(f"offload {offload}", name, make_lm("llama"), offload=offload)
            save(strategy, folder / f"{name}-{offload}")
            again = wrap(make_lm("llama", seed=1), config)
            again.load(folder / f"{name}-{offload}")
            found[f"offload {offload}, after", name] = [train(it, config, steps, steps + 2) for it in (strategy, again)]
        lm = add_lora(make_lm("llama"), LoRAConfig(rank=2), seed=0)
        strategy, config = run("lora", name, lm, activation_checkpointing=True)
        strategy.export(folder / "adapters" / name)
        save(strategy, folder / f"{name}-lora")
        again = wrap(add_lora(make_lm("llama"), LoRAConfig(rank=2), seed=1), config)
        again.load(folder / f"{name}-lora")
        found["lora, after", name] = [train(it, config, steps, steps + 2) for it in (strategy, again)]
    for name in STRATEGIES:  # last: DeepSpeed's autocast stays on in a process
        run("bf16", name, make_lm("llama"), precision="bf16")
        lm = make_lm("llama")
        lm.model.bfloat16()
        run("bf16 weights", name, lm, precision="bf16")
    return found


def edit_curves(workers: int, folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """Trains edit heads and an adapter beside them under strategies: name -> steps."""
    keep_nothing_whole()
    found = {}
    for name in names:
        for adapter in (False, True):
            lm = edit_heads.attach(make_lm("llama"), time=True)
            for unused in unused_parameters(lm.model):
                lm.model.get_parameter(unused).requires_grad_(False)
            lm = add_lora(lm, LoRAConfig(rank=2), seed=0) if adapter else lm
            objective = EditFlow(lm.spec, vocabulary=200, x0=("noised", "empty"), logits_at_once=8)
            config = settings(name, workers, parts=2, clip_norm=1.0)
            strategy = wrap(lm, config)
            key = f"{name}, adapter" if adapter else name
            found[key] = train(strategy, config, stop=8, objective=objective)
            strategy.export(folder / key)
    return found


class Calls:
    """Counts the calls of a module."""

    def __init__(self):
        self.number = 0

    def count(self, *_arguments: Any) -> None:
        self.number += 1


def unless_finite(strategy: Strategy) -> tuple[float, list[float]]:
    """The norm of a step whose gradient isn't finite on one worker, and the validation nll before and after it."""
    before = valid_nll(strategy)
    objective = MDLM(strategy.lm.spec)
    noisy = objective.corrupt(make_batches(strategy)[0].tensors, torch.Generator().manual_seed(0))
    with strategy.micro_batch(last=True):
        loss = objective.loss(strategy.lm, noisy).loss
        strategy.backward(loss * (float("nan") if strategy.rank else 1.0))
    norm = strategy.step(1.0, 0.5).item()
    return norm, [before, valid_nll(strategy)]


def keep_nothing_whole() -> None:
    """Lets ZeRO-3 cut every parameter; it keeps small ones whole, and tests' models have no others."""
    deepspeed._SMALL = 0
