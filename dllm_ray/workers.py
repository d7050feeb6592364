"""A pool of Ray actors that each hold the model, for everything that samples in bulk.

Work is cut into slices of prompts of similar length, longest first; idle workers take the next slice, a lost worker's
slice is done again by another, and answers come back in the order of the prompts. Slices and seeds don't depend on the
number of workers, so neither do the answers.
"""

import os
import time
from collections.abc import Callable, Sequence

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError

from dllm_ray.cluster import Shares
from dllm_ray.errors import ConfigError, DllmRayError, ResourceError
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.load import open_model
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.sampler import SampleOutput, Sampler, row_seeds

_MAX_LOSSES = 3  # lost workers in a row, without a finished slice between them, before the pool gives up


class ModelPool:
    """Workers that hold a model.

    Args:
        model: what they load.
        shares: how many, and what each reserves.
        threads: torch threads of each worker on a CPU; None: the machine's cores divided by the workers.
    """

    def __init__(self, model: ModelConfig, shares: Shares, threads: int | None = None):
        self._model = model
        self._shares = shares
        self._threads = threads or max((os.cpu_count() or 1) // shares.workers, 1)
        self._workers = [self._start() for _ in range(shares.workers)]

    def wait(self) -> None:
        """Waits until every worker has loaded the model.

        Raises:
            ModelError: it can't be loaded.
        """
        for call in [worker.ready.remote() for worker in self._workers]:
            _result(call)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        slice_rows: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> SampleOutput:
        """Answers every prompt.

        Args:
            prompts: token ids.
            config: how to denoise.
            slice_rows: prompts in a slice; a worker denoises a slice as one batch.
            on_progress: called with the number of prompts answered so far.

        Raises:
            DllmRayError: what a worker met, e.g. a prompt that doesn't fit the context.
            ResourceError: workers keep dying.
        """
        if slice_rows < 1:
            raise ConfigError(f"must be at least 1, got {slice_rows}", "slice_rows")
        self.wait()
        began = time.perf_counter()
        seeds = row_seeds(config.seed, range(len(prompts)))
        longest_first = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        todo = [longest_first[start : start + slice_rows] for start in range(0, len(prompts), slice_rows)]
        todo.reverse()  # taken from the end
        finished: list[tuple[list[int], SampleOutput]] = []
        idle = list(range(len(self._workers)))
        under_way: dict[ray.ObjectRef, tuple[int, list[int]]] = {}
        done = losses = 0
        while todo or under_way:
            while idle and todo:
                worker, rows = idle.pop(), todo.pop()
                call = self._workers[worker].sample.remote(
                    [list(prompts[row]) for row in rows], config, [seeds[row] for row in rows]
                )
                under_way[call] = (worker, rows)
            (call,), _ = ray.wait(list(under_way))
            worker, rows = under_way.pop(call)
            try:
                finished.append((rows, _result(call)))
                done, losses = done + len(rows), 0
                if on_progress is not None:
                    on_progress(done)
            except RayActorError as error:
                losses += 1
                if losses > _MAX_LOSSES:
                    raise ResourceError(f"workers keep dying, the last one so: {error}") from error
                self._workers[worker] = self._start()
                todo.append(rows)
            idle.append(worker)
        return _in_order(finished, time.perf_counter() - began)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            ray.kill(worker)

    def __enter__(self) -> "ModelPool":
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def _start(self):
        options = {"num_cpus": self._shares.cpus, "num_gpus": self._shares.gpus}
        return ray.remote(_Worker).options(**options).remote(self._model, self._threads)


def _result(call: ray.ObjectRef):
    """What a worker returned; a user error it met is raised as itself, without Ray's story around it."""
    try:
        return ray.get(call)
    except RayTaskError as error:
        if isinstance(error.cause, DllmRayError):
            raise error.cause from None
        raise


class _Worker:
    """One process with the model."""

    def __init__(self, model: ModelConfig, threads: int):
        self._model = model
        self._threads = threads
        self._lm = None

    def ready(self) -> None:
        # Loading happens here and not in the constructor, so that a user error arrives as itself.
        if self._lm is not None:
            return
        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(self._threads)
        self._lm = open_model(self._model, device=device)

    def sample(self, prompts: list[list[int]], config: SamplerConfig, seeds: list[int]) -> SampleOutput:
        self.ready()
        return Sampler(self._lm, config).sample(prompts, seeds=seeds)


def _in_order(finished: list[tuple[list[int], SampleOutput]], seconds: float) -> SampleOutput:
    """The slices' outputs as one, in the order of the prompts."""
    place = [row for rows, _ in finished for row in rows]
    order = sorted(range(len(place)), key=place.__getitem__)

    def joined(field: str) -> list:
        values = [value for _, output in finished for value in getattr(output, field)]
        return [values[index] for index in order]

    return SampleOutput(
        sequences=joined("sequences"),
        completions=joined("completions"),
        row_nfe=joined("row_nfe"),
        nfe=sum(output.nfe for _, output in finished),
        seconds=seconds,
        history=None,
    )
