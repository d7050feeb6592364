"""Measures this package against its limits, in ratios from one run.

    python jobs/benchmark.py train
    python jobs/benchmark.py train --config my_sizes.yaml --data.path train.jsonl --json figures.json
    python jobs/benchmark.py sample
    python jobs/benchmark.py sample --model.path MODEL_DIR --batch_sizes '[1, 8, 32]' --json figures.json --mlflow true
    python jobs/benchmark.py likelihood --lengths '[[96, 32]]' --likelihood.mc_num 32 --threads 1

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
"""

import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.config import check_seed, to_dict
from dllm_ray.data.config import DataConfig
from dllm_ray.errors import ConfigError
from dllm_ray.evaluation.config import LikelihoodConfig
from dllm_ray.models.config import LoRAConfig, ModelConfig
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.output import complete_file, writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import TrackingConfig
from dllm_ray.training.config import TrainConfig

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
    """Names of algorithms; null: all that the model can run."""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 8])
    """Prompts denoised together."""
    prompt_tokens: int = 128
    """Length of the prompts, which are random tokens."""
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
            if name not in ALGORITHMS:
                raise ConfigError(f"expected some of {', '.join(ALGORITHMS)}, got {name!r}", "algorithms")

    def sampler(self, algorithm: str) -> SamplerConfig:
        """The settings of an algorithm."""
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

    from dllm_ray.sampling.engine import plan_for
    from dllm_ray.sampling.speed import measure
    from dllm_ray.viz.terminal import table

    output_dir = writable_folder(job.output_dir) if job.mlflow else None
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    lm = _model_to_sample(job)
    texts = _random_texts(lm, job.seed)
    rows = []
    for algorithm in ALGORITHMS if job.algorithms is None else job.algorithms:
        config = job.sampler(algorithm)
        try:
            plan_for(lm, config)
        except ConfigError as error:
            print(f"{algorithm}: left out: {error}", file=sys.stderr)
            continue
        for size in job.batch_sizes:
            prompts = texts(size, job.prompt_tokens)
            speed = measure(lm, config, prompts, job.rounds)
            rows.append({"algorithm": algorithm, "batch": size, **asdict(speed)})
            print(f"{algorithm}, batch {size}: {speed.ratio:.3f} times its forwards", file=sys.stderr)
    where = _where(torch.get_num_threads())
    table(f"sampling {job.new_tokens} tokens on {where}, {job.model.dtype}", rows)
    if job.json:
        with complete_file(Path(job.json)) as file:
            json.dump({"where": where, "settings": to_dict(job), "rows": rows}, file, indent=2)
    if output_dir is not None:
        _log(job, output_dir, rows)


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
    }
    if kind in ("-h", "--help"):
        kind, arguments = "train", ["--help"]
    if kind not in kinds:
        print(f"error: benchmark {kind!r} is unknown; expected one of {', '.join(kinds)}", file=sys.stderr)
        sys.exit(2)
    if not any(word.startswith(("--config", "-h", "--help")) for word in arguments):
        arguments = ["--config", str(DEFAULTS / f"{kind}.yaml"), *arguments]
    sys.exit(run_job(*kinds[kind], __doc__, arguments))
