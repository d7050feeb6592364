"""Looks at a model while it trains: sample texts and small evaluations of checkpoints, made by a Ray task beside the
training, on what it leaves free.

At most one look is under way. A checkpoint that is due meanwhile waits, and gives way to the next one.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch

from dllm_ray import chat
from dllm_ray.cluster import Shares
from dllm_ray.data.tokenize import TokenRows
from dllm_ray.errors import ConfigError, DllmRayError
from dllm_ray.evaluation.config import EvaluateConfig, LikelihoodConfig
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import open_model
from dllm_ray.models.spec import IGNORE_INDEX
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import Sampler
from dllm_ray.training.report import Seen
from dllm_ray.training.strategies.base import MODEL


@dataclass(frozen=True)
class Look:
    """What is asked of a checkpoint."""

    model: ModelConfig
    """How the trained model is opened: dtype and quantization; the path is the checkpoint's."""
    sampler: SamplerConfig
    rows: TokenRows
    """Validation rows."""
    sample_rows: int
    """How many of them get a sample text."""
    evaluation: EvaluateConfig | None
    seed: int


class Observer:
    """Looks at checkpoints one after the other.

    Args:
        look: what to ask.
        cpus: CPUs that a look reserves.
        gpus: GPUs that it reserves.
    """

    def __init__(self, look: Look, cpus: float, gpus: float):
        self._look = ray.put(look)
        self._task = ray.remote(_observe).options(num_cpus=cpus, num_gpus=gpus, max_retries=1)
        self._under_way: tuple[int, ray.ObjectRef] | None = None
        self._next: tuple[int, ray.train.Checkpoint] | None = None

    def offer(self, step: int, checkpoint: ray.train.Checkpoint) -> None:
        """Asks for a look at a checkpoint."""
        self._next = (step, checkpoint)
        self._begin()

    def ready(self) -> list[Seen]:
        """What was found since the last call; never waits."""
        if self._under_way is None or not ray.wait([self._under_way[1]], timeout=0)[0]:
            return []
        return [self._finish()]

    def rest(self) -> list[Seen]:
        """Waits for everything that was asked for."""
        found = []
        while self._under_way is not None:
            found.append(self._finish())
        return found

    def _begin(self) -> None:
        if self._under_way is None and self._next is not None:
            step, checkpoint = self._next
            self._under_way, self._next = (step, self._task.remote(self._look, step, checkpoint)), None

    def _finish(self) -> Seen:
        step, call = self._under_way
        try:
            seen = ray.get(call)
        except ray.exceptions.RayError as error:  # whatever befell the process that looked, training goes on
            seen = Seen(step, problems=[str(error).strip().splitlines()[-1]])
        self._under_way = None
        self._begin()
        return seen


def _observe(look: Look, step: int, checkpoint: ray.train.Checkpoint) -> Seen:
    """Runs in a process of its own."""
    device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
    if device == "cpu":
        torch.set_num_threads(max((os.cpu_count() or 2) // 2, 1))
    try:
        with checkpoint.as_directory() as directory:
            model = Path(directory) / MODEL
            if not model.is_dir():
                return Seen(step, problems=["newer checkpoints took its place (train.keep_checkpoints)"])
            lm = open_model(replace(look.model, path=str(model)), device=device)
            return look_at(lm, look, step)
    except (DllmRayError, OSError) as error:
        return Seen(step, problems=[str(error)])


def look_at(lm: DiffusionLM, look: Look, step: int = 0) -> Seen:
    """Sample texts and scores of a model; what can't be had is named, and costs nothing else."""
    samples, metrics, problems = [], {}, []
    if look.sample_rows and len(look.rows):
        try:
            samples = sample_texts(lm, look.rows, look.sample_rows, look.sampler)
        except DllmRayError as error:
            problems.append(f"no sample texts: {error}")
    if look.evaluation is not None:
        try:
            metrics = _scores(lm, look.evaluation, look.sampler, look.seed)
        except DllmRayError as error:
            problems.append(f"no evaluation: {error}")
    return Seen(step, samples, metrics, problems)


def sample_texts(lm: DiffusionLM, rows: TokenRows, count: int, config: SamplerConfig) -> list[dict[str, str]]:
    """Answers to the questions of token rows, beside the answers the rows hold; of a document, its first half is the
    question.

    The first `count` questions are taken that leave room for `config.max_new_tokens` in the model's context.

    Raises:
        ConfigError: there are none, or the sampler's settings don't fit the model.
    """
    starts = rows.lengths.cumsum() - rows.lengths
    room = (lm.max_length or math.inf) - (config.max_new_tokens or 1)
    prompts, answers = [], []
    for start, length in zip(starts.tolist(), rows.lengths.tolist(), strict=True):
        ids, labels = rows.ids[start : start + length], rows.labels[start : start + length]
        begin = int((labels != IGNORE_INDEX).argmax()) or length // 2
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


def _scores(lm: DiffusionLM, config: EvaluateConfig, sampler: SamplerConfig, seed: int) -> dict[str, float]:
    from dllm_ray.evaluation.answering import LocalAnswers
    from dllm_ray.evaluation.lm import DiffusionHarness
    from dllm_ray.evaluation.run import evaluate, metrics

    answers = LocalAnswers(lm, sampler, LikelihoodConfig(), config.batch_size)
    new = sampler.max_new_tokens
    harness = DiffusionHarness(answers, lm.tokenizer, lm.spec, lm.max_length, new, lm.architecture, seed)
    found: Mapping[str, Mapping[str, Any]] = metrics(evaluate(harness, config, seed))
    return {f"eval/{task}/{name}": value for task, values in found.items() for name, value in values.items()}


def free_gpu(shares: Shares) -> float:
    """1 where training leaves a GPU of the cluster free, else 0."""
    return float(ray.cluster_resources().get("GPU", 0) - (shares.most or shares.workers) * shares.gpus >= 1)
