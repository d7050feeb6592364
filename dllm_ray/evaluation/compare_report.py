"""A comparison as tables, pages, JSON and metrics: what `compare.Row`s look like. No files, no tracking store."""

import html
import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dllm_ray.evaluation import reference
from dllm_ray.evaluation.compare import Row
from dllm_ray.evaluation.reference import Published
from dllm_ray.viz import scores

TITLE = "Evaluations and published scores"
_NOT_IN_A_METRIC = re.compile(r"[^\w\-. /]", re.ASCII)


def display(row: Row) -> str:
    """What a row's model is called: its published name where it has one, or else its path; with its adapter."""
    names = reference.names_of(row.model)
    name = names[0] if row.ours and len(names) == 1 else row.model
    adapter = row.ours and row.ours.settings.get("model.adapter")
    return f"{name} + {adapter}" if adapter not in (None, "", "None") else name


def cells(row: Row) -> dict[str, str]:
    """What tables show of a row, by column; `settings` says how they differ from the official ones."""
    ours = row.ours
    value = stderr = documents = ""
    if ours is not None:
        value = "-" if ours.value is None else _score(ours.value, ours.percent)
        stderr = "" if ours.stderr is None else f" ± {_score(ours.stderr, ours.percent)}"
        documents = "" if ours.documents is None else f"{ours.documents:,}"
    points = "" if row.points is None else f"{row.points:+.1f}"
    return {
        "model": display(row),
        "task": row.benchmark if ours is None else ours.task,
        "setting": "" if ours is None else ours.setting,
        "ours": value + stderr,
        "docs": documents + (" (part)" if ours is not None and ours.limited else ""),
        "official": "" if row.official is None else f"{row.official.score:.1f}",
        "reproduced": "" if row.reproduced is None else f"{row.reproduced.score:.1f}",
        "diff": points + ("" if row.errors is None else f" ({row.errors:+.1f} se)"),
        "NFE": _figure(ours and ours.nfe),
        "TPF": "" if ours is None or ours.tpf is None else f"{ours.tpf:.2f}",
        "tok/s": _figure(ours and ours.tokens_per_s),
        "settings": verdict(row),
    }


def verdict(row: Row) -> str:
    """In words: what to know of the score, and whether its settings are the official ones."""
    if row.ours is None:
        return ""
    parts = list(row.remarks)
    parts += [str(difference) for difference in row.differences]
    if row.line is not None:
        parts = parts or ["as the official line"]
        parts[-1] += f" [{row.line.file}: {row.line.name}]"
    elif row.against is not None:
        parts.append("no official line to compare settings with")
    return ", ".join(parts)


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The comparison as a Markdown document."""
    table = [cells(row) for row in rows]
    columns = list(table[0])
    lines = [f"# {TITLE}", "", "| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_plain_text(line[column]) for column in columns) + " |" for line in table]
    return "\n".join([*lines, "", *(f"{_plain_text(note)}\n" for note in notes)])


def as_json(row: Row) -> dict[str, Any]:
    """A row as plain values."""
    ours, line = row.ours, row.line
    return {
        "model": row.model,
        "benchmark": row.benchmark,
        "ours": ours
        and {
            "run_id": ours.run_id,
            "task": ours.task,
            "setting": ours.setting,
            "metric": ours.metric,
            "value": ours.value,
            "stderr": ours.stderr,
            "unit": "percent" if ours.percent else "as measured",
            "documents": ours.documents,
            "limited": ours.limited,
            "status": ours.status,
            "nfe": ours.nfe,
            "tpf": ours.tpf,
            "tokens_per_s": ours.tokens_per_s,
            "settings": dict(ours.settings),
        },
        "official": row.official and record_json(row.official),
        "reproduced": row.reproduced and record_json(row.reproduced),
        "difference": {"points": row.points, "standard_errors": row.errors},
        "official_line": line and {"file": line.file, "name": line.name, "task": line.task},
        "differs": [{"setting": item.key, "ours": item.ours, "official": item.official} for item in row.differences],
        "remarks": row.remarks,
    }


def record_json(record: Published) -> dict[str, Any]:
    """A published score as plain values, without what its source doesn't say."""
    return {key: value for key, value in vars(record).items() if value not in (None, {})}


def page(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The comparison as a web page, with a plot."""
    plots: dict[str, list[scores.PlotRow]] = {}
    for row in rows:
        ours = row.ours if row.ours and row.ours.percent and row.ours.value is not None else None
        if ours or row.against:
            plots.setdefault(row.benchmark, []).append(
                scores.PlotRow(
                    label=_label(row),
                    ours=ours and ours.value,
                    stderr=ours and ours.stderr,
                    official=row.official and row.official.score,
                    reproduced=row.reproduced and row.reproduced.score,
                )
            )
    sources = [
        {
            "model": record.model,
            "benchmark": record.task,
            "score": f"{record.score:.1f}",
            "kind": record.kind,
            "settings": record.setting or "",
            "source": record.source + (f" ({record.note})" if record.note else ""),
        }
        for record in records(rows)
    ]
    return scores.page(TITLE, plots, [cells(row) for row in rows], notes, sources)


def records(rows: Sequence[Row]) -> list[Published]:
    """Every published score of the models on the benchmarks of these rows."""
    found = [record for row in rows for record in reference.find(reference.names_of(row.model), row.benchmark)]
    return list({id(record): record for record in found}.values())


def tree(rows: Sequence[Row]) -> dict[str, Any]:
    """The comparison as plain values."""
    return {
        "rows": [as_json(row) for row in rows],
        "published": [record_json(record) for record in records(rows)],
    }


def metrics(rows: Sequence[Row]) -> dict[str, float]:
    """`compare/<model>/<task>/ours|official|reproduced|difference`; a task asked in several settings has
    their names behind it."""
    found: dict[str, float] = {}
    for row in rows:
        where = f"{row.model}/{row.benchmark if row.ours is None else row.ours.task}"
        if row.ours is not None and row.ours.setting not in ("", row.ours.task):
            where += f"/{row.ours.setting}"
        values = {
            "ours": row.ours and row.ours.value,
            "official": row.official and row.official.score,
            "reproduced": row.reproduced and row.reproduced.score,
            "difference": row.points,
        }
        for name, value in values.items():
            if value is not None:
                found.setdefault(_metric_name(f"compare/{where}/{name}"), value)  # the newest run comes first
    return found


@dataclass
class Column:
    """The scores of one model that are of one kind, to stand beside others."""

    model: str
    kind: str
    """`ours`, `official` or `reproduced`."""
    scores: dict[str, float] = field(default_factory=dict)
    """`score/<benchmark>`; of ours also `score_minus_published/<benchmark>`, in points."""


def columns(rows: Sequence[Row]) -> dict[str, Column]:
    """Name -> scores of each model and kind, so that MLflow sets them side by side."""
    columns: dict[str, Column] = {}

    def put(name: str, column: Column, score: str, value: float | None) -> None:
        if value is not None:
            columns.setdefault(name, column).scores.setdefault(_metric_name(score), round(value, 4))

    for row in rows:
        if row.ours is not None:
            name = f"{row.model} {row.ours.setting}".strip() + " ours"
            put(name, Column(row.model, "ours"), f"score/{row.benchmark}", row.ours.value)
            put(name, Column(row.model, "ours"), f"score_minus_published/{row.benchmark}", row.points)
        for record in (row.official, row.reproduced):
            if record is not None:
                name = f"{record.model} {record.kind}"
                put(name, Column(record.model, record.kind), f"score/{row.benchmark}", record.score)
    return columns


def _metric_name(name: str) -> str:
    """A name that MLflow takes: few kinds of characters, no path that leads elsewhere, at most 250 characters."""
    parts = [part for part in posixpath.normpath(_NOT_IN_A_METRIC.sub("_", name)).split("/") if part not in ("", "..")]
    return "/".join(parts)[-250:].lstrip("/")


def _label(row: Row) -> str:
    if row.ours is None:
        return row.model
    setting = row.ours.setting or (row.ours.task if row.ours.task.lower() != row.benchmark.lower() else "")
    parts = [display(row), setting, "part" if row.ours.limited else ""]
    return " \u00b7 ".join(part for part in parts if part)


def _score(value: float, percent: bool) -> str:
    return f"{value:.1f}" if percent else f"{value:.4g}"


def _figure(value: float | None) -> str:
    return "" if not value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _plain_text(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    text = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{character}" if character in "\\|`*[]" else character for character in text)
