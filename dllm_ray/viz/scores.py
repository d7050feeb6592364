"""Scores beside other scores as a web page: a plot for each benchmark, and tables. One file without scripts, which asks
nothing of a network, is readable on paper and on a phone, in light and in dark.

It draws what it is given and knows no runs. All texts are taken for untrusted.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_ROW = 38  # heights in pixels
_AXIS = 20
_TICKS = range(0, 101, 20)
_LONGEST_LABEL = 52


@dataclass(frozen=True)
class PlotRow:
    """The scores of one model, or of one run of it, in percent; None: there is no such score."""

    label: str
    """What stands above the marks."""
    ours: float | None = None
    """Measured here."""
    stderr: float | None = None
    """Standard error of ours."""
    official: float | None = None
    """Published by the model's authors."""
    reproduced: float | None = None
    """Published by others."""


def page(
    title: str,
    plots: Mapping[str, Sequence[PlotRow]],
    table: Sequence[Mapping[str, str]],
    notes: Sequence[str],
    sources: Sequence[Mapping[str, str]],
) -> str:
    """Makes the page.

    Args:
        title: of the page.
        plots: benchmark -> rows to draw; may be empty.
        table: the comparison, by column; at least one row.
        notes: paragraphs below the table.
        sources: the published scores and where they are from, by column; may be empty.

    Returns:
        The page, as ASCII text.
    """
    figures = "\n".join(_figure(name, rows) for name, rows in plots.items())
    body = [f"<h1>{html.escape(title)}</h1>"]
    if figures:
        body.append(f'<section aria-label="Plot">{_LEGEND}<div class="plots">{figures}</div></section>')
    body += ["<h2>Scores</h2>", html_table(table), *(f'<p class="soft">{html.escape(note)}</p>' for note in notes)]
    if sources:
        body += ["<h2>Published scores and their sources</h2>", html_table(sources)]
    text = _PAGE.format(title=html.escape(title), style=_STYLE, body="\n".join(body))
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _figure(name: str, rows: Sequence[PlotRow]) -> str:
    height = _ROW * len(rows)
    ticks = [
        f'<line class="grid" x1="{tick}%" x2="{tick}%" y1="0" y2="{height}"/>'
        f'<text class="tick" x="{tick}%" y="{height + 15}">{tick}{"%" if tick == _TICKS[-1] else ""}</text>'
        for tick in _TICKS
    ]
    drawn = [_row(row, index * _ROW) for index, row in enumerate(rows)]
    said = html.escape("; ".join(_said(row) for row in rows))
    return (
        f'<figure><figcaption>{html.escape(name)}</figcaption><div class="frame">'
        f'<svg role="img" aria-label="{said}" width="100%" height="{height + _AXIS}">{"".join(ticks + drawn)}'
        "</svg></div></figure>"
    )


def _row(row: PlotRow, top: int) -> str:
    middle = top + 26
    label = row.label if len(row.label) <= _LONGEST_LABEL else row.label[: _LONGEST_LABEL - 1] + "\u2026"
    parts = [
        f'<text class="label" x="0" y="{top + 14}">{html.escape(label)}<title>{html.escape(_said(row))}</title></text>',
        f'<line class="track" x1="0" x2="100%" y1="{middle}" y2="{middle}"/>',
    ]
    if row.official is not None:
        parts.append(_mark(row.official, middle, '<path class="official" d="M0-7L7 0L0 7L-7 0Z"/>', "official"))
    if row.reproduced is not None:
        mark = '<rect class="reproduced" x="-6" y="-6" width="12" height="12"/>'
        parts.append(_mark(row.reproduced, middle, mark, "reproduced"))
    if row.ours is not None:
        if row.stderr:
            low, high = max(row.ours - row.stderr, 0), min(row.ours + row.stderr, 100)
            parts.append(f'<line class="error" x1="{low:.2f}%" x2="{high:.2f}%" y1="{middle}" y2="{middle}"/>')
            parts += [
                f'<line class="error" x1="{x:.2f}%" x2="{x:.2f}%" y1="{middle - 5}" y2="{middle + 5}"/>'
                for x in (low, high)
            ]
        parts.append(_mark(row.ours, middle, '<circle class="ours" r="4.5"/>', "ours"))
    return "".join(parts)


def _mark(value: float, middle: int, shape: str, name: str) -> str:
    """A shape around the origin, moved to a share of the width: only an inner svg can be placed by percent."""
    return f'<svg x="{value:.2f}%" y="{middle}" overflow="visible"><title>{name} {value:.1f} %</title>{shape}</svg>'


def _said(row: PlotRow) -> str:
    parts = []
    if row.ours is not None:
        parts.append(f"ours {row.ours:.1f} %" + (f" \u00b1 {row.stderr:.1f}" if row.stderr else ""))
    if row.official is not None:
        parts.append(f"official {row.official:.1f} %")
    if row.reproduced is not None:
        parts.append(f"reproduced {row.reproduced:.1f} %")
    return f"{row.label}: {', '.join(parts)}"


def html_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table, which becomes cards on a phone; every row has the columns of the first, at least one row."""
    columns = list(rows[0])
    # a column of figures only is set right-aligned
    numeric = {
        column for column in columns if all(not row[column] or row[column][0] in "0123456789+-\u2212" for row in rows)
    }
    head = "".join(f'<th scope="col"{_aligned(column, numeric)}>{html.escape(column)}</th>' for column in columns)
    lines = []
    for row in rows:
        cells = "".join(
            f'<td data-name="{html.escape(column)}"{_aligned(column, numeric)}>{html.escape(row[column])}</td>'
            for column in columns
        )
        lines.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def _aligned(column: str, numeric: set[str]) -> str:
    return ' class="number"' if column in numeric else ""


_LEGEND = """<p class="legend">
<span><svg width="34" height="16" aria-hidden="true"><line class="error" x1="3" x2="31" y1="8" y2="8"/><line
class="error" x1="3" x2="3" y1="3" y2="13"/><line class="error" x1="31" x2="31" y1="3" y2="13"/><circle class="ours"
cx="17" cy="8" r="4.5"/></svg> ours &#177; 1 standard error</span>
<span><svg width="16" height="16" aria-hidden="true"><path class="official" d="M8 1L15 8L8 15L1 8Z"/></svg>
official</span>
<span><svg width="16" height="16" aria-hidden="true"><rect class="reproduced" x="2" y="2" width="12" height="12"/></svg>
reproduced</span>
<span class="soft">score in percent</span></p>"""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1f; --soft: #5f6068; --line: #c9cad2; --grid: #e4e5ea;
  --panel: #f3f3f6; --ours: #2455c3; --official: #c2410c; --reproduced: #0f766e; }
@media (prefers-color-scheme: dark) { :root { --page: #16171b; --text: #e9e9ee; --soft: #a3a5b0; --line: #44464f;
  --grid: #2d2f37; --panel: #22242a; --ours: #8fb0ff; --official: #fb923c; --reproduced: #2dd4bf; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
.soft { color: var(--soft); font-size: .9rem; margin: .4rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .4rem 0 .2rem; font-size: .9rem;
  align-items: center; }
.legend span { display: inline-flex; gap: .4rem; align-items: center; margin: 0; }
.plots { columns: 26rem 2; column-gap: 2.5rem; }
figure { margin: 0; padding: .6rem 0; break-inside: avoid; }
figcaption { font-weight: 600; }
.frame { padding: .2rem 1.1rem 0 .5rem; }
svg { overflow: visible; }
.frame > svg { display: block; }
.grid { stroke: var(--grid); }
.track { stroke: var(--line); }
.tick { fill: var(--soft); font-size: 12px; text-anchor: middle; }
.label { fill: var(--text); font-size: 13px; paint-order: stroke; stroke: var(--page); stroke-width: 4px; }
.ours { fill: var(--ours); stroke: var(--page); stroke-width: 1; }
.error { stroke: var(--ours); stroke-width: 2; }
.official { fill: var(--official); }
.reproduced { fill: none; stroke: var(--reproduced); stroke-width: 2; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; }
td:first-child { min-width: 10rem; }
td:nth-child(2) { min-width: 9rem; }
td:last-child { min-width: 16rem; }
th, .number { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
@media (max-width: 45rem) {
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .7rem; margin: .5rem 0; }
  td, td.number { display: flex; gap: 1rem; justify-content: space-between; text-align: right; white-space: normal;
    border: 0; padding: .1rem 0; min-width: 0; overflow-wrap: anywhere; }
  td:empty { display: none; }
  td::before { content: attr(data-name); color: var(--soft); flex: none; }
  td:first-child, td:nth-child(2), td:last-child { min-width: 0; }
  td:first-child { font-weight: 600; text-align: left; }
  td:first-child::before { content: none; }
}
@media print {
  :root { --page: #fff; --text: #000; --soft: #444; --line: #999; --grid: #ddd; --ours: #2455c3; --official: #c2410c;
    --reproduced: #0f766e; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 9pt; }
  .wide { overflow: visible; }
  th, td { white-space: normal; padding-right: .4rem; }
  td:first-child, td:nth-child(2), td:last-child { min-width: 0; }
  tr { break-inside: avoid; }
}
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
