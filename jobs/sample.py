"""Answers prompts with a diffusion language model.

    python jobs/sample.py --model.path outputs/digits/final --prompt "reverse 4096" --show
    python jobs/sample.py --model.path MODEL_DIR --prompt "The [MASK:4] sat" --infill --html replay.html
    python jobs/sample.py --model.path EDIT_MODEL_DIR --prompt "double 123" --edit --draft 1129 --show
    python jobs/sample.py --model.path MODEL_DIR --prompts questions.jsonl --output_dir outputs/answers

A source of prompts has a column `prompt`, `question`, `instruction` or `messages` (with --infill: `infill` or `text`;
with --edit also `draft`). It is answered by Ray workers, in order, into OUTPUT_DIR/samples.jsonl, with a summary.json
beside it; rows keep their other columns, and where all have a text `response`, the summary says how many answers equal
it. When such a run is killed, the same command goes on where it was. A single --prompt is answered in this process,
without Ray.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

# a checkout need not be installed; and beside this file `evaluate` would hide Hugging Face's package of that name
sys.path[0 : __name__ == "__main__"] = [str(Path(__file__).resolve().parents[1])]

from dllm_ray.cli import run_job
from dllm_ray.config import section, to_dict
from dllm_ray.errors import ConfigError, DataError, OutputError
from dllm_ray.models.config import ModelConfig
from dllm_ray.output import complete_file, may_be_a_file, printable, writable_folder
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tracking import TrackingConfig

SAMPLES, SUMMARY = "samples.jsonl", "summary.json"
PARTIAL = ".partial.jsonl"  # the answers of a source of prompts until all of them are there
_REPLAYED = 8  # prompts that --html shows


@dataclass
class SampleJob:
    """Settings of jobs/sample.py."""

    output_dir: str = "outputs/samples"
    """Folder for samples.jsonl and, unless the model was trained here, the MLflow database."""
    prompt: str | None = None
    """One question."""
    prompts: str | list[str] | None = None
    """Questions: a file (jsonl, json, csv or parquet), a folder, glob or URL of such files, a data set of the hub, or a
    list of these."""
    columns: dict[str, str] = field(default_factory=dict)
    """Other column names in the source of prompts, e.g. `{prompt: query}`."""
    limit: int | None = None
    """Questions of the source, from the first; null: all."""
    infill: bool = False
    """Prompts are texts whose gaps are filled in: `[MASK]` is a gap of one token, `[MASK:8]` of eight."""
    edit: bool = False
    """Revise a draft of the answer in place, with a model that edits: `draft`, or a column `draft` of `prompts`."""
    draft: str | None = None
    """The draft that `edit` begins with, for a single prompt."""
    fresh: bool = False
    """Throw away the answers to a source of prompts that the output folder holds."""
    show: bool = False
    """Show how a single prompt is denoised: live on a terminal, else a line for each step."""
    html: str | None = None
    """A file to write: a web page that replays how the first prompts were denoised."""
    workers: int | None = None
    """Ray workers that hold the model; null: one for each GPU of the cluster, or 2 where there is none."""
    batch_size: int = 64
    """Prompts denoised together by a worker."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model; `model.path` is needed."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How to denoise."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; null `uri`: where the model's training was recorded, or the output folder."""

    def __post_init__(self):
        if self.model.path is None:
            raise ConfigError("name the model, e.g. --model.path outputs/digits/final", "model.path")
        if (self.prompt is None) == (self.prompts is None):
            raise ConfigError("give one question with --prompt, or a file with --prompts", "prompt")
        if self.prompts is not None and not self.prompts:
            raise ConfigError("name at least one source", "prompts")
        if self.show and self.prompts is not None:
            raise ConfigError("shows a single --prompt; for the first of many write a page with --html", "show")
        if self.prompt is not None:
            for name, default in (("columns", {}), ("limit", None), ("workers", None)):
                if getattr(self, name) != default:
                    raise ConfigError("is for a source of --prompts, not for a single --prompt", name)
        self._check_edit()
        if self.html is not None and not may_be_a_file(self.html):
            raise ConfigError(f"{self.html} is no file in a folder that is there", "html")
        for name in ("limit", "workers", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)

    def _check_edit(self) -> None:
        if self.edit and self.infill:
            raise ConfigError("a draft is revised or gaps are filled in, not both", "edit")
        if self.draft is not None and not self.edit:
            raise ConfigError("is there to be revised: say --edit", "draft")
        if self.draft is not None and self.prompts is not None:
            raise ConfigError("is for a single --prompt; a source of prompts has a column draft", "draft")
        if self.edit and self.prompt is not None and self.draft is None:
            raise ConfigError("give the draft that is to be revised with --draft", "draft")


@dataclass
class Work:
    """What is to be answered, checked."""

    job: SampleJob
    output_dir: Path
    provenance: dict[str, Any]
    tokenizer: Any
    spec: Any
    given: list[dict[str, Any]]
    """The columns of each answer's row that are not the answer's: the row's own, and what was asked."""
    prompts: list[Sequence[int]]
    drafts: list[Sequence[int]] | None
    """Of the answers, with --edit."""


def main(job: SampleJob) -> None:
    from dllm_ray.models.load import check_path

    check_path(job.model.path)
    rows = _rows(job)
    output_dir = writable_folder(job.output_dir)
    from dllm_ray.answers import answer_key
    from dllm_ray.models.provenance import read_provenance

    work = _encoded(job, output_dir, read_provenance(job.model.path), rows)
    key = None
    if job.prompt is None:
        key = answer_key(job.model, job.sampler, job.batch_size, work.prompts, job.infill, work.drafts)
    finished = None if job.fresh else _finished(output_dir, key)
    if finished is not None:
        (output_dir / PARTIAL).unlink(missing_ok=True)
        print(f"answers   all of them are in {output_dir / SAMPLES} from before; --fresh answers again", flush=True)
        if job.html is not None:
            _replay_again(work, finished)
    elif key is None:
        _answer_here(work)
    else:
        _answer_by_workers(work, key)


def _rows(job: SampleJob) -> Iterable[tuple[Callable[[], str], dict]]:
    """The rows, each with a function that says where it is from."""
    from dllm_ray.data import sources

    if job.prompt is not None:
        row = {"text" if job.infill else "prompt": job.prompt}
        return [(lambda: "--prompt", row if job.draft is None else {**row, "draft": job.draft})]
    shards = sources.resolve(job.prompts)
    # finding a row's line takes a look through its file, so it is done only when a message needs it
    rows = ((partial(shard.where, number), row) for shard in shards for number, row in shard.read())
    return islice(rows, job.limit)


def _encoded(job: SampleJob, output_dir: Path, provenance: dict, rows) -> Work:
    from dllm_ray.models.load import open_tokenizer
    from dllm_ray.prompts import encode_drafts, encode_rows, encode_texts, require_room
    from dllm_ray.sampling.plan import check

    tokenizer, spec, blueprint = open_tokenizer(job.model.path)
    with section("sampler"):
        check(job.sampler, spec, job.infill)
    others: list[dict[str, Any]] = []
    drafts = None
    if job.prompt is None:
        rows = _keeping(rows, others)
    if job.infill:
        asked, (texts, prompts) = "text", encode_texts(rows, tokenizer, spec.mask_token_id, job.columns)
    elif job.edit:
        asked, (texts, prompts, drafts) = "messages", encode_drafts(rows, tokenizer, spec, job.columns)
    else:
        asked, (texts, prompts) = "messages", encode_rows(rows, tokenizer, job.columns)
    own = others or [{} if job.draft is None else {"draft": job.draft}] * len(texts)
    given = [{**row, asked: text} for row, text in zip(own, texts, strict=True)]
    if not prompts:
        raise DataError(f"{job.prompts}: holds no rows")
    require_room(prompts, job.sampler, blueprint.max_length, job.infill, drafts)
    return Work(job, output_dir, provenance, tokenizer, spec, given, prompts, drafts)


def _keeping(rows: Iterable[tuple[Callable[[], str], dict]], others: list[dict]) -> Iterator:
    """The rows; their columns are kept, as far as they have place beside those of an answer."""
    from dllm_ray.answers import require_free_columns

    for where, row in rows:
        require_free_columns(where, row)
        others.append(row)
        yield where, row


def _finished(output_dir: Path, key: dict | None) -> dict | None:
    """The summary, where the folder holds these very answers. A single prompt has no key, and is answered every time.

    Raises:
        OutputError: it holds the answers to another source of prompts, or made with other settings.
    """
    from dllm_ray.answers import changes

    try:
        summary = json.loads((output_dir / SUMMARY).read_text(encoding="utf-8"))
        before, _ = summary["key"], summary["seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not (output_dir / SAMPLES).is_file():
        return None
    changed = ["they are to a source of prompts"] if key is None else changes(before, json.loads(json.dumps(key)))
    if changed:
        raise OutputError(
            f"{output_dir / SAMPLES} holds the answers of another run: {'; '.join(changed)}. Name another output_dir, "
            "or replace them with --fresh"
        )
    return summary


def _answer_here(work: Work) -> None:
    """Answers one prompt in this process."""
    import torch

    from dllm_ray.answers import Answer, ended_by_stop, needs_whole
    from dllm_ray.models.load import open_model
    from dllm_ray.sampling.sampler import row_seeds

    job = work.job
    with _tracked(work) as run:
        lm = open_model(job.model, device="cuda" if torch.cuda.is_available() else "cpu")
        seeds = row_seeds(job.sampler.seed, [0])
        canvases, output = _denoise(work, lm, seeds)
        ended = ended_by_stop(work.prompts, output, work.spec.stop_token_ids)
        path = work.output_dir / SAMPLES
        (work.output_dir / SUMMARY).unlink(missing_ok=True)  # from here on it would tell of other answers
        wholes = output.sequences if needs_whole(work.spec, job.sampler, job.infill) else [None]
        _write(work, path, map(Answer, output.completions, output.row_nfe, ended, wholes), seeds)
        figures = output.figures()
        run.log({f"sampler/{name}": value for name, value in figures.items()})
        run.file(path)
        if job.html is not None:
            run.file(_replay(work, canvases, output))
    text = json.loads(path.read_text(encoding="utf-8"))["completion"]
    print(printable(text) if sys.stdout.isatty() else text)
    print(
        f"1 answer in {path}: {figures['tpf']:.2f} tokens per forward, {figures['tokens_per_s']:,.0f} tokens/s",
        file=sys.stderr,
    )


def _denoise(work: Work, lm, seeds: list[int]):
    """The canvas it begins with and the sampler's output; its steps are shown where that is asked for."""
    from dllm_ray.answers import canvases, write
    from dllm_ray.sampling.sampler import Sampler
    from dllm_ray.viz.live import denoise

    job = work.job
    sampler = Sampler(lm, job.sampler)
    begins = canvases(sampler, work.prompts, job.infill, work.drafts)
    if job.show:
        draft = None if work.drafts is None else work.drafts[0]
        return begins, denoise(sampler, work.prompts[0], begins[0], job.infill, seeds[0], draft=draft)
    return begins, write(sampler, work.prompts, seeds, job.infill, work.drafts, trace=job.html is not None)


def _answer_by_workers(work: Work, key: dict) -> None:
    """Answers a source of prompts on Ray workers, going on where an earlier run was killed."""
    from dllm_ray.answers import AnswerStore, base_seed
    from dllm_ray.sampling.sampler import row_seeds
    from dllm_ray.tracking import ui_command
    from dllm_ray.viz.terminal import table

    job, total = work.job, len(work.prompts)
    path = work.output_dir / SAMPLES
    otherwise = "start over with --fresh, or name another output_dir"
    with AnswerStore(work.output_dir / PARTIAL, key, job.fresh, otherwise) as store, _kept(store, total):
        before = len(store)
        if before:
            print(f"resumed   {before} of {total} prompts were answered before", flush=True)
        seed = base_seed(store, job.sampler)
        seeds = row_seeds(seed, range(total))
        with _tracked(work, resume=store.facts.get("run_id")) as run:
            store.remember(run_id=run.run_id)
            if before < total or job.html is not None:
                _fill(work, store, seeds)
            figures = _write(work, path, (store[row] for row in range(total)), seeds)
            seconds = store.facts.get("seconds", 0.0)
            figures |= {
                "tokens_per_s": figures["tokens"] / max(seconds, 1e-9),
                "seconds": seconds,
                "answered_before": before,
            }
            run.log({f"sampler/{name}": value for name, value in figures.items()})
            run.file(path)
            if job.html is not None:
                run.file(job.html)
            with complete_file(work.output_dir / SUMMARY) as file:  # the last of all: it says that the rest is there
                json.dump({**figures, "seed": seed, "run_id": run.run_id, "key": key}, file, indent=2)
            run.file(work.output_dir / SUMMARY)
        store.remove()
    table(f"{job.model.path}", [{name.replace("_", " "): value for name, value in figures.items()}])
    print(f"answers   {path}")
    print(f"tracking  run {run.run_id}: {ui_command(run.uri)}")


@contextmanager
def _kept(store, total: int) -> Iterator[None]:
    """Says what becomes of finished answers when the work is broken off."""
    try:
        yield
    except BaseException:
        if len(store):
            print(
                f"{len(store)} of {total} answers are kept: the same command, without --fresh, goes on from there",
                file=sys.stderr,
            )
        raise


def _fill(work: Work, store, seeds: list[int]) -> None:
    """Answers what is left, and writes the replay."""
    from dllm_ray.viz.terminal import Progress

    job, total = work.job, len(work.prompts)
    with _pool(work, job.workers) as pool:
        pool.wait()
        (work.output_dir / SUMMARY).unlink(missing_ok=True)  # from here on it would tell of other answers
        progress = Progress("sample", total, "prompt", done=len(store))
        pool.fill(store, work.prompts, job.sampler, job.batch_size, progress.update, job.infill, work.drafts)
        progress.close()
        if job.html is not None:
            _replay_first(work, pool, seeds)


def _replay_again(work: Work, summary: dict) -> None:
    """Writes the replay of answers that are there already: their seeds give them again."""
    from dllm_ray.sampling.sampler import row_seeds

    with _pool(work, 1) as pool:
        _replay_first(work, pool, row_seeds(summary["seed"], range(min(len(work.prompts), _REPLAYED))))
    print(f"replay    {work.job.html}")


@contextmanager
def _pool(work: Work, workers: int | None) -> Iterator[Any]:
    """Workers with the model, on a cluster."""
    from dllm_ray import cluster, tracking
    from dllm_ray.bulk_metrics import BulkMetrics
    from dllm_ray.metrics import Labels
    from dllm_ray.workers import ModelPool

    job = work.job
    labels = Labels("sample", tracking.run_name("sample", work.output_dir, job.tracking), job.model.path)
    with (
        cluster.connect(workers or 2),
        BulkMetrics(labels) as metrics,
        ModelPool(job.model, cluster.shares(workers, None, None, ""), metrics=metrics) as pool,
    ):
        yield pool


def _replay_first(work: Work, pool, seeds: list[int]) -> None:
    few = work.prompts[:_REPLAYED]
    drafts = None if work.drafts is None else work.drafts[:_REPLAYED]
    _replay(work, *pool.trace(few, work.job.sampler, seeds[: len(few)], work.job.infill, drafts))


def _replay(work: Work, canvases: list[list[int]], output) -> Path:
    """Writes the page that replays the first prompts."""
    from dllm_ray.viz.html import ReplayRow, replay

    rows = []
    for number, canvas in enumerate(canvases):
        given = 0 if work.job.infill else len(work.prompts[number])
        label = f"Prompt {number + 1}" if len(work.prompts) > 1 else ""
        rows.append(ReplayRow(canvas, output.commits[number], given, output.sequences[number], label))
    path = Path(work.job.html)
    replay(path, work.tokenizer, work.spec, rows, work.job.model.path, to_dict(work.job.sampler))
    return path


@contextmanager
def _tracked(work: Work, resume: str | None = None) -> Iterator[Any]:
    """The job's MLflow run, under the model's training where that is known."""
    from dllm_ray import tracking

    job = work.job
    store = tracking.beside_training(job.tracking, work.provenance)
    tags = {"dllm_ray.model": job.model.path}
    parent = work.provenance.get("run_id")
    with tracking.start("sample", to_dict(job), work.output_dir, store, tags, resume=resume, parent=parent) as run:
        yield run


def _write(work: Work, path: Path, answers: Iterable, seeds: Sequence[int]) -> dict[str, float]:
    """Writes the rows, and returns their figures."""
    from dllm_ray import chat
    from dllm_ray.answers import answer_columns

    tokens = nfe = ended = right = 0
    solved = not work.job.infill and all(isinstance(given.get("response"), str) for given in work.given)
    eot_text = work.spec.eot_text
    with complete_file(path) as file:
        for given, prompt, answer, seed in zip(work.given, work.prompts, answers, seeds, strict=True):
            gaps = prompt if work.job.infill else None
            row = {**given, **answer_columns(work.tokenizer, work.spec, answer, seed, gaps)}
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
            tokens += row["completion_tokens"]
            nfe += row["nfe"]
            # where no single token ends an answer, a text may
            cut = eot_text is not None and chat.decode(work.tokenizer, answer.tokens).rstrip() != row["completion"]
            ended += answer.ended or cut
            right += solved and row["completion"].strip() == given["response"].strip()
    figures = {
        "prompts": len(work.prompts),
        "tokens": tokens,
        "mean_tokens": tokens / len(work.prompts),
        "nfe": nfe,
        "tpf": tokens / max(nfe, 1),
    }
    if solved:
        figures["exact_match"] = right / len(work.prompts)
    return figures if work.job.infill else figures | {"ended": ended, "at_limit": len(work.prompts) - ended}


if __name__ == "__main__":
    sys.exit(run_job(SampleJob, main, __doc__))
