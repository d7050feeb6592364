"""Measures this package against its limits, in ratios from one run.

    python jobs/benchmark.py train
    python jobs/benchmark.py train --config my_sizes.yaml --data.path train.jsonl --json figures.json
    python jobs/benchmark.py sample
    python jobs/benchmark.py sample --model.path MODEL_DIR --batch_sizes '[1, 8, 32]' --json figures.json --mlflow true
    python jobs/benchmark.py likelihood --lengths '[[96, 32]]' --likelihood.mc_num 32 --threads 1
    python jobs/benchmark.py serve
    python jobs/benchmark.py serve --clients '[1, 8, 32]' --rates '[4.0]' --load.spread 1.0 --json figures.json
    python jobs/benchmark.py serve --url http://127.0.0.1:8000 --served_model digits

train: tokens per second (without padding) and peak memory of the training loop under Ray Train with one worker, of the
same loop without Ray, and of a bare PyTorch loop that pads rows to the longest of their batch and computes the logits
of every position. The three take turns, so that a machine that slows down slows all of them. Sizes default to
configs/benchmark/train.yaml.

sample: for each decoding algorithm and batch size, tokens per second, tokens per forward, and the time of a call of the
sampler over the time of the forwards that it needed, run again by themselves. Sizes default to
configs/benchmark/sample.yaml, with random weights.

likelihood: for each length of prefix and target, log-likelihoods estimated per second; the time of one call for all
requests over the time of its forwards, run again by themselves; and beside it the time of a call for each request, and
of forwards that compute every position's logits for one request at a time. Sizes default to
configs/benchmark/likelihood.yaml, with random weights.

serve: a server under load, from clients that ask again when they are answered and from requests that come at a rate:
tokens per second, over those of an engine that answers the same requests alone in as large a batch, and percentiles of
the time to an answer's end, to its first text (`/ at rest`: the 99th over that of one client) and between texts. Engine
and loads take turns. The server is jobs/serve.py's, `--server local` one without Ray, or that of `--url`. Sizes default
to configs/benchmark/serve.yaml, with random weights.
"""

import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.config import check_seed, read, to_dict
from dllm_ray.data.config import DataConfig
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.models.config import LoRAConfig, ModelConfig
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.output import complete_file, writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.load import LoadConfig
from dllm_ray.tracking import TrackingConfig
from dllm_ray.training.config import TrainConfig

if TYPE_CHECKING:
    from dllm_ray.serving.load import Question, Run
    from dllm_ray.serving.speed import EngineAlone

OURS, ALONE, BARE = "under Ray Train", "the same loop alone", "bare loop, all logits"

DEFAULTS = Path(__file__).resolve().parents[1] / "configs" / "benchmark"

ALGORITHMS: dict[str, dict[str, Any]] = {
    "mdlm": {},
    "mdlm_half_steps": {},
    "mdlm_temperature_1": {"temperature": 1.0},
    "mdlm_cfg": {"cfg_scale": 1.0},
    "threshold": {"threshold": 0.9},
    "dream_entropy": {"policy": "entropy"},
    "prefix": {"cache": "prefix"},
    "dual": {"cache": "dual"},
    "dual_threshold": {"cache": "dual", "threshold": 0.9},
    "block": {"cache": "block"},
    "block_threshold": {"cache": "block", "threshold": 0.9},
}
"""What sets each algorithm apart; one step for each token otherwise."""

EDITS: dict[str, dict[str, Any]] = {"edit_flow": {}, "edit_flow_adaptive": {"edit_probability": 0.5}}
"""The same of models that edit."""


def check_file(name: str | None, field: str) -> None:
    """Makes sure, before anything is measured, that figures can be written to a file."""
    if name is not None and (not Path(name).name or Path(name).is_dir() or not Path(name).absolute().parent.is_dir()):
        raise ConfigError(f"{name!r} can't be written: expected a file in a folder that is there", field)


@dataclass
class TrainBenchmark:
    """Settings of jobs/benchmark.py train."""

    rounds: int = 4
    """How often the three loops take turns; the median reading counts."""
    steps: int = 200
    """Measured steps of each turn."""
    warmup_steps: int = 20
    """Steps before them that are not measured."""
    json: str | None = None
    """File to write the figures to."""
    seed: int = 0
    """Seeds data, weights and noise."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """Train an adapter in place of the model; the bare loop trains the model."""
    data: DataConfig = field(default_factory=DataConfig)
    """The data."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The objective."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Batch, lengths, precision, threads; there is one worker, and `steps` says how long."""

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("rounds", "steps", "warmup_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, got {getattr(self, name)}", name)
        check_file(self.json, "json")
        if self.objective.name == "edit_flow":
            raise ConfigError("the bare loop beside ours is one of masked diffusion", "objective.name")
        self.train = replace(
            self.train,
            workers=1,
            max_steps=self.warmup_steps + self.steps,
            learning_rate=self.train.learning_rate or 1e-3,
        )


def benchmark_train(job: TrainBenchmark) -> None:
    from dllm_ray import cluster
    from dllm_ray.training import speed
    from dllm_ray.viz.terminal import table

    work, ours, plain = _work(job)
    readings: dict[str, list[speed.Reading]] = {OURS: [], ALONE: [], BARE: []}
    with cluster.connect(1):
        loops = {
            ALONE: lambda: speed.alone(work, ours),
            OURS: lambda: speed.under_ray(work, ours),
            BARE: lambda: speed.bare(work, plain),
        }
        for turn in range(job.rounds):
            # there and back again, so that a machine that drifts favours none of them
            for name in loops if turn % 2 == 0 else reversed(loops):
                readings[name].append(loops[name]())
            print(f"round {turn + 1}/{job.rounds} done", file=sys.stderr)
    speeds = {
        name: statistics.median([value for turn in turns for value in turn.tokens_per_s])
        for name, turns in readings.items()
    }
    memory = {name: statistics.median([turn.peak_memory_gb for turn in turns]) for name, turns in readings.items()}
    wait = statistics.median([turn.data_wait for turn in readings[OURS]])
    rows = [
        {
            "loop": name,
            "tokens/s": round(value),
            "ours / this": round(speeds[OURS] / value, 3),
            "peak GB": round(memory[name], 2),
            "alone's peak / this": round(memory[ALONE] / memory[name], 3),
        }
        for name, value in speeds.items()
    ]
    where = _where(job.train.threads_per_worker or os.cpu_count())
    table(f"training on {where}, {job.train.precision}", rows)
    print(f"waited for data: {wait:.1%} of the time under Ray Train")
    if job.json:
        figures = {
            "where": where,
            "settings": to_dict(job),
            "tokens_per_s": speeds,
            "peak_memory_gb": memory,
            "data_wait": wait,
            "ratio_to_same_loop": speeds[OURS] / speeds[ALONE],
            "ratio_to_bare_loop": speeds[OURS] / speeds[BARE],
            "memory_ratio_to_bare_loop": memory[ALONE] / memory[BARE],
            "readings": {name: [asdict(turn) for turn in turns] for name, turns in readings.items()},
        }
        with complete_file(Path(job.json)) as file:
            json.dump(figures, file, indent=2)


def _work(job: TrainBenchmark):
    """The workload, its data as the job batches them, and the same rows as a bare loop would: in order, padded."""
    from dllm_ray.data import prepare
    from dllm_ray.data.tokenize import texts
    from dllm_ray.models import blueprint, load, tokenizers
    from dllm_ray.training.run import prepare_data
    from dllm_ray.training.speed import Workload

    corpus = prepare.resolve(job.data, job.train.max_length, job.seed)
    if job.model.path is None:
        tokenizer = tokenizers.train_bpe(texts(corpus.shards, corpus.rules, 100_000), job.model.scratch.vocab_size)
        spec = blueprint.describe(job.model.scratch.architecture, tokenizer)
    else:
        load.check_path(job.model.path)
        tokenizer, spec, _ = load.open_tokenizer(job.model.path)

    def prepared(data: DataConfig):
        return prepare_data(
            replace(data, valid_rows=0), corpus, None, tokenizer, spec, job.objective, job.train, job.seed
        )

    work = Workload(job.model, job.lora, tokenizer, job.objective, job.train, job.warmup_steps, job.seed)
    return work, prepared(job.data), prepared(replace(job.data, packing=False, max_tokens_per_batch=None))


def _where(threads: int | None) -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{threads} CPU threads"


@dataclass
class SampleBenchmark:
    """Settings of jobs/benchmark.py sample."""

    algorithms: list[str] | None = None
    """Names of algorithms; null: all that the model can run. Random weights get edit heads where all of them edit."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    """Prompts denoised together."""
    prompts: str | None = None
    """Questions to answer, as of jobs/sample.py, in turns of a batch size; null: one batch of random tokens."""
    prompt_tokens: int = 128
    """Length of random prompts."""
    new_tokens: int = 32
    """Length of the answers; an end of text doesn't stop them."""
    block_size: int = 32
    """Tokens in a block."""
    rounds: int = 2
    """How often the sampler and its forwards take turns; the fastest counts."""
    threads: int | None = None
    """torch threads on a CPU; null: as many as torch takes (OMP_NUM_THREADS, or all cores)."""
    json: str | None = None
    """File to write the figures to."""
    mlflow: bool = False
    """Record the figures in MLflow."""
    output_dir: str = "outputs/benchmark"
    """Folder of the MLflow database, unless `tracking.uri` names another."""
    seed: int = 0
    """Seeds weights, prompts and draws."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; random weights of the sizes of `model.scratch` when `model.path` is null."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("prompt_tokens", "new_tokens", "block_size", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"expected numbers of at least 1, got {self.batch_sizes}", "batch_sizes")
        if self.algorithms == []:
            raise ConfigError(f"expected some of {', '.join(ALGORITHMS)}, got none", "algorithms")
        check_file(self.json, "json")
        for name in self.algorithms or ():
            if name not in ALGORITHMS | EDITS:
                known = ", ".join(ALGORITHMS | EDITS)
                raise ConfigError(f"expected some of {known}, got {name!r}", "algorithms")

    def sampler(self, algorithm: str, own: dict[str, Any]) -> SamplerConfig:
        """The settings of an algorithm; those of one that edits begin with the model's own."""
        if algorithm in EDITS:
            return SamplerConfig(**own | EDITS[algorithm] | {"max_new_tokens": self.new_tokens, "seed": self.seed})
        steps = self.new_tokens // 2 if algorithm == "mdlm_half_steps" else self.new_tokens
        return SamplerConfig(
            max_new_tokens=self.new_tokens,
            steps=max(steps, -(-self.new_tokens // self.block_size)),
            block_size=self.block_size,
            eos_early_stop=False,
            seed=self.seed,
            **ALGORITHMS[algorithm],
        )


def benchmark_sample(job: SampleBenchmark) -> None:
    import torch

    from dllm_ray.models import edit_heads
    from dllm_ray.sampling import plan
    from dllm_ray.sampling.engine import plan_for
    from dllm_ray.sampling.speed import measure
    from dllm_ray.viz.terminal import table

    output_dir = writable_folder(job.output_dir) if job.mlflow else None
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    lm = _model_to_sample(job)
    if job.model.path is None and job.algorithms and set(job.algorithms) <= set(EDITS):
        lm = edit_heads.attach(lm, seed=job.seed)
    texts = _random_texts(lm, job.seed)
    rows = []
    known = ALGORITHMS if lm.spec.edit_heads is None else EDITS
    for algorithm in known if job.algorithms is None else job.algorithms:
        config = job.sampler(algorithm, dict(lm.spec.sampler))
        try:
            if algorithm in EDITS and known is ALGORITHMS:
                raise ConfigError("the model has no edit heads")
            plan.check(config, lm.spec)
            if known is ALGORITHMS:
                plan_for(lm, config)
        except ConfigError as error:
            print(f"{algorithm}: left out: {error}", file=sys.stderr)
            continue
        for size in job.batch_sizes:
            prompts = _questions(job, lm) if job.prompts else texts(size, job.prompt_tokens)
            speed = measure(lm, config, prompts, job.rounds, size)
            rows.append({"algorithm": algorithm, "batch": size, **asdict(speed)})
            print(f"{algorithm}, batch {size}: {speed.ratio:.3f} times its forwards", file=sys.stderr)
    where = _where(torch.get_num_threads())
    table(f"sampling {job.new_tokens} tokens on {where}, {job.model.dtype}", rows)
    if job.json:
        with complete_file(Path(job.json)) as file:
            json.dump({"where": where, "settings": to_dict(job), "rows": rows}, file, indent=2)
    if output_dir is not None:
        _log(job, output_dir, rows)


def _questions(job: SampleBenchmark, lm) -> list[list[int]]:
    """The prompts of the job's source."""
    from dllm_ray.data import sources
    from dllm_ray.prompts import encode_rows

    shards = sources.resolve(job.prompts)
    rows = ((partial(shard.where, number), row) for shard in shards for number, row in shard.read())
    return encode_rows(rows, lm.tokenizer, {})[1]


def _random_texts(lm, seed: int) -> Callable[[int, int], list[list[int]]]:
    """Makes rows of random tokens, so many of such a length; none is special."""
    import torch

    source = torch.Generator().manual_seed(seed)
    special = {lm.spec.mask_token_id, lm.spec.pad_token_id, *lm.spec.stop_token_ids}
    words = torch.tensor(
        [token for token in range(lm.model.get_input_embeddings().num_embeddings) if token not in special]
    )
    return lambda rows, length: words[torch.randint(len(words), (rows, length), generator=source)].tolist()


def _model_to_sample(job: "SampleBenchmark | LikelihoodBenchmark"):
    from dllm_ray.models import load, tokenizers
    from dllm_ray.training.speed import device

    if job.model.path is not None:
        load.check_path(job.model.path)
        return load.open_model(job.model, device=device())
    # the weights are random, so the tokenizer needn't know the whole vocabulary
    scratch = job.model.scratch
    scratch = replace(scratch, extra=scratch.extra | {"vocab_size": scratch.vocab_size})
    tokenizer = tokenizers.train_bpe([], scratch.vocab_size)
    return load.open_model(replace(job.model, scratch=scratch), tokenizer, job.seed, device())


@dataclass
class LikelihoodBenchmark:
    """Settings of jobs/benchmark.py likelihood."""

    lengths: list[tuple[int, int]] = field(default_factory=lambda: [(96, 1), (96, 8), (96, 32), (256, 128)])
    """Tokens of prefix and target, which are random."""
    requests: int = 4
    """Targets of each length."""
    rounds: int = 2
    """How often the ways take turns; the fastest counts."""
    threads: int | None = None
    """torch threads on a CPU; null: as many as torch takes (OMP_NUM_THREADS, or all cores)."""
    json: str | None = None
    """File to write the figures to."""
    seed: int = 0
    """Seeds weights, texts and masks."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; random weights of the sizes of `model.scratch` when `model.path` is null."""
    likelihood: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    """How likelihoods are estimated."""

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("requests", "rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        if not self.lengths or any(prefix < 1 or target < 1 for prefix, target in self.lengths):
            raise ConfigError(f"expected pairs of numbers of at least 1, got {self.lengths}", "lengths")
        check_file(self.json, "json")


def benchmark_likelihood(job: LikelihoodBenchmark) -> None:
    import torch

    from dllm_ray.evaluation.speed import measure
    from dllm_ray.viz.terminal import table

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    lm = _model_to_sample(job)
    texts = _random_texts(lm, job.seed)
    rows = []
    for prefix, target in job.lengths:
        pairs = list(zip(texts(job.requests, prefix), texts(job.requests, target), strict=True))
        speed = measure(lm, job.likelihood, pairs, job.rounds)
        rows.append({"prefix": prefix, "target": target, **asdict(speed)})
        print(f"{prefix}+{target}: {speed.ratio:.3f} times its forwards", file=sys.stderr)
    where = _where(torch.get_num_threads())
    table(f"likelihoods with {job.likelihood.mc_num} copies on {where}, {job.model.dtype}", rows)
    if job.json:
        with complete_file(Path(job.json)) as file:
            json.dump({"where": where, "settings": to_dict(job), "rows": rows}, file, indent=2)


@dataclass
class ServeBenchmark:
    """Settings of jobs/benchmark.py serve."""

    server: Literal["ray", "local"] = "ray"
    """ray: started as jobs/serve.py does, on the cluster of RAY_ADDRESS or a Ray of its own; local: in one process,
    without Ray."""
    url: str | None = None
    """Address of a server that is running, in place of one that is started here; there is no engine beside it."""
    served_model: str | None = None
    """With `url`: the name of the model there; null: the only one."""
    clients: list[int] = field(default_factory=lambda: [1, 8])
    """Closed loops: so many clients, each of which asks again when it is answered; 1 is the server at rest, with which
    latencies are compared."""
    rates: list[float] = field(default_factory=list)
    """Open loops: so many requests per second on average, arriving as a Poisson process."""
    stream: list[bool] = field(default_factory=lambda: [True])
    """Whether texts are sent while they are written; both measures both."""
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"as served": {}})
    """Sampler settings that requests change, by a name for the table."""
    rounds: int = 2
    """How often engine and loads take turns; all turns count."""
    threads: int | None = None
    """torch threads of the engine and of the server on a CPU, one after the other; null: all cores."""
    json: str | None = None
    """File to write the figures to."""
    seed: int = 0
    """Seeds the weights."""
    load: LoadConfig = field(default_factory=LoadConfig)
    """What is asked."""
    limits: Limits = field(default_factory=Limits)
    """Of the server that is started."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; random weights of the sizes of `model.scratch` when `model.path` is null."""
    sampler: SamplerConfig = field(default_factory=lambda: SamplerConfig(steps=32, eos_early_stop=False))
    """How it denoises. The lengths of answers are those of `load`; `steps` are those of one of mean length, and longer
    ones have more. With `url`: what is set here is asked of the server."""

    def __post_init__(self):
        check_seed(self.seed)
        for name in ("rounds", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        if any(number < 1 for number in self.clients):
            raise ConfigError(f"expected numbers of at least 1, got {self.clients}", "clients")
        if any(not rate > 0 for rate in self.rates):
            raise ConfigError(f"expected numbers above 0, got {self.rates}", "rates")
        if not self.clients and not self.rates:
            raise ConfigError("give numbers of clients, or rates", "clients")
        for name in ("stream", "variants"):
            if not getattr(self, name):
                raise ConfigError("expected at least one", name)
        if self.url is None and self.served_model is not None:
            raise ConfigError("needs a url: it names a model of a server", "served_model")
        if self.url is not None and self.model.path is not None:
            raise ConfigError("give model.path or url, not both", "model.path")
        check_file(self.json, "json")
        for name, changes in self.variants.items():
            changed(self.sampler, changes, f"variants.{name}")


@dataclass
class Served:
    """What `ServeBenchmark` measures."""

    url: str
    """Of the server."""
    name: str
    """Of the model."""
    vocabulary: list[int] | None = None
    """Tokens that prompts are made of; None: prompts are words."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Sampler settings that every request changes."""
    engine: "EngineAlone | None" = None
    """To be compared with."""
    sampler: SamplerConfig | None = None
    """The engine's settings."""


def benchmark_serve(job: ServeBenchmark) -> None:
    from dllm_ray.serving.load import Run, compare, questions
    from dllm_ray.viz.terminal import table

    runs: dict[tuple[str, str, int | float, bool], Run] = {}  # variant, kind of load, how much, streamed
    with _served_by_url(job) if job.url is not None else _served_here(job) as served:
        asked = questions(job.load, served.vocabulary)
        for turn in range(-1, job.rounds):  # the first one warms up
            for variant, changes in job.variants.items():
                for kind, run in _turn(job, served, asked, changes):
                    if turn >= 0:
                        runs.setdefault((variant, *kind), Run()).add(run)
            print(f"round {turn + 1}/{job.rounds} done" if turn >= 0 else "warmed up", file=sys.stderr)
    figures = [
        {"settings": variant, "load": kind, "amount": amount, "stream": stream} | run.figures()
        for (variant, kind, amount, stream), run in runs.items()
    ]
    compare(figures)
    where = job.url or f"{_where(job.threads or os.cpu_count())}, {job.model.dtype}"
    for variant in job.variants:
        table(f"serving on {where}: {variant}", [_row(item) for item in figures if item["settings"] == variant])
    if job.json:
        with complete_file(Path(job.json)) as file:
            json.dump({"where": where, "settings": to_dict(job), "rows": figures}, file, indent=2)


@contextmanager
def _served_by_url(job: ServeBenchmark) -> Iterator[Served]:
    from dllm_ray.serving.client import Client
    from dllm_ray.serving.partner import settings_of

    with Client(job.url) as client:
        facts = client.model(job.served_model)
    own, asked = to_dict(settings_of(facts)), to_dict(job.sampler)
    changes = {name: value for name, value in asked.items() if value != own[name]}
    yield Served(job.url, facts.name, changes=changes)


@contextmanager
def _served_here(job: ServeBenchmark) -> Iterator[Served]:
    from dllm_ray.models import load
    from dllm_ray.serving import speed

    threads, sampler = job.threads or os.cpu_count(), replace(job.sampler, max_new_tokens=round(job.load.new_tokens))
    with ExitStack() as stack:
        if job.model.path is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            vocabulary, others = speed.random_model(job.model, job.seed, folder)
            model, sampler = replace(job.model, path=str(folder)), replace(sampler, suppress_tokens=tuple(others))
        else:
            load.check_path(job.model.path)
            tokenizer, spec, _ = load.open_tokenizer(job.model.path)
            special = {*tokenizer.all_special_ids, spec.mask_token_id}
            vocabulary = [token for token in range(len(tokenizer)) if token not in special]
            model = job.model
        engine = stack.enter_context(speed.EngineAlone(model, threads))
        if job.server == "local":
            server = speed.serving_locally("benchmark", model, sampler, job.limits, threads)
        else:
            server = _serving_on_ray(model, sampler, job.limits, threads)
        yield Served(stack.enter_context(server), "benchmark", vocabulary, engine=engine, sampler=sampler)


@contextmanager
def _serving_on_ray(model: ModelConfig, sampler: SamplerConfig, limits: Limits, threads: int | None) -> Iterator[str]:
    """The address of a server as jobs/serve.py starts it."""
    import socket

    from dllm_ray import cluster
    from dllm_ray.serving import server
    from dllm_ray.serving.config import ServeConfig, ServedModel

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    loaded = {name: value for name, value in to_dict(model).items() if name != "scratch"}
    served = ServedModel(name="benchmark", sampler=to_dict(sampler), threads=threads, **loaded)
    config = ServeConfig(name="benchmark", port=port, model=served, limits=limits)
    with cluster.connect(2):
        address = server.start(config, alone=not os.environ.get("RAY_ADDRESS"))
        try:
            yield address
        finally:
            server.stop(config)


def _turn(
    job: ServeBenchmark, served: Served, asked: "list[Question]", changes: dict[str, Any]
) -> "Iterator[tuple[tuple[str, float, bool], Run]]":
    """Each measurement of some settings, once: its kind, how much load, whether streamed; and what came of it."""
    from dllm_ray.serving.client import AsyncClient
    from dllm_ray.serving.load import asker, closed_loop, open_loop

    async def put(loop: Callable[..., Awaitable], amount: float, stream: bool) -> "Run":
        async with AsyncClient(served.url) as client:
            return await loop(asker(client, served.name, served.changes | changes, stream), asked, amount)

    for amount in job.clients:
        if served.engine is not None:
            yield (
                ("engine", amount, False),
                served.engine.run(asked, changed(served.sampler, changes), amount, scales="steps" not in changes),
            )
        for stream in job.stream:
            yield ("clients", amount, stream), asyncio.run(put(closed_loop, amount, stream))
    for rate in job.rates:
        for stream in job.stream:
            yield ("rate", rate, stream), asyncio.run(put(open_loop, rate, stream))


def changed(sampler: SamplerConfig, changes: dict[str, Any], where: str = "variants") -> SamplerConfig:
    """Sampler settings with some changes."""
    return read(SamplerConfig, to_dict(sampler) | changes, where)


def _row(item: dict[str, Any]) -> dict[str, str]:
    """A measurement of `ServeBenchmark` as a line of its table; times in milliseconds. `text` is the time to the first
    text, `/ at rest` its 99th percentile over that of one client, `next` the time between texts."""
    names = {
        "engine": "engine of {:g}",
        "clients": "{:g} client" + "s" * (item["amount"] != 1),
        "rate": "{:g} a second",
    }

    def milliseconds(name: str, *percentiles: str) -> str:
        found = None if item["load"] == "engine" else item[name]
        return "/".join(f"{1000 * found[percentile]:.0f}" for percentile in percentiles) if found else ""

    def ratio(name: str) -> str:
        return f"{item[name]:.2f}" if name in item else ""

    errors = ", ".join(f"{count} {error}" for error, count in item["errors"].items())
    return {
        "load": names[item["load"]].format(item["amount"]),
        "sent": "" if item["load"] == "engine" else "streamed" if item["stream"] else "whole",
        "tokens/s": f"{item['tokens_per_s']:,.1f}",
        "/ engine": ratio("of_engine"),
        "/ 1 client": ratio("over_one_client"),
        "end p50/95/99": milliseconds("end", "p50", "p95", "p99"),
        "text p50/99": milliseconds("first_text", "p50", "p99"),
        "/ at rest": ratio("first_text_over_rest"),
        "next p50": milliseconds("between_texts", "p50"),
        "errors": "" if item["load"] == "engine" else errors or "0",
    }


def _log(job: SampleBenchmark, output_dir: Path, rows: list[dict[str, Any]]) -> None:
    from dllm_ray import tracking

    tags = {"dllm_ray.model": job.model.path or job.model.scratch.architecture}
    with tracking.start("benchmark", to_dict(job), output_dir, job.tracking, tags) as run:
        for row in rows:
            place = f"benchmark/{row['algorithm']}/batch_{row['batch']}"
            run.log({f"{place}/{name}": row[name] for name in ("ratio", "tokens_per_s", "tpf", "nfe")})
        run.json("benchmark.json", rows)


if __name__ == "__main__":
    kind, *arguments = sys.argv[1:] or ["--help"]
    kinds = {
        "train": (TrainBenchmark, benchmark_train),
        "sample": (SampleBenchmark, benchmark_sample),
        "likelihood": (LikelihoodBenchmark, benchmark_likelihood),
        "serve": (ServeBenchmark, benchmark_serve),
    }
    if kind in ("-h", "--help"):
        kind, arguments = "train", ["--help"]
    if kind not in kinds:
        print(f"error: benchmark {kind!r} is unknown; expected one of {', '.join(kinds)}", file=sys.stderr)
        sys.exit(2)
    if not any(word.startswith(("--config", "-h", "--help")) for word in arguments):
        arguments = ["--config", str(DEFAULTS / f"{kind}.yaml"), *arguments]
    sys.exit(run_job(*kinds[kind], __doc__, arguments))
