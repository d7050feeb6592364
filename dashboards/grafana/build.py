"""Makes the Grafana dashboards beside this file: python dashboards/grafana/build.py

Each dashboard is a list of rows of panels, written down below. What Grafana wants beside that (ids, places, data
sources, variables) is the same for all and comes from the functions at the end.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "dashboards"
COLUMNS = 24
"""Width of Grafana's grid."""

Target = tuple[str, str]
"""A query and the legend of its lines."""


@dataclass(frozen=True)
class Panel:
    """One picture: lines over time, or the newest value as a number."""

    title: str
    description: str
    unit: str
    """As Grafana names units: `s`, `bytes`, `percentunit`, `short`."""
    targets: Sequence[Target]
    number: bool = False
    """Show the newest value."""
    least: float | None = 0.0
    """Where the axis begins; None: where the values do."""
    most: float | None = None
    stacked: bool = False
    logarithmic: bool = False


@dataclass(frozen=True)
class Dashboard:
    """One page."""

    uid: str
    title: str
    description: str
    variables: dict[str, str]
    """Label -> the metric whose values of it are offered."""
    rows: dict[str, Sequence[Panel]] = field(default_factory=dict)
    """Heading -> panels, which share the width."""


def percentiles(metric: str, selector: str, by: str = "model", legend: str = "{{model}}") -> list[Target]:
    """The median and two high percentiles of a histogram."""
    return [
        (
            f"histogram_quantile({quantile}, sum by (le, {by}) (rate({metric}_bucket{selector}[$__rate_interval])))",
            f"{name} {legend}",
        )
        for quantile, name in ((0.5, "median"), (0.95, "95 %"), (0.99, "99 %"))
    ]


def rate(metric: str, selector: str, by: str) -> str:
    """What a counter gains in a second."""
    return f"sum by ({by}) (rate({metric}{selector}[$__rate_interval]))"


def training() -> Dashboard:
    """Of jobs/sft.py and jobs/pretrain.py."""
    of = '{run=~"$run", model=~"$model"}'

    def value(name: str, legend: str = "{{run}}", by: str = "run") -> list[Target]:
        return [(f"max by ({by}) (ray_dllm_train_{name}{of})", legend)]

    progress = f"max by (run) (ray_dllm_train_step{of}) / max by (run) (ray_dllm_train_planned_steps{of})"
    source = f"max by (run, source) (ray_dllm_train_source_tokens{of})"
    busy = (
        'label_replace(avg by (ip) (ray_node_cpu_utilization), "part", "CPU", "", "") or '
        'label_replace(avg by (ip, GpuIndex) (ray_node_gpus_utilization), "part", "GPU", "", "")'
    )
    return Dashboard(
        "dllm-training",
        "DLM training",
        "Loss, speed, data and memory of training runs (jobs/sft.py, jobs/pretrain.py).",
        {"model": "ray_dllm_train_step", "run": 'ray_dllm_train_step{model=~"$model"}'},
        {
            "Now": [
                Panel("Progress", "Steps done of all.", "percentunit", [(progress, "{{run}}")], number=True),
                Panel("Speed", "Tokens a second, of all workers.", "short", value("tokens_per_second"), number=True),
                Panel("Data wait", "Time spent on waiting.", "percentunit", value("data_wait_ratio"), number=True),
                Panel("Peak memory", "Held by the first worker.", "bytes", value("peak_memory_bytes"), number=True),
                Panel("Workers", "Training workers.", "short", value("workers"), number=True),
                Panel("Skipped", "Steps without finite gradient.", "short", value("skipped_steps"), number=True),
            ],
            "Learning": [
                Panel(
                    "Loss",
                    "The objective's loss at logged steps, and the weighted cross-entropy per target token in nats.",
                    "short",
                    [*value("loss", "loss {{run}}"), *value("nll", "nll {{run}}")],
                    least=None,
                ),
                Panel(
                    "Validation",
                    "Negative ELBO per target token over the validation rows, in nats, with the same noise every time.",
                    "short",
                    value("valid_nll"),
                    least=None,
                ),
                Panel(
                    "Gradient norm",
                    "Before clipping. Peaks come before a run diverges.",
                    "short",
                    value("gradient_norm"),
                    least=None,
                    logarithmic=True,
                ),
            ],
            "Speed": [
                Panel(
                    "Tokens a second",
                    "Tokens without padding, of all workers, without validation and checkpoints.",
                    "short",
                    value("tokens_per_second"),
                ),
                Panel(
                    "Data wait",
                    "Share of the time in which training waited for tokenized rows. Above some percent: give data more "
                    "CPUs, or keep tokenized rows with data.cache_dir.",
                    "percentunit",
                    value("data_wait_ratio"),
                ),
                Panel("Step", "Steps done. A fall is a restart from a checkpoint.", "short", value("step")),
            ],
            "Health": [
                Panel(
                    "Workers and their starts",
                    "Workers that train, and how often they were started; more than once: after failures, or as the "
                    "cluster grew.",
                    "short",
                    [*value("workers", "workers {{run}}"), *value("starts", "starts {{run}}")],
                ),
                Panel(
                    "Checkpoints",
                    "Step of the last checkpoint, from which a killed run goes on, beside the step.",
                    "short",
                    [*value("checkpoint_step", "last checkpoint {{run}}"), *value("step", "step {{run}}")],
                ),
                Panel(
                    "Checkpoints saved and steps skipped",
                    "Since the job began. Steps are skipped where the gradient isn't finite (train.on_nan).",
                    "short",
                    [*value("checkpoints", "checkpoints {{run}}"), *value("skipped_steps", "skipped {{run}}")],
                ),
            ],
            "Data and schedule": [
                Panel(
                    "Sources",
                    "Share of the tokens that each source of the mixture gave, at checkpoints.",
                    "percentunit",
                    [(f"{source} / on (run) group_left sum by (run) ({source})", "{{source}} {{run}}")],
                    stacked=True,
                ),
                Panel("Epoch", "Passes over the data that were begun before this one.", "short", value("epoch")),
                Panel("Learning rate", "Of the last logged step.", "sci", value("learning_rate")),
            ],
            "Machines": [
                Panel(
                    "Memory of the first worker",
                    "Most it has held at once: by tensors on a GPU, by the whole process on a CPU.",
                    "bytes",
                    value("peak_memory_bytes"),
                ),
                Panel(
                    "Memory of the nodes",
                    "In use, of what each node has.",
                    "percentunit",
                    [("max by (ip) (ray_node_mem_used) / max by (ip) (ray_node_mem_total)", "{{ip}}")],
                    most=1.0,
                ),
                Panel(
                    "Processors of the nodes",
                    "How busy the cores are, and each GPU.",
                    "percent",
                    [(busy, "{{ip}} {{part}} {{GpuIndex}}")],
                    most=100.0,
                ),
            ],
        },
    )


def serving() -> Dashboard:
    """Of jobs/serve.py."""
    of = '{model=~"$model"}'
    failed = "ray_dllm_requests_total{}".format('{model=~"$model", status=~"[45].."}')
    asked = f"rate(ray_dllm_requests_total{of}[$__rate_interval])"

    def mean(histogram: str) -> str:
        return f"{rate(f'ray_dllm_{histogram}_sum', of, 'model')} / {rate(f'ray_dllm_{histogram}_count', of, 'model')}"

    per_forward = f"{rate('ray_dllm_tokens_total', of, 'model')} / {rate('ray_dllm_steps_total', of, 'model')}"
    errors = f"(sum(rate({failed}[$__rate_interval])) or vector(0)) / sum({asked})"
    return Dashboard(
        "dllm-serving",
        "DLM sampling and serving",
        "Requests, latency, the batch and its decoding on a server (jobs/serve.py).",
        {"model": "ray_dllm_requests_total"},
        {
            "Now": [
                Panel("Requests", "A second.", "reqps", [(f"sum({asked})", "requests")], number=True),
                Panel("Errors", "Refused or failed.", "percentunit", [(errors, "errors")], number=True),
                Panel(
                    "Tokens",
                    "Written a second.",
                    "short",
                    [(f"sum(rate(ray_dllm_tokens_total{of}[$__rate_interval]))", "tokens")],
                    number=True,
                ),
                Panel(
                    "Under way",
                    "Texts being denoised.",
                    "short",
                    [(f"sum(ray_dllm_active_rows{of})", "texts")],
                    number=True,
                ),
                Panel(
                    "Queue",
                    "Calls that wait for room in a batch.",
                    "short",
                    [(f"sum(ray_dllm_queued_calls{of})", "calls")],
                    number=True,
                ),
                Panel(
                    "First text",
                    "Median time to the first text of a call.",
                    "s",
                    [percentiles("ray_dllm_first_text_seconds", of)[0]],
                    number=True,
                ),
            ],
            "Requests": [
                Panel(
                    "By status",
                    "HTTP requests a second, by status. 429: the queue was full; 499: the client left.",
                    "reqps",
                    [(rate("ray_dllm_requests_total", of, "status"), "{{status}}")],
                    stacked=True,
                ),
                Panel(
                    "Errors by outcome",
                    "Requests a second that were not answered well, by what became of them.",
                    "reqps",
                    [(f"sum by (outcome) (rate({failed}[$__rate_interval]))", "{{outcome}}")],
                    stacked=True,
                ),
                Panel(
                    "Calls by reason",
                    "How calls ended in the batch: stop and length are answers, others refusals, cancelled: the client "
                    "left.",
                    "cps",
                    [(rate("ray_dllm_calls_total", of, "reason"), "{{reason}}")],
                    stacked=True,
                ),
            ],
            "Latency": [
                Panel(
                    "Requests",
                    "From a request's arrival to its last byte.",
                    "s",
                    percentiles("ray_dllm_request_seconds", of),
                ),
                Panel(
                    "First text",
                    "From a call's arrival at a replica, the queue included, to the first text that is sent.",
                    "s",
                    percentiles("ray_dllm_first_text_seconds", of),
                ),
                Panel(
                    "First text of streams",
                    "As the client sees it: from the request to the first text of its stream.",
                    "s",
                    percentiles("ray_dllm_stream_first_text_seconds", of),
                ),
                Panel(
                    "Per token",
                    "Of each text: time over its tokens.",
                    "s",
                    percentiles("ray_dllm_token_seconds", of),
                ),
            ],
            "Sampling": [
                Panel(
                    "Tokens per forward of texts",
                    "TPF: tokens of a text over the forwards it took part in. Parallel decoding raises it.",
                    "short",
                    [
                        *percentiles("ray_dllm_tokens_per_forward", of)[:2],
                        (mean("tokens_per_forward"), "mean {{model}}"),
                    ],
                ),
                Panel(
                    "Tokens per forward of the batch",
                    "Tokens of all texts together over the batch's forwards: how much a forward yields.",
                    "short",
                    [(per_forward, "{{model}}")],
                ),
                Panel(
                    "Batch",
                    "Texts denoised in a step.",
                    "short",
                    [*percentiles("ray_dllm_step_rows", of)[:2], (mean("step_rows"), "mean {{model}}")],
                ),
                Panel(
                    "Queue",
                    "Calls that wait for room, and texts being denoised.",
                    "short",
                    [
                        (f"sum by (model) (ray_dllm_queued_calls{of})", "queued {{model}}"),
                        (f"sum by (model) (ray_dllm_active_rows{of})", "active {{model}}"),
                    ],
                ),
            ],
            "Work": [
                Panel(
                    "Tokens a second",
                    "Written, of all replicas.",
                    "short",
                    [(rate("ray_dllm_tokens_total", of, "model"), "{{model}}")],
                ),
                Panel(
                    "Forwards a second",
                    "Of the batch, of all replicas.",
                    "short",
                    [(rate("ray_dllm_steps_total", of, "model"), "{{model}}")],
                ),
                Panel(
                    "Replicas at work",
                    "Time spent in steps a second: 2 means that two replicas are never idle.",
                    "short",
                    [(rate("ray_dllm_busy_seconds_total", of, "model"), "{{model}}")],
                ),
                Panel(
                    "Whole calls",
                    "From a call's arrival at a replica to the end of its last text.",
                    "s",
                    percentiles("ray_dllm_call_seconds", of),
                ),
            ],
        },
    )


def evaluation() -> Dashboard:
    """Of jobs/evaluate.py, jobs/sweep.py, and jobs/sample.py with a source of prompts."""
    of = '{command=~"$command", run=~"$run", model=~"$model"}'
    asked = '{command=~"$command", run=~"$run", model=~"$model", task=~"$task"}'
    name = "{{run}} {{task}} {{setting}} {{kind}}"

    def value(metric: str, legend: str = name, by: str = "run, task, setting, kind") -> list[Target]:
        return [(f"max by ({by}) (ray_dllm_bulk_{metric}{asked})", legend)]

    def share(part: str, whole: str) -> str:
        by = "run, task, setting, kind"
        return f"max by ({by}) (ray_dllm_bulk_{part}{asked}) / max by ({by}) (ray_dllm_bulk_{whole}{asked})"

    workers = f"sum by (state) (ray_dllm_bulk_workers{of})"
    answers = f"ray_dllm_bulk_answers_total{asked}"
    disk = answers.replace('task=~"$task"', 'task=~"$task", source="disk"')
    return Dashboard(
        "dllm-evaluation",
        "DLM evaluation",
        "Slices, workers and decoding of evaluations, sweeps and bulk sampling.",
        {
            "command": "ray_dllm_bulk_workers",
            "model": 'ray_dllm_bulk_workers{command=~"$command"}',
            "run": 'ray_dllm_bulk_workers{command=~"$command", model=~"$model"}',
            "task": 'ray_dllm_bulk_requests{run=~"$run"}',
        },
        {
            "Now": [
                Panel(
                    "Progress",
                    "Requests answered, of all.",
                    "percentunit",
                    [(share("requests_done", "requests"), name)],
                    number=True,
                ),
                Panel(
                    "Slices",
                    "Slices that workers have finished, of all.",
                    "percentunit",
                    [(f"sum(ray_dllm_bulk_slices_done{asked}) / (sum(ray_dllm_bulk_slices{asked}) > 0)", "slices")],
                    number=True,
                ),
                Panel("Workers", "By what they do.", "short", [(workers, "{{state}}")], number=True),
                Panel(
                    "Tokens per forward",
                    "TPF of the answers so far.",
                    "short",
                    value("tokens_per_forward"),
                    number=True,
                ),
                Panel(
                    "From disk",
                    "Share of the answers that an earlier run had left.",
                    "percentunit",
                    [(f"(sum({disk}) or vector(0)) / sum({answers})", "from disk")],
                    number=True,
                ),
                Panel(
                    "Lost workers",
                    "Workers that died and were replaced.",
                    "short",
                    [(f"sum(ray_dllm_bulk_lost_workers{of})", "lost")],
                    number=True,
                ),
            ],
            "Progress": [
                Panel(
                    "Requests",
                    "Answered, those from disk included, beside all of them.",
                    "short",
                    [*value("requests_done", f"done {name}"), *value("requests", f"all {name}")],
                ),
                Panel(
                    "Slices",
                    "Finished by workers, beside all of them. A slice is a batch for one worker.",
                    "short",
                    [*value("slices_done", f"done {name}"), *value("slices", f"all {name}")],
                ),
                Panel(
                    "Answers a second",
                    "By where they come from: workers, or an earlier run's answers on disk.",
                    "ops",
                    [(f"sum by (source) (rate({answers}[$__rate_interval]))", "{{source}}")],
                    stacked=True,
                ),
            ],
            "Workers": [
                Panel(
                    "Workers",
                    "By what they do. Idle ones at the end: the last slices are long.",
                    "short",
                    [(workers, "{{state}}")],
                    stacked=True,
                ),
                Panel(
                    "Time of a slice",
                    "What a worker takes for one.",
                    "s",
                    percentiles("ray_dllm_bulk_slice_seconds", of, "run", "{{run}}"),
                ),
                Panel(
                    "Lost workers",
                    "Workers that died and were replaced; their slices are done again.",
                    "short",
                    [(f"sum by (run) (ray_dllm_bulk_lost_workers{of})", "{{run}}")],
                ),
            ],
            "Decoding": [
                Panel(
                    "Tokens per forward",
                    "TPF: tokens written over the forwards they took.",
                    "short",
                    value("tokens_per_forward"),
                ),
                Panel(
                    "Forwards per answer",
                    "NFE: forwards that a written answer took part in, on average.",
                    "short",
                    value("forwards_per_answer"),
                ),
                Panel(
                    "Tokens a second",
                    "Tokens written per second of the workers, as results report it.",
                    "short",
                    value("tokens_per_second"),
                ),
            ],
            "Work": [
                Panel(
                    "Tokens",
                    "Written a second.",
                    "short",
                    [(rate("ray_dllm_bulk_tokens_total", asked, "run"), "{{run}}")],
                ),
                Panel(
                    "Forwards",
                    "A second, summed over the texts in them.",
                    "short",
                    [(rate("ray_dllm_bulk_forwards_total", asked, "run"), "{{run}}")],
                ),
                Panel(
                    "Noisy sequences",
                    "Noisy copies of texts scored a second, for likelihoods.",
                    "short",
                    [(rate("ray_dllm_bulk_noisy_sequences_total", asked, "run"), "{{run}}")],
                ),
            ],
        },
    )


def as_json(dashboard: Dashboard) -> dict[str, Any]:
    """A dashboard in Grafana's own form."""
    ids, top = count(1), 0
    panels = []
    for heading, row in dashboard.rows.items():
        panels.append(
            {
                "id": next(ids),
                "type": "row",
                "title": heading,
                "collapsed": False,
                "panels": [],
                "gridPos": {"x": 0, "y": top, "w": COLUMNS, "h": 1},
            }
        )
        height = 4 if all(panel.number for panel in row) else 8
        width = COLUMNS // len(row)
        for index, panel in enumerate(row):
            place = {"x": index * width, "y": top + 1, "w": width, "h": height}
            panels.append({"id": next(ids), "gridPos": place, **_panel(panel)})
        top += height + 1
    return {
        "uid": dashboard.uid,
        "title": dashboard.title,
        "description": dashboard.description,
        "tags": ["dllm_ray"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timepicker": {},
        "annotations": {"list": []},
        "links": [
            {
                "type": "dashboards",
                "title": "DLM",
                "tags": ["dllm_ray"],
                "asDropdown": True,
                "includeVars": False,
                "keepTime": True,
            }
        ],
        "templating": {"list": [_DATASOURCE, *(_variable(label, of) for label, of in dashboard.variables.items())]},
        "panels": panels,
    }


_SOURCE = {"type": "prometheus", "uid": "${datasource}"}
_DATASOURCE = {
    "name": "datasource",
    "label": "Prometheus",
    "type": "datasource",
    "query": "prometheus",
    "hide": 0,
    "includeAll": False,
    "multi": False,
    "refresh": 1,
    "current": {},
    "options": [],
}


def _variable(label: str, of: str) -> dict[str, Any]:
    query = f"label_values({of}, {label})"
    return {
        "name": label,
        "label": label,
        "type": "query",
        "datasource": _SOURCE,
        "definition": query,
        "query": {"query": query, "refId": label},
        "refresh": 2,  # with the time range
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"selected": True, "text": ["All"], "value": ["$__all"]},
        "hide": 0,
        "options": [],
    }


def _panel(panel: Panel) -> dict[str, Any]:
    limits = {name: value for name, value in (("min", panel.least), ("max", panel.most)) if value is not None}
    drawn = {
        "drawStyle": "line",
        "lineWidth": 2,
        "fillOpacity": 20 if panel.stacked else 0,
        "showPoints": "auto",
        "spanNulls": 60_000,  # milliseconds; what is told at checkpoints only has gaps
        "stacking": {"mode": "normal" if panel.stacked else "none", "group": "A"},
        "scaleDistribution": {"type": "log", "log": 10} if panel.logarithmic else {"type": "linear"},
    }
    reduced = {"calcs": ["lastNotNull"], "fields": "", "values": False}
    options = (
        {"reduceOptions": reduced, "colorMode": "value", "graphMode": "area", "textMode": "auto", "orientation": "auto"}
        if panel.number
        else {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    )
    return {
        "type": "stat" if panel.number else "timeseries",
        "title": panel.title,
        "description": panel.description,
        "datasource": _SOURCE,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, **limits, "custom": {} if panel.number else drawn},
            "overrides": [],
        },
        "options": options,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _SOURCE,
                "expr": expression,
                "legendFormat": legend,
                "editorMode": "code",
                "range": True,
            }
            for index, (expression, legend) in enumerate(panel.targets)
        ],
    }


def dashboards() -> dict[str, str]:
    """File name -> contents."""
    made = {"training.json": training(), "serving.json": serving(), "evaluation.json": evaluation()}
    return {
        name: json.dumps(as_json(dashboard), indent=2, ensure_ascii=False) + "\n" for name, dashboard in made.items()
    }


def main() -> int:
    FOLDER.mkdir(exist_ok=True)
    for name, text in dashboards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
