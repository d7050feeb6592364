"""A pool of Ray actors that each hold the model, for everything that asks a model in bulk.

`ModelPool.run` hands pieces of work to workers as they get idle, and a lost worker's piece to another. Sampling is the
first use: prompts are cut into slices of similar length, longest first. Slices and seeds don't depend on the number of
workers, so neither do the answers.
"""

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import ray
import torch
from ray.exceptions import NodeDiedError, ObjectLostError, OutOfMemoryError, RayActorError, RayTaskError

from dllm_ray import cluster
from dllm_ray.answers import (
    Answer,
    AnswerStore,
    Progress,
    answer_columns,
    answer_key,
    base_seed,
    canvases,
    ended_by_stop,
    needs_whole,
    require_free_columns,
    write,
)
from dllm_ray.bulk_metrics import BulkMetrics
from dllm_ray.cluster import Shares
from dllm_ray.errors import ConfigError, DllmRayError, ResourceError
from dllm_ray.metrics import Labels
from dllm_ray.models.config import ModelConfig
from dllm_ray.models.lm import DiffusionLM
from dllm_ray.models.load import open_model, open_tokenizer
from dllm_ray.prompts import encode_drafts, encode_rows, encode_texts, require_room
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.sampling.output import SampleOutput
from dllm_ray.sampling.plan import check
from dllm_ray.sampling.sampler import Sampler, row_seeds

_MAX_LOSSES = 3  # lost workers in a row, without a finished piece of work between them, before the pool gives up
_LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError)  # the worker, its node, or what it returned


class Call(NamedTuple):
    """A piece of work for a worker."""

    name: Any
    """Tells it apart from others."""
    function: Callable[..., Any]
    """Called as `function(lm, *arguments)`."""
    arguments: tuple


@dataclass(frozen=True)
class Slice:
    """Prompts that were answered together."""

    rows: list[int]
    """Their places among all prompts."""
    output: SampleOutput
    """What was written, in the order of `rows`; `sequences` only where completions don't tell them."""
    ended: list[bool]
    """Whether an end-of-text token ended each answer; else it ran to its limit."""

    def answers(self) -> dict[int, Answer]:
        """Row -> answer."""
        wholes = self.output.sequences or [None] * len(self.rows)
        answers = map(Answer, self.output.completions, self.output.row_nfe, self.ended, wholes)
        return dict(zip(self.rows, answers, strict=True))


class ModelPool:
    """Workers that hold a model.

    Args:
        model: what they load.
        shares: how many, and what each reserves.
        threads: torch threads of each worker on a CPU; None: the machine's cores divided by the workers.
        metrics: told what workers do; None: nobody is.
    """

    def __init__(
        self,
        model: ModelConfig,
        shares: Shares,
        threads: int | None = None,
        metrics: BulkMetrics | None = None,
    ):
        self.model = model
        self.workers = shares.workers
        """How many there are."""
        self.metrics = metrics
        """Told what they do."""
        self._shares = shares
        self._threads = threads or max((os.cpu_count() or 1) // shares.workers, 1)
        self._loading: dict[ray.ObjectRef, int] = {}  # call -> number of the worker that loads its model
        self._actors: list[Any] = [None] * shares.workers
        self._losses = 0
        for number in range(shares.workers):
            self._start(number)

    def wait(self) -> None:
        """Waits until every worker has loaded the model.

        Raises:
            ModelError: it can't be loaded.
            ResourceError: workers keep dying.
        """
        while self._loading:
            (call,), _ = ray.wait(list(self._loading))
            self._loaded(call)

    def run(self, function: Callable[..., Any], work: Sequence[tuple]) -> Iterator[tuple[int, Any, float]]:
        """Calls `function(lm, *arguments)` on workers for each piece of work, in the order given, as workers get idle.

        A piece waits for a worker that has its model, never for one that is still to come.

        Args:
            function: one that workers can import, or a closure. It may be called again with the same arguments, where a
                worker was lost.
            work: the arguments of each call; the longest first keeps workers busy to the end.

        Yields:
            (index in `work`, what the call returned, seconds it took the worker), as calls finish.

        Raises:
            DllmRayError: what a worker met, e.g. a prompt that doesn't fit the context.
            ResourceError: workers keep dying.
        """
        todo = deque(Call(index, function, arguments) for index, arguments in enumerate(work))
        for call, outcome in self.serve(lambda: todo.popleft() if todo else None):
            if isinstance(outcome, Exception):
                raise outcome
            yield call.name, *outcome

    def serve(
        self, take: Callable[[], Call | None], more: Callable[[], bool] = lambda: False, every_s: float | None = None
    ) -> Iterator[tuple[Call, tuple[Any, float] | Exception]]:
        """Makes calls on workers as they get idle, as long as there are any.

        Args:
            take: gives the next call; None: there is none now.
            more: whether there may be further calls although `take` has none now.
            every_s: how often `take` is asked while all that was taken is under way; None: when a call has finished.

        Yields:
            Each call as it finishes, with what it returned and the seconds it took the worker, or what it raised.

        Raises:
            ResourceError: workers keep dying.
        """
        following: list[Call] = []  # taken and not handed out: the next one, and those of lost workers
        away = set(self._loading.values())
        idle = [number for number in reversed(range(self.workers)) if number not in away]
        under_way: dict[ray.ObjectRef, tuple[int, Call]] = {}

        def hand_out() -> None:
            while following or (call := take()) is not None:
                if not following:
                    following.append(call)
                if not idle:
                    return
                number, call = idle.pop(), following.pop()
                under_way[self._actors[number].call.remote(call.function, *call.arguments)] = (number, call)

        while True:
            hand_out()
            if self.metrics is not None:
                self.metrics.workers(len(under_way), len(idle), len(self._loading))
            if not under_way and not following and not more():
                return
            waited_for = [*under_way, *self._loading]
            if not waited_for:
                time.sleep(every_s or 0)
                continue
            done, _ = ray.wait(waited_for, timeout=every_s)
            for ref in done:
                if ref in self._loading:
                    number = self._loading[ref]
                    if self._loaded(ref):
                        idle.append(number)
                    continue
                number, call = under_way.pop(ref)
                try:
                    outcome = result_of(ref)
                except _LOST as error:
                    following.append(call)
                    self._lost(number, error)
                    continue
                except Exception as error:
                    outcome = error
                self._losses = 0
                idle.append(number)
                hand_out()  # before the caller takes its time with the result
                if self.metrics is not None and not isinstance(outcome, Exception):
                    self.metrics.finished(outcome[1])
                yield call, outcome

    def slices(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        slice_rows: int,
        done: Container[int] = (),
        infill: bool = False,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[Slice]:
        """Answers prompts slice by slice, and yields each slice when it is finished, in whatever order that is.

        Args:
            prompts: token ids.
            config: how to denoise.
            slice_rows: prompts in a slice; a worker denoises a slice as one batch.
            done: rows answered before. A slice is left out when it holds no others, else it is done as a whole: so
                slices, and with them answers, stay what they would have been.
            infill: fill the mask tokens inside the prompts instead of continuing them.
            drafts: answers to revise, one for each prompt; None: answers are written from nothing.

        Raises:
            DllmRayError: what a worker met, e.g. a prompt that doesn't fit the context.
            ResourceError: workers keep dying.
        """
        if slice_rows < 1:
            raise ConfigError(f"must be at least 1, got {slice_rows}", "slice_rows")
        seeds = row_seeds(config.seed, range(len(prompts)))
        length = [len(prompt) for prompt in prompts]
        if drafts is not None:
            length = [before + len(draft) for before, draft in zip(length, drafts, strict=True)]
        longest_first = sorted(range(len(prompts)), key=lambda row: -length[row])
        cut = [longest_first[start : start + slice_rows] for start in range(0, len(prompts), slice_rows)]
        todo = [rows for rows in cut if not all(row in done for row in rows)]
        work = [
            (_taken(prompts, rows), config, [seeds[row] for row in rows], infill, _taken(drafts, rows)) for rows in todo
        ]
        for index, (output, ended), _ in self.run(_sample, work):
            yield Slice(todo[index], output, ended)

    def fill(
        self,
        store: AnswerStore,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        slice_rows: int,
        on_progress: Callable[[int], None] | None = None,
        infill: bool = False,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Answers the prompts that a store has no answers to, and keeps each slice there as soon as it is finished.

        The store's facts then say `seed`, which rows' seeds are derived from, and the `seconds` that all of it took.

        Args:
            store: opened with the `answer_key` of the same model, prompts, drafts and settings.
            prompts: token ids.
            config: how to denoise. A null seed is drawn once and kept in the store.
            slice_rows: prompts in a slice; a worker denoises a slice as one batch.
            on_progress: called with the number of prompts answered so far, earlier runs included.
            infill, drafts: as in `slices`.

        Raises:
            DllmRayError: as `slices`.
            OutputError: the store can't be written.
        """
        config = replace(config, seed=base_seed(store, config))
        self.wait()
        before, began = store.facts.get("seconds", 0.0), time.perf_counter()
        tell = self.metrics.answering("prompts") if self.metrics is not None else _nobody
        slices = -(-(len(prompts) - len(store)) // slice_rows)
        now = Progress(len(prompts), done=len(store), from_disk=len(store), slices=slices)
        tell(now)
        for part in self.slices(prompts, config, slice_rows, done=store, infill=infill, drafts=drafts):
            took = time.perf_counter() - began
            store.add(part.answers(), seconds=before + took)
            now = replace(
                now,
                done=len(store),
                slices_done=now.slices_done + 1,
                tokens=now.tokens + sum(map(len, part.output.completions)),
                nfe=now.nfe + sum(part.output.row_nfe),
                seconds=took,
            )
            tell(now)
            if on_progress is not None:
                on_progress(len(store))

    def trace(
        self,
        prompts: Sequence[Sequence[int]],
        config: SamplerConfig,
        seeds: Sequence[int],
        infill: bool = False,
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> tuple[list[list[int]], SampleOutput]:
        """The canvases that a few prompts begin with, and what one worker makes of them, with what each step wrote
        (`SampleOutput.commits`).

        Raises:
            DllmRayError: what the worker met.
        """
        every = range(len(prompts))
        work = [(_taken(prompts, every), config, list(seeds), infill, _taken(drafts, every))]
        ((_, traced, _),) = self.run(_trace, work)
        return traced

    def close(self) -> None:
        """Ends the workers."""
        for actor in self._actors:
            ray.kill(actor)

    def __enter__(self) -> "ModelPool":
        return self

    def __exit__(self, *_error) -> None:
        self.close()

    def _start(self, number: int) -> None:
        options = {"num_cpus": self._shares.cpus, "num_gpus": self._shares.gpus, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(_Worker).options(**options).remote(self.model, self._threads)
        self._actors[number] = actor
        self._loading[actor.load.remote()] = number

    def _loaded(self, call: ray.ObjectRef) -> bool:
        """Takes note that a worker has loaded its model; one that was lost on the way is replaced."""
        number = self._loading.pop(call)
        try:
            result_of(call)
        except _LOST as error:
            self._lost(number, error)
            return False
        return True

    def _lost(self, number: int, error: Exception) -> None:
        """Puts a new worker in the place of a lost one.

        Raises:
            ResourceError: too many were lost, with nothing finished between them.
        """
        self._losses += 1
        if self.metrics is not None:
            self.metrics.lost()
        if self._losses > _MAX_LOSSES:
            raise ResourceError(f"workers keep dying, the last one so: {error}") from error
        ray.kill(self._actors[number])  # it may only be out of reach, and would keep what it reserves
        self._start(number)


def _nobody(_: Progress) -> None:
    """Who is told of progress that nobody wants to know of."""


def result_of(call: ray.ObjectRef) -> Any:
    """What an actor's method returned; a user error it met is raised as itself, without Ray's story around it."""
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

    def load(self) -> None:
        # Loading happens here and not in the constructor, so that a user error arrives as itself.
        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        if device == "cpu":
            torch.set_num_threads(self._threads)
        self._lm = open_model(self._model, device=device)

    def call(self, function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
        if self._lm is None:  # loading failed before, and what was wrong may have been mended
            self.load()
        began = time.perf_counter()
        result = function(self._lm, *arguments)
        return result, time.perf_counter() - began


def _taken(ids: Sequence[Sequence[int]] | None, rows: Iterable[int]) -> list[list[int]] | None:
    """Token ids of some rows, as plain lists."""
    return None if ids is None else [list(ids[row]) for row in rows]


def _sample(
    lm: DiffusionLM,
    prompts: list[list[int]],
    config: SamplerConfig,
    seeds: list[int],
    infill: bool,
    drafts: list[list[int]] | None = None,
) -> tuple[SampleOutput, list[bool]]:
    sampler = Sampler(lm, config)
    output = write(sampler, prompts, seeds, infill, drafts)
    ended = ended_by_stop(prompts, output, lm.spec.stop_token_ids)
    if not needs_whole(lm.spec, config, infill):
        output = replace(output, sequences=[])  # which nobody has a use for
    return output, ended


def _trace(
    lm: DiffusionLM,
    prompts: list[list[int]],
    config: SamplerConfig,
    seeds: list[int],
    infill: bool,
    drafts: list[list[int]] | None = None,
) -> tuple[list[list[int]], SampleOutput]:
    sampler = Sampler(lm, config)
    output = write(sampler, prompts, seeds, infill, drafts, trace=True)
    return canvases(sampler, prompts, infill, drafts), replace(output, history=None)


def sample_dataset(
    dataset: "ray.data.Dataset",
    pool: ModelPool,
    config: SamplerConfig,
    slice_rows: int = 64,
    columns: Mapping[str, str] | None = None,
    resume: str | Path | None = None,
    on_progress: Callable[[int], None] | None = None,
    infill: bool = False,
    edit: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answers the rows of a Ray dataset, in its order.

    Args:
        dataset: rows with a column `prompt`, `question`, `instruction` or `messages`.
        pool: answers them.
        config: how to denoise.
        slice_rows: prompts in a slice; a worker denoises a slice as one batch.
        columns: our column name -> the dataset's, e.g. `{"prompt": "query"}`.
        resume: a file that keeps answers: a call that was broken off goes on when it is made again. It goes away with
            the last row that is taken.
        on_progress: called with the number of prompts answered so far.
        infill: fill the gaps in the texts of a column `infill` or `text` (`encode_texts`).
        edit: revise the drafts of answers in a column `draft` (`encode_drafts`).

    Returns:
        Every row with `completion`, `completion_tokens`, `nfe`, `tpf` and `seed` beside its own columns. All are
        answered before the first is returned.

    Raises:
        ConfigError: the settings can't work on the model.
        DataError: a row that can't be used, has a column called like one of the answer's, or doesn't fit the model;
            before any is answered.
        DllmRayError: as `ModelPool.fill`.
    """
    tokenizer, spec, blueprint = open_tokenizer(pool.model.path)
    check(config, spec, infill)
    rows, drafts = _rows_in_order(dataset), None
    named = [(partial("row {}".format, number), row) for number, row in enumerate(rows)]
    for where, row in named:
        require_free_columns(where, row)
    if infill:
        _, prompts = encode_texts(named, tokenizer, spec.mask_token_id, columns or {})
    elif edit:
        _, prompts, drafts = encode_drafts(named, tokenizer, spec, columns or {})
    else:
        _, prompts = encode_rows(named, tokenizer, columns or {})
    require_room(prompts, config, blueprint.max_length, infill, drafts)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="dllm_ray_")) if resume is None else ""
        key = answer_key(pool.model, config, slice_rows, prompts, infill, drafts)
        store = stack.enter_context(AnswerStore(Path(resume or f"{folder}/answers.jsonl"), key))
        pool.fill(store, prompts, config, slice_rows, on_progress, infill, drafts)
        opened = stack.pop_all()

    def answered() -> Iterator[dict[str, Any]]:
        with opened:
            seeds = row_seeds(store.facts["seed"], range(len(rows)))
            for number, row in enumerate(rows):
                gaps = prompts[number] if infill else None
                yield {**row, **answer_columns(tokenizer, spec, store[number], seeds[number], gaps)}
            store.remove()

    return answered()


def _rows_in_order(dataset: "ray.data.Dataset") -> list[dict[str, Any]]:
    """All rows, as plain Python values; Ray Data by itself hands out blocks as they are finished."""
    options = dataset.context.execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        return [row for table in dataset.iter_batches(batch_format="pyarrow") for row in table.to_pylist()]
    finally:
        options.preserve_order = before


class PoolSettings(Protocol):
    """How many workers there are, and what each reserves: `EvaluateConfig`, for one."""

    workers: int | None
    cpus_per_worker: float | None
    gpus_per_worker: float | None
    threads_per_worker: int | None


@contextmanager
def connected_pool(command: str, run_name: str, model: ModelConfig, config: PoolSettings) -> Iterator[ModelPool]:
    """Workers that hold a model, and a connection to Ray for their time.

    Args:
        command: the job, `evaluate`; also the section of its settings, for messages.
        run_name: of its MLflow run.
        model: what they load.
        config: how many.

    Raises:
        ResourceError: the cluster is too small, or can't be joined.
    """
    with cluster.connect(config.workers or 2):
        shares = cluster.shares(config.workers, config.cpus_per_worker, config.gpus_per_worker, f"{command}.")
        with (
            BulkMetrics(Labels(command, run_name, model.path)) as metrics,
            ModelPool(model, shares, config.threads_per_worker, metrics) as pool,
        ):
            yield pool
