"""What the doctor says: findings, as lines for people and as a tree for machines."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Level = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """What one check found in one place."""

    check: str
    """ray, versions, node, gpu, network, storage, hub, mlflow or clock."""
    level: Level
    """`fault`: jobs fail or go wrong; `warning`: they may, or waste time."""
    where: str
    """Names of nodes, `driver`, or `cluster`."""
    what: str
    """What was found."""
    advice: str = ""
    """What to do; empty where all is well."""


def lines(finding: Finding) -> list[str]:
    """A finding as it is printed: what was found, and below it what to do."""
    margin = f"{finding.level:8}{finding.check:9}"
    said = [f"{margin} {finding.where}: {finding.what}"]
    return said + [f"{'':{len(margin)}} -> {finding.advice}"] * bool(finding.advice)


def count(findings: Sequence[Finding], level: Level) -> int:
    """How many there are of a level."""
    return Counter(finding.level for finding in findings)[level]


def tree(findings: Sequence[Finding], **facts: Any) -> dict[str, Any]:
    """Findings with the facts they rest on, as plain values; `status` is the worst level."""
    levels = [level for level in ("fault", "warning") if count(findings, level)]
    return {"status": (levels or ["ok"])[0], "findings": [asdict(finding) for finding in findings], **facts}


def names(places: Sequence[str], most: int = 6) -> str:
    """Places in words: `a, b and 3 more`."""
    shown = ", ".join(places[:most])
    return f"{shown} and {len(places) - most} more" if len(places) > most else shown


def number(count: int, noun: str) -> str:
    """How many of something: `1 fault`, `2 faults`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
