"""What a sweep leaves: tables, `sweep.json`, the two pictures of the front, and settings ready to be used."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_ray.config import to_yaml
from dllm_ray.output import complete_file
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning import published
from dllm_ray.tuning.results import AXES, Findings
from dllm_ray.tuning.statistics import Interval
from dllm_ray.tuning.tried import Tried
from dllm_ray.viz.points import Curve, Point


@dataclass(frozen=True)
class Subject:
    """What the sweep was about."""

    model: str
    task: str
    metric: str
    documents: int
    """Of the search."""
    confidence: float
    background: str | None
    """Name of published curves."""

    @property
    def score(self) -> str:
        """What the score is called."""
        return f"{self.task} {self.metric}"


def rows(findings: Findings) -> list[dict[str, Any]]:
    """A row for each setting, those of the front first, by score."""
    ordered = sorted(findings.tried, key=lambda one: (not _on_front(findings, one), not one.complete, -one.score))
    return [
        {
            "setting": one.name,
            "score": round(one.score, 4),
            "interval": _interval(findings.intervals[one.name]),
            "tok/forward": round(one.tpf, 3),
            "tok/s": round(one.tokens_per_s) if math.isfinite(one.tokens_per_s) else one.tokens_per_s,
            "forwards": round(one.nfe, 2),
            "docs": len(one.scores),
            "note": _notes(findings, one),
        }
        for one in ordered
    ]


def front_rows(findings: Findings) -> list[dict[str, Any]]:
    """The rows of settings on a front, and of those that are marked, with a column for each parameter, as a terminal
    has room for."""
    kept = {findings.best, findings.recommended, findings.official}.union(*findings.fronts.values())
    left_out = ("setting", "forwards", "docs")
    return [
        _parameters(findings, row["setting"]) | {name: value for name, value in row.items() if name not in left_out}
        for row in rows(findings)
        if row["setting"] in kept
    ]


def held_out_rows(findings: Findings) -> list[dict[str, Any]]:
    """A row for each confirmed setting."""
    return [
        {
            **_parameters(findings, one.name),
            "score": round(one.interval.mean, 4),
            "interval": _interval(one.interval),
            "to official": "" if one.to_official is None else f"{one.to_official.mean:+.4f}",
            "its interval": "" if one.to_official is None else _interval(one.to_official),
            "verdict": one.verdict,
        }
        for one in findings.held_out
    ]


def sentences(findings: Findings, subject: Subject) -> list[str]:
    """What the sweep says, in words."""
    best, recommended = findings.named(findings.best), findings.named(findings.recommended)
    level = f"{subject.confidence:.4g}"
    said = [f"best score: {best.name}, {best.score:.4f} on {len(best.scores)} documents"]
    ties = len(findings.tied)
    if findings.is_won:
        said.append(f"it leads all others by more than noise (confidence {level}, all comparisons together)")
    elif not ties:
        said.append("no winner: no other setting has answered as many documents")
    else:
        said.append(
            f"no winner: {ties} other setting{'s' * (ties > 1)} can't be told apart from it (confidence {level}, all "
            "comparisons together)"
        )
    if recommended.name != best.name:
        said.append(
            f"recommended: {recommended.name}, the fastest of those whose score is nearly as good: "
            f"{recommended.score:.4f} at {recommended.tpf:.2f} tokens per forward; the best has {best.tpf:.2f}"
        )
    said += [
        f"held-out documents: {one.name} against the official setting {one.to_official.mean:+.4f} "
        f"({_interval(one.to_official)}, {one.documents} documents): {one.verdict}"
        for one in findings.held_out
        if one.name == findings.recommended and one.to_official is not None
    ]
    if best.score == 0:
        said.append("no document was solved under any setting, so no other one than the official is recommended")
    if findings.withdrawn:
        said.append(
            f"withdrawn: {findings.withdrawn} seemed better, and is worse than the official setting on held-out "
            "documents"
        )
    if findings.unfinished:
        said.append(
            f"the budget ended the search: {findings.unfinished} settings have not answered all documents; the same "
            "command goes on, with answers from disk"
        )
    if findings.unconfirmed:
        said.append(f"held-out documents were not asked: {findings.unconfirmed}")
    for objective, shares in findings.importance.items():
        if shares:
            named = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
            said.append(f"what matters for {objective}: {named}")
    said.append("tokens per second are one timing of each setting, taken while others shared the machine")
    said += [f"AUP of {family}: {area:.1f}" for family, area in findings.aup.items()]
    return said


def write(folder: Path, findings: Findings, subject: Subject, facts: dict[str, Any]) -> list[Path]:
    """Writes `sweep.json`, `front.png`, `front.html` and `configs/`.

    Args:
        folder: exists.
        findings: what to tell.
        subject: what about.
        facts: of the machine and the run, for `sweep.json`.

    Returns:
        The files.

    Raises:
        OutputError: they can't be written.
    """
    from dllm_ray.viz.front import page
    from dllm_ray.viz.front_picture import picture

    scale = _scale(findings.tried)
    points, curves = _points(findings, scale), _curves(subject.background)
    title = f"{subject.task}: accuracy and speed of {Path(subject.model).name or subject.model}"
    score = f"{subject.score}, percent" if scale == 100 else subject.score
    said = sentences(findings, subject)
    if subject.background is not None:
        said.append(f"grey curves, {subject.background}: {published.source()}")
    files = [folder / name for name in ("sweep.json", "front.png", "front.html")]
    with complete_file(files[0]) as file:
        told = _without_nan(_plain(findings, subject) | {"environment": facts})
        json.dump(told, file, indent=2, ensure_ascii=False, allow_nan=False)
    picture(files[1], title, points, curves, score, subject.confidence)
    table = [{key: str(value) for key, value in row.items()} for row in rows(findings)]
    with complete_file(files[2]) as file:
        file.write(page(title, points, curves, said, table, score, subject.confidence))
    return [*files, *_write_settings(folder / "configs", findings, subject)]


def _write_settings(folder: Path, findings: Findings, subject: Subject) -> list[Path]:
    """`sampler.yaml` of the recommended setting, and one for each setting of the front, by score."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("front-*.yaml"), folder / "sampler.yaml"]:
        old.unlink(missing_ok=True)
    written = []
    front = sorted(findings.fronts["tpf"], key=lambda name: -findings.named(name).score)
    for file, name in [("sampler", findings.recommended), *((f"front-{n}", name) for n, name in enumerate(front, 1))]:
        one = findings.named(name)
        low, high = findings.intervals[name].low, findings.intervals[name].high
        head = (
            f"# {name}\n# {subject.score} {one.score:.4f} ({low:.4f} to {high:.4f}) on {len(one.scores)} documents; "
            f"{one.tpf:.3f} tokens per forward.\n"
        )
        for held_out in findings.held_out:
            if held_out.name == name:
                mean, bottom, top = held_out.interval
                against = "" if held_out.to_official is None else f"; against the official setting: {held_out.verdict}"
                head += f"# {mean:.4f} ({bottom:.4f} to {top:.4f}) on {held_out.documents} held-out ones{against}.\n"
        written.append(folder / f"{file}.yaml")
        with complete_file(written[-1]) as out:
            out.write(head + to_yaml({"sampler": _shortened(one)}))
    return written


def _shortened(one: Tried) -> dict[str, Any]:
    """Settings but for those that are as they always are, and the seed, which is the run's."""
    usual = vars(SamplerConfig())
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in usual.items()}
    kept = {"max_new_tokens", "steps", "block_size", *one.changes}
    return {
        name: value
        for name, value in one.sampler.items()
        if (name in kept or value != plain[name]) and (name != "seed" or "seed" in one.changes)
    }


def _parameters(findings: Findings, name: str) -> dict[str, str]:
    """What the space has set, by parameter."""
    names = dict.fromkeys(key for one in findings.tried for key in one.changes)
    changes = findings.named(name).changes
    return {key: ("null" if changes[key] is None else str(changes[key])) if key in changes else "" for key in names}


def _scale(tried: Iterable[Tried]) -> int:
    """100 where scores are shares of 1, and so can be told in percent; else 1."""
    return 100 if all(0 <= score <= 1 for one in tried for score in one.scores.values()) else 1


def _points(findings: Findings, scale: int) -> list[Point]:
    found = []
    for one in findings.tried:
        interval = findings.intervals[one.name]
        marks = {
            mark
            for mark, name in (
                ("official", findings.official),
                ("best", findings.best),
                ("recommended", findings.recommended),
            )
            if name == one.name
        }
        found.append(
            Point(
                name=one.name,
                family=one.family,
                score=scale * one.score,
                low=scale * interval.low,
                high=scale * interval.high,
                tpf=one.tpf,
                tokens_per_s=one.tokens_per_s,
                nfe=one.nfe,
                documents=len(one.scores),
                front=frozenset(axis for axis in AXES if one.name in findings.fronts[axis]),
                marks=frozenset(marks),
                complete=one.complete,
                is_percent=scale == 100,
            )
        )
    return found


def _curves(background: str | None) -> list[Curve]:
    if background is None:
        return []
    return [Curve(name, tuple(points)) for name, points in published.curves(background).items()]


def _plain(findings: Findings, subject: Subject) -> dict[str, Any]:
    return {
        "subject": vars(subject),
        "official": findings.official,
        "best": findings.best,
        "tied": sorted(findings.tied),
        "recommended": findings.recommended,
        "fronts": {axis: sorted(names) for axis, names in findings.fronts.items()},
        "aup": dict(findings.aup),
        "importance": {name: dict(shares) for name, shares in findings.importance.items()},
        "held_out": [
            {
                "setting": one.name,
                "score": one.interval._asdict(),
                "to_official": None if one.to_official is None else one.to_official._asdict(),
                "documents": one.documents,
                "verdict": one.verdict,
            }
            for one in findings.held_out
        ],
        "settings": [
            {
                "name": one.name,
                "changes": dict(one.changes),
                "sampler": dict(one.sampler),
                "score": findings.intervals[one.name]._asdict(),
                "tpf": one.tpf,
                "tokens_per_s": one.tokens_per_s,
                "nfe": one.nfe,
                "documents": len(one.scores),
                "complete": one.complete,
            }
            for one in findings.tried
        ],
    }


def _without_nan(tree: Any) -> Any:
    """Plain values with null for numbers that JSON doesn't have."""
    if isinstance(tree, Mapping):
        return {key: _without_nan(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _on_front(findings: Findings, one: Tried) -> bool:
    return any(one.name in names for names in findings.fronts.values())


def _notes(findings: Findings, one: Tried) -> str:
    notes = [
        word
        for word, name in (
            ("best", findings.best),
            ("recommended", findings.recommended),
            ("official", findings.official),
        )
        if name == one.name
    ]
    if one.name in findings.tied:
        notes.append("tied")
    if one.name in findings.fronts["tpf"]:
        notes.append("front")
    if not one.complete:
        notes.append("ended early")
    return ", ".join(notes)


def _interval(interval: Interval) -> str:
    return f"{interval.low:.3f} to {interval.high:.3f}"
