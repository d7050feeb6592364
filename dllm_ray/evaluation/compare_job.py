"""A comparison from its settings to a table and a page: reads the evaluations of a tracking store, sets them beside the
published scores, and records what came of it. `jobs/compare.py` and the pipeline call `run`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dllm_ray.config import to_dict
from dllm_ray.errors import ConfigError, EvaluationError
from dllm_ray.output import complete_file, may_be_a_file, printable, writable_folder
from dllm_ray.tracking import COMPARISON, TrackingConfig


@dataclass
class CompareJob:
    """Settings of jobs/compare.py."""

    output_dir: str = "outputs/compare"
    """Folder for the tables and the page."""
    model: str | None = None
    """Only models whose path or hub id holds one of these words, separated by commas."""
    task: str | None = None
    """Only these tasks or benchmarks, separated by commas."""
    run_ids: str | None = None
    """Only these MLflow runs and those below them, separated by commas."""
    published: str | None = None
    """Published models to show as well, separated by commas, e.g. `LLaDA-8B-Instruct,LLaDA-1.5`: on the same
    benchmarks, or on all of theirs where they have none of these. null: beside a model without published scores every
    one on the same benchmarks, or, where there is none, two well-known ones."""
    html: str | None = None
    """File of the page, which needs nothing beside it, e.g. in a web server's folder; null: compare.html in the output
    folder."""
    all: bool = False
    """Show every run, in place of the newest of several with the same model, task and settings."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow; `tracking.uri` is needed."""

    def __post_init__(self):
        if self.tracking.uri is None:
            raise ConfigError(
                "name the store that holds the evaluation runs, e.g. sqlite:///outputs/evaluate/mlruns.db",
                "tracking.uri",
            )
        if self.html is not None and not may_be_a_file(self.html):
            raise ConfigError(f"{self.html} is no file in a folder that is there", "html")
        from dllm_ray.evaluation import reference

        for model in _words(self.published):
            if not reference.names_of(model):
                raise ConfigError(
                    f"no published scores of {model!r}; there are {', '.join(reference.hub_ids())}", "published"
                )


def run(job: CompareJob, official: Path, parent: str | None = None) -> tuple[str, list[Path]]:
    """Prints the tables, and leaves them and the page in the output folder and in MLflow.

    Args:
        job: the settings.
        official: folder of the official settings.
        parent: MLflow run that this one belongs under.

    Returns:
        The id of the MLflow run, and the files.

    Raises:
        EvaluationError: the store holds no such evaluation.
        OutputError: the store can't be reached, or a file can't be written.
    """
    from dllm_ray import tracking
    from dllm_ray.evaluation import compare, compare_report, reference

    found, looked = _scores(job)
    output_dir = writable_folder(job.output_dir)
    shown = found if job.all else compare.newest(found)
    lines = compare.official_lines(official, dict.fromkeys(score.model for score in shown))
    published = [name for word in _words(job.published) for name in reference.names_of(word)]
    rows = compare.table(shown, lines, published)
    notes = [
        f"{looked}. Scores are in percent unless they are perplexities or the like; ± is one standard error. diff is "
        "ours less the official score, or less the reproduced one where there is no official one, in percentage "
        "points and in standard errors of ours. Published are scores with the nearest settings on record. NFE, TPF and "
        "tok/s are those of the whole run."
    ]
    page = Path(job.html or output_dir / "compare.html").resolve()
    texts = {
        output_dir / "compare.md": compare_report.markdown(rows, notes),
        page: compare_report.page(rows, notes),
        output_dir / "compare.json": json.dumps(compare_report.tree(rows), indent=2, ensure_ascii=False, default=str),
    }
    for path, text in texts.items():
        with complete_file(path) as file:
            file.write(text)
    _print(rows)
    tags = {"dllm_ray.compare.models": ", ".join(dict.fromkeys(row.model for row in rows if row.ours))[:5000]}
    named = _named(job, shown)
    with tracking.start("compare", to_dict(job), output_dir, named, tags, parent=parent) as run:
        run.log(compare_report.metrics(rows))
        for path in texts:
            run.file(path)
        address = _beside_each_other(run, named.run_name, compare_report.columns(rows))
    print(f"page      {page}")
    print(f"tracking  run {run.run_id}: {tracking.ui_command(run.uri)}")
    print(f"view      {address}")
    return run.run_id, list(texts)


def _beside_each_other(run, name: str, columns: Mapping) -> str:
    """Records the columns as runs, saves a view of them, and returns its address."""
    for column, held in columns.items():
        tags = {"dllm_ray.job": "compare-column", "dllm_ray.model": held.model, "dllm_ray.score": held.kind}
        run.child(column, held.scores, tags | {COMPARISON: run.run_id}, nested=False)
    metrics = list(dict.fromkeys(metric for held in columns.values() for metric in held.scores))
    scores = [metric for metric in metrics if metric.startswith("score/")]
    differences = [metric for metric in metrics if metric not in scores]
    shown = ["tags.dllm_ray.score", *(f"metrics.{metric}" for metric in scores + differences)]
    return run.save_view(name, f"tags.`{COMPARISON}` = '{run.run_id}'", shown, scores)


def _scores(job: CompareJob):
    """What the store holds of the wanted runs, the newest first, and where it was looked for."""
    from dllm_ray import tracking
    from dllm_ray.evaluation import compare, reference

    where = f"{tracking.without_credentials(job.tracking.uri)}, experiment {job.tracking.experiment!r}"
    everything = tracking.find_runs(job.tracking, "evaluate")
    runs = everything
    if job.run_ids:
        wanted = set(_words(job.run_ids))
        known = {run.run_id for run in everything}
        if wanted - known:
            raise EvaluationError(
                f"{where} has no evaluation run {min(wanted - known)}; it has {len(known)}"
                + (f", the newest is {everything[0].run_id}" if known else "")
            )
        runs = [run for run in everything if {run.run_id, run.parent} & wanted]
    parents = {run.parent for run in everything}
    # the run that only holds those of a suite's lines measures nothing by itself
    runs = [run for run in runs if run.run_id not in parents or any(key.startswith("eval/") for key in run.metrics)]
    models = {run.tags.get("dllm_ray.model", "") for run in runs}
    if job.model:
        words = [word.lower() for word in _words(job.model)]
        runs = [run for run in runs if any(word in run.tags.get("dllm_ray.model", "").lower() for word in words)]
    found = [score for run in runs for score in compare.scores(run, _setting(run), _json(run.artifact("results.json")))]
    tasks = {score.task for score in found}
    if job.task:
        words = {reference.benchmark(word).lower() for word in _words(job.task)} | {*_words(job.task)}
        found = [score for score in found if {score.task, score.benchmark.lower()} & words]
    if found:
        return found, f"{len(everything)} evaluation runs in {where}"
    if not everything:
        raise EvaluationError(f"no evaluation runs in {where}: jobs/evaluate.py records them there with tracking.uri")
    held = f"models {', '.join(sorted(models))}" if not tasks else f"tasks {', '.join(sorted(tasks))}"
    raise EvaluationError(f"none of the {len(everything)} evaluation runs in {where} is wanted; they have {held}")


def _setting(run) -> Mapping:
    """The resolved settings of a run: of its own line, or of its whole job."""
    import yaml

    setting = _json(run.artifact("setting.json"))
    if setting:
        return setting
    tree = yaml.safe_load(run.artifact("config.yaml") or "") or {}
    return {key: tree[key] for key in ("evaluate", "sampler", "likelihood") if key in tree}


def _json(text: str | None) -> dict:
    try:
        tree = json.loads(text or "{}")
    except ValueError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _print(rows: Sequence) -> None:
    """Two tables, because one would be wider than a terminal: the scores, and what ours took."""
    from dllm_ray.evaluation import compare_report
    from dllm_ray.viz.terminal import table

    scores, costs, notes = [], [], {}
    for row in rows:
        cells = {key: printable(value) for key, value in compare_report.cells(row).items()}
        name = {"benchmark": printable(row.benchmark), "model": cells["model"]}
        asked = {"setting": cells["setting"] or cells["task"]} if row.ours else {}
        score = {key: cells[key] for key in ("ours", "official", "reproduced", "diff")}
        if cells["settings"]:
            number = notes.setdefault(cells["settings"], len(notes) + 1)
            score["note"] = f"[{number}]"
        scores.append(name | asked | score)
        if row.ours is not None:
            costs.append(name | asked | {key: cells[key] for key in ("docs", "NFE", "TPF", "tok/s")})
    table(compare_report.TITLE, scores)
    for said, number in notes.items():
        print(f"[{number}] {said}")
    table("What ours took", costs)


def _named(job: CompareJob, shown: Sequence) -> TrackingConfig:
    if job.tracking.run_name is not None:
        return job.tracking
    from dllm_ray.evaluation import reference

    models = list(dict.fromkeys(reference.short_name(score.model) for score in shown))
    more = f" and {len(models) - 2} more" if len(models) > 2 else ""
    return replace(job.tracking, run_name=f"compare {', '.join(models[:2])}{more}")


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in (text or "").split(",") if word.strip()]
