"""Accuracy against speed as an interactive web page: every setting a point, the best trade-offs a line.

One file, which asks nothing of a network. Texts are taken for untrusted: no character of the data can close its
element, and the script puts text on the page as text only. Without scripts the lists and the table tell the same.
"""

import html
import json
import math
from collections.abc import Mapping, Sequence

from dllm_ray.viz import points as drawing
from dllm_ray.viz.points import AXES, Curve, Point, tidy
from dllm_ray.viz.scores import html_table

_LONGEST_LABEL = 30
_MOST_BARS = 30  # points beyond which only the front's and the marked ones' error bars are drawn at first
_PATHS = {
    "circle": "M-5 0A5 5 0 1 0 5 0A5 5 0 1 0-5 0Z",
    "square": "M-4.5-4.5H4.5V4.5H-4.5Z",
    "triangle": "M0-6L5.6 4.2H-5.6Z",
    "diamond": "M0-6.2L6.2 0L0 6.2L-6.2 0Z",
    "wedge": "M0 6L5.6-4.2H-5.6Z",
    "plus": "M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "pentagon": "M0-6L5.7-1.9L3.5 4.9H-3.5L-5.7-1.9Z",
    "cross": "M0-2.8L3.2-6L6-3.2L2.8 0L6 3.2L3.2 6L0 2.8L-3.2 6L-6 3.2L-2.8 0L-6-3.2L-3.2-6Z",
}
_CORNERS = [
    f"{radius * math.sin(turn * math.pi / 5):.1f} {-radius * math.cos(turn * math.pi / 5):.1f}"
    for turn, radius in enumerate([15, 7.5] * 5)
]
_STAR = f"M{'L'.join(_CORNERS)}Z"


def page(
    title: str,
    points: Sequence[Point],
    curves: Sequence[Curve],
    facts: Sequence[str],
    table: Sequence[Mapping[str, str]],
    score: str,
    confidence: float,
) -> str:
    """Makes the page.

    Args:
        title: of the page.
        points: the settings; those without a finite score or speed are listed, but not drawn.
        curves: published results, drawn behind the points over tokens per forward.
        facts: lines below the title.
        table: all settings, by column; every row has the columns of the first; may be empty.
        score: name of the y axis, e.g. "digits exact_match, percent".
        confidence: of the points' intervals, between 0 and 1.

    Returns:
        The page, as ASCII text.
    """
    curves = [curve for curve in curves if drawing.finite(curve)]
    body = [f"<h1>{_escaped(title)}</h1>"]
    if facts:
        body.append(f'<ul class="facts">{"".join(f"<li>{_escaped(fact)}</li>" for fact in facts)}</ul>')
    body.append(_PLOT)
    body.append(_noted(points, confidence))
    if table:
        rows = [{tidy(column): tidy(text) for column, text in row.items()} for row in table]
        body += ["<h2>All settings</h2>", html_table(rows)]
    if curves:
        body.append(_published(curves))
    text = _PAGE.format(
        title=_escaped(title),
        style=_STYLE,
        body="\n".join(body),
        data=_json(_data(points, curves, score, confidence)),
        script=_SCRIPT,
    )
    return text.encode("ascii", "xmlcharrefreplace").decode()


def _data(points: Sequence[Point], curves: Sequence[Curve], score: str, confidence: float) -> dict:
    """What the page's script reads."""
    looks, numbers = drawing.looks(points), drawing.numbers(points)
    order = {family: index for index, family in enumerate(looks)}
    return {
        "score": tidy(score),
        "axes": AXES,
        "star": _STAR,
        "all_bars": len(points) <= _MOST_BARS,
        "families": [
            {
                "name": tidy(family),
                "count": sum(point.family == family for point in points),
                "colour": colour,
                "path": _PATHS[shape],
            }
            for family, (colour, shape) in looks.items()
        ],
        "points": [
            {
                "name": tidy(point.name),
                "label": drawing.shortened(tidy(point.name), _LONGEST_LABEL),
                "lines": drawing.described(point, confidence),
                "family": order[point.family],
                "number": numbers.get(index),
                "x": {axis: getattr(point, axis) if drawing.is_drawn(point, axis) else None for axis in AXES},
                "y": point.score if math.isfinite(point.score) else None,
                "bar": [point.low, point.high] if drawing.has_interval(point) else None,
                "front": sorted(point.front),
                "marks": sorted(point.marks),
                "marked": drawing.marked(point),
                "complete": point.complete,
            }
            for index, point in enumerate(points)
        ],
        "fronts": {axis: drawing.staircase(points, axis) for axis in AXES},
        "curves": [{"name": tidy(curve.name), "points": drawing.finite(curve)} for curve in curves],
    }


def _noted(points: Sequence[Point], confidence: float) -> str:
    """The numbered settings in full."""
    numbers = drawing.numbers(points)
    if not numbers:
        return ""
    lines = []
    for index, number in numbers.items():
        point = points[index]
        told = "<br>".join(_escaped(line) for line in drawing.described(point, confidence))
        lines.append(f'<li value="{number}"><b>{_breakable(point.name)}</b><br><span>{told}</span></li>')
    return f'<h2>Settings by number</h2>\n<ol class="noted">{"".join(lines)}</ol>'


def _published(curves: Sequence[Curve]) -> str:
    """The background in words."""
    lines = []
    for curve in curves:
        pairs = "; ".join(f"{x:.4g} TPF, {y:.4g} %" for x, y in drawing.finite(curve))
        lines.append(f"<li><b>{_escaped(curve.name)}</b>: {pairs}</li>")
    return f'<h2>Published results</h2>\n<ul class="facts">{"".join(lines)}</ul>'


def _json(data: dict) -> str:
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII: other characters are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _escaped(text: str) -> str:
    return html.escape(tidy(text))


def _breakable(name: str) -> str:
    """A setting's name, whose lines may break behind its commas."""
    return _escaped(name).replace(",", ",<wbr>")


_PLOT = """<section id="plot" aria-label="Plot" hidden>
<div class="bar">
<fieldset><legend>Speed</legend><label><input type="radio" name="axis" value="tpf" checked> tokens per forward</label>
<label><input type="radio" name="axis" value="tokens_per_s"> tokens per second</label></fieldset>
<label><input type="checkbox" id="log"> logarithmic</label>
<label><input type="checkbox" id="bars"> all error bars</label>
</div>
<div class="sheet">
<div class="drawing"><p class="soft" id="score"></p><svg id="svg" role="group"></svg></div>
<div class="side"><div id="info"><p class="soft">Point at a setting, tap it, or reach it with Tab and the arrow keys to
read about it.</p></div>
<fieldset id="legend"><legend>Shown</legend></fieldset></div>
</div>
<p class="soft" id="left" role="status"></p>
</section>
<noscript><p>The plot needs JavaScript. What it shows is told below.</p></noscript>"""

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1f; --soft: #5f6068; --line: #c9cad2; --grid: #e4e5ea;
  --panel: #f3f3f6; --accent: #2455c3; --behind: #8a8b94; }
@media (prefers-color-scheme: dark) { :root { --page: #16171b; --text: #e9e9ee; --soft: #a3a5b0; --line: #44464f;
  --grid: #2d2f37; --panel: #22242a; --accent: #8fb0ff; --behind: #84868f; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 90rem; padding: 1rem; background: var(--page); color: var(--text);
  font: 1rem/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
[hidden] { display: none; }
.soft, .facts { color: var(--soft); font-size: .9rem; margin: .4rem 0; overflow-wrap: anywhere; }
.facts { padding: 0; list-style: none; }
.bar { display: flex; flex-wrap: wrap; gap: .2rem 1.6rem; align-items: center; margin-top: .8rem; }
fieldset { border: 0; margin: 0; padding: 0; min-width: 0; }
.bar fieldset { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; align-items: center; }
.bar legend { float: left; padding: 0; color: var(--soft); }
.bar label, #legend label { display: flex; gap: .5rem; align-items: center; min-height: 2.2rem;
  overflow-wrap: anywhere; }
input { accent-color: var(--accent); width: 1.1rem; height: 1.1rem; flex: none; margin: 0; }
.sheet { display: grid; grid-template-columns: minmax(0, 1fr) 20rem; gap: 0 1.5rem; }
.drawing .soft { margin: .4rem 0 0; }
#svg { display: block; width: 100%; font: 12px system-ui, sans-serif; }
#info { padding: .7rem .9rem; min-height: 11.5rem; max-height: 22rem; overflow: auto; background: var(--panel);
  border: 1px solid var(--line); border-radius: .4rem; font-size: .9rem; overflow-wrap: anywhere; }
#info p { margin: 0 0 .3rem; }
#legend { margin-top: .8rem; font-size: .9rem; }
#legend legend { color: var(--soft); padding: 0; }
#legend svg { flex: none; overflow: visible; }
.key { display: flex; gap: .5rem; align-items: center; min-height: 1.9rem; }
.grid { stroke: var(--grid); }
.edge { stroke: var(--line); }
.tick { fill: var(--soft); }
.front { fill: none; stroke: var(--text); stroke-width: 1.6; }
.front.open { stroke-dasharray: 2 4; stroke-width: 1; }
.error { stroke: var(--text); stroke-width: 1; opacity: .3; }
.error.noted { opacity: .6; }
.curve { fill: none; stroke: var(--behind); stroke-width: 1.2; stroke-dasharray: 5 3; }
.dot { fill: var(--behind); }
.mark path { stroke: var(--text); stroke-width: .9; }
.mark.dropped path { fill-opacity: .15; stroke-opacity: .4; }
.around { fill: var(--page); stroke: var(--text); stroke-width: 1.4; }
.ring { fill: none; stroke: var(--text); stroke-width: 1.8; }
.label, .behind { paint-order: stroke; stroke: var(--page); stroke-width: 4px; stroke-linejoin: round;
  pointer-events: none; }
.label { fill: var(--text); }
.label.marked { font-weight: 600; }
.behind { fill: var(--soft); font-style: italic; }
.leader { stroke: var(--soft); stroke-width: .8; }
.chosen { fill: none; stroke: var(--accent); stroke-width: 2.5; }
.guide { stroke: var(--accent); stroke-dasharray: 3 3; }
.mark:focus { outline: none; }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
.noted { padding-left: 2.2rem; margin: .4rem 0; overflow-wrap: anywhere; columns: 32rem 2; column-gap: 2.5rem; }
.noted li { margin-bottom: .6rem; break-inside: avoid; }
.noted span { color: var(--soft); font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
td:first-child { min-width: 14rem; }
th { color: var(--soft); font-weight: 600; }
th, .number { white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
th button { font: inherit; color: inherit; background: none; border: 0; padding: .2rem 0; cursor: pointer; }
th button::after { content: "\\2195"; margin-left: .3rem; opacity: .5; }
th[aria-sort=ascending] button::after { content: "\\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: "\\2193"; opacity: 1; }
@media (max-width: 60rem) {
  .sheet { grid-template-columns: minmax(0, 1fr); }
  #info { margin-top: .6rem; }
  .noted { columns: auto; }
}
@media (max-width: 45rem) {
  thead { display: none; }
  table, tbody, tr, td { display: block; }
  tr { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .7rem; margin: .5rem 0; }
  td, td.number { display: flex; gap: 1rem; justify-content: space-between; text-align: right; white-space: normal;
    border: 0; padding: .1rem 0; min-width: 0; }
  td:empty { display: none; }
  td::before { content: attr(data-name); color: var(--soft); flex: none; max-width: 50%; }
  td:first-child { font-weight: 600; text-align: left; min-width: 0; }
  td:first-child::before { content: none; }
}
@media print {
  :root { --page: #fff; --text: #000; --soft: #444; --line: #999; --grid: #ddd; --behind: #777; color-scheme: light; }
  body { max-width: none; padding: 0; font-size: 9pt; }
  .bar, #info, #legend input, #legend label:has(input:not(:checked)), th button::after { display: none; }
  .sheet { display: block; break-inside: avoid; }
  #legend { display: flex; flex-wrap: wrap; gap: 0 1.4rem; }
  #legend legend { display: none; }
  #legend label, .key { min-height: 1.4rem; }
  .noted { columns: auto; }
  .wide { overflow: visible; }
  th, td { white-space: normal; padding-right: .4rem; }
  td:first-child { min-width: 0; }
  tr { break-inside: avoid; }
}
"""

_SCRIPT = r"""
"use strict";

const MARGIN = {left: 52, right: 16, top: 18, bottom: 46};
const NEAR = 28; // pixels from which a pointer takes hold of a point
const DIRECTIONS = [[1, 0], [1, -1], [0, -1], [-1, -1], [-1, 0], [-1, 1], [0, 1], [1, 1]];

// Round numbers between two ends, some `count` of them.
function ticksBetween(low, high, count) {
  const raw = (high - low) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map(part => part * power).find(part => part >= raw * 0.999);
  const found = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-6; tick += step)
    found.push(Math.abs(tick) < step * 1e-6 ? 0 : tick);
  return found;
}

// The same for a logarithmic axis: 1, 2 and 5 of each power of ten, or fewer, or round numbers where these are too few.
function logTicks(low, high, count) {
  for (const parts of [[1, 2, 5], [1, 3], [1]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power += 1)
      found.push(...parts.map(part => part * 10 ** power).filter(tick => tick >= low && tick <= high));
    if (found.length <= count + 2 || parts.length === 1)
      return found.length >= 2 ? found : ticksBetween(low, high, count).filter(tick => tick > 0);
  }
}

// A little more than what the values span; from zero on where they reach into its neighbourhood.
function span(values, logarithmic, fromZero) {
  if (!values.length) return logarithmic ? [1, 10] : [0, 1];
  const low = Math.min(...values), high = Math.max(...values);
  if (logarithmic) return [low / 1.2, high * 1.2];
  const room = high > low ? (high - low) * 0.06 : Math.max(Math.abs(high) * 0.1, 1e-9);
  if (fromZero && low >= 0 && low <= high / 2) return [0, high > 0 ? high * 1.06 : 1];
  return [low - room, high + room];
}

function numeral(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size >= 1e7 || size < 1e-4)) return value.toExponential(1);
  return value.toLocaleString("en", {maximumFractionDigits: 6});
}

function overlap(a, b) {
  return a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
}

function holds(box, x, y) {
  return box.x <= x && x <= box.x + box.w && box.y <= y && y <= box.y + box.h;
}

// The first free place of a box of a size around a point, near ones first; null where there is none. Nothing in the way
// lies between a point and a far box, but what is at the point itself.
function placeFor(x, y, w, h, reach, frame, taken, inTheWay) {
  const others = inTheWay.filter(box => !holds(box, x, y));
  for (const gap of [reach, reach + 14, reach + 32, reach + 56]) {
    for (const [right, down] of DIRECTIONS) {
      const share = right && down ? 0.75 : 1;
      const box = {x: x + right * (gap * share + w / 2) - w / 2, y: y + down * (gap * share + h / 2) - h / 2, w, h};
      const inside = box.x >= frame.x && box.x + w <= frame.x + frame.w
        && box.y >= frame.y && box.y + h <= frame.y + frame.h;
      if (!inside || taken.some(other => overlap(box, other))) continue;
      const far = gap > reach, toX = box.x + w / 2 - x, toY = box.y + h / 2 - y;
      const crossed = [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8].some(part =>
        others.some(other => holds(other, x + toX * part, y + toY * part)));
      if (!far || !crossed) return {...box, far};
    }
  }
  return null;
}

function start(document, data) {
  const at = id => document.getElementById(id);
  const make = (name, attributes = {}, text) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const html = (name, text, className) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const state = {axis: "tpf", log: false, bars: data.all_bars, curves: true, dropped: true, hidden: new Set()};
  let drawn = [], sites = [], elements = new Map(), layer = null, current = null, paper = null, room = 0;

  const noted = point => point.number !== null;
  const ringOf = point => point.marks.includes("recommended") ? 16.5 : 9.5;
  const reachOf = point => point.marks.includes("recommended") ? 20 : point.marks.includes("official") ? 13 : 9;
  const shown = point => !state.hidden.has(point.family) && (state.dropped || point.complete);
  const located = point => point.x[state.axis] !== null && !(state.log && point.x[state.axis] <= 0);

  function draw() {
    const svg = at("svg");
    room = svg.parentNode.clientWidth;
    const width = paper || Math.max(room, 240);
    const height = Math.round(Math.min(Math.max(width * 0.6, 300), 560));
    const held = document.activeElement && elements.get(current) === document.activeElement;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    elements = new Map();
    const visible = data.points.map((point, index) => ({...point, index})).filter(shown);
    drawn = visible.filter(located);
    const curves = state.axis === "tpf" && state.curves
      ? data.curves.map(curve => ({...curve, points: curve.points.filter(([x]) => !(state.log && x <= 0))})) : [];
    const behind = curves.flatMap(curve => curve.points);
    const withBar = point => point.bar && (noted(point) || (state.bars && point.complete));
    const xs = drawn.map(point => point.x[state.axis]).concat(behind.map(([x]) => x));
    const ys = drawn.flatMap(point => withBar(point) ? [point.y, ...point.bar] : [point.y])
      .concat(behind.map(([, y]) => y));
    const [x0, x1] = span(xs, state.log, true), [y0, y1] = span(ys, false, false);
    const frame = {x: MARGIN.left, y: MARGIN.top, w: width - MARGIN.left - MARGIN.right,
      h: height - MARGIN.top - MARGIN.bottom};
    const bend = state.log ? Math.log : value => value;
    const toX = x => frame.x + frame.w * (bend(x) - bend(x0)) / (bend(x1) - bend(x0));
    const toY = y => frame.y + frame.h * (y1 - y) / (y1 - y0);
    const bottom = frame.y + frame.h, name = data.axes[state.axis] + (state.log ? ", logarithmic" : "");

    svg.setAttribute("aria-label", `${data.score} over ${name}: ${drawn.length} settings. `
      + "Left and right arrow keys go by speed, up and down by score.");
    const back = make("g", {"aria-hidden": "true"}), labels = make("g", {"aria-hidden": "true"}), marks = make("g");
    layer = make("g", {"aria-hidden": "true", "data-frame": `${frame.x} ${bottom}`});
    svg.append(back, layer, marks, labels);
    for (const tick of ticksBetween(y0, y1, Math.floor(frame.h / 45))) {
      back.append(make("line", {class: "grid", x1: frame.x, x2: frame.x + frame.w, y1: toY(tick), y2: toY(tick)}),
        make("text", {class: "tick", x: frame.x - 8, y: toY(tick) + 4, "text-anchor": "end"}, numeral(tick)));
    }
    for (const tick of (state.log ? logTicks : ticksBetween)(x0, x1, Math.floor(frame.w / 65))) {
      back.append(make("line", {class: "grid", x1: toX(tick), x2: toX(tick), y1: frame.y, y2: bottom}),
        make("text", {class: "tick", x: toX(tick), y: bottom + 18, "text-anchor": "middle"}, numeral(tick)));
    }
    back.append(make("line", {class: "edge", x1: frame.x, x2: frame.x + frame.w, y1: bottom, y2: bottom}),
      make("text", {class: "tick", x: frame.x + frame.w, y: height - 6, "text-anchor": "end"}, name));

    sites = drawn.map(point => ({index: point.index, x: toX(point.x[state.axis]), y: toY(point.y)}));
    for (const curve of curves) {
      back.append(make("path", {class: "curve",
        d: curve.points.map(([x, y], step) => `${step ? "L" : "M"}${toX(x)} ${toY(y)}`).join("")}));
      for (const [x, y] of curve.points) {
        back.append(make("circle", {class: "dot", r: 2.5, cx: toX(x), cy: toY(y)}));
        sites.push({curve, tpf: x, accuracy: y, x: toX(x), y: toY(y)});
      }
    }
    const corners = data.fronts[state.axis].filter(([x]) => !(state.log && x <= 0)).map(([x, y]) => [toX(x), toY(y)]);
    if (corners.length) {
      const [first, last] = [corners[0], corners[corners.length - 1]], clip = make("clipPath", {id: "frame"});
      clip.append(make("rect", {x: frame.x, y: 0, width: frame.w, height: bottom}));
      const line = make("g", {"clip-path": "url(#frame)"});
      line.append(
        make("path", {class: "front open", d: `M${frame.x} ${first[1]}H${first[0]}M${last[0]} ${last[1]}V${bottom}`}),
        make("path", {class: "front", d: "M" + corners.map(corner => corner.join(" ")).join("L")}));
      back.append(clip, line);
    }

    const rank = point => (noted(point) ? 2 : 0) + (point.complete ? 1 : 0);
    for (const point of drawn.slice().sort((a, b) => rank(a) - rank(b))) {
      const x = toX(point.x[state.axis]), y = toY(point.y), family = data.families[point.family];
      if (withBar(point)) back.append(bar(point, x, toY, noted(point) ? "error noted" : "error"));
      const mark = make("g", {class: point.complete ? "mark" : "mark dropped", role: "img", tabindex: -1,
        transform: `translate(${x} ${y})`, "aria-label": [point.name, ...point.lines].join(", ")});
      mark.dataset.index = point.index;
      if (point.marks.includes("recommended")) mark.append(make("path", {class: "around", d: data.star}));
      if (point.marks.includes("official")) mark.append(make("circle", {class: "ring", r: ringOf(point)}));
      mark.append(make("path", {d: family.path, fill: family.colour}));
      marks.append(mark);
      elements.set(point.index, mark);
    }
    drawn.sort((a, b) => a.x[state.axis] - b.x[state.axis] || a.y - b.y);
    if (!elements.has(current)) current = drawn.length ? drawn[0].index : null;
    if (current !== null) elements.get(current).setAttribute("tabindex", 0);
    write(labels, frame, toX, toY, curves, corners);
    if (held && current !== null) elements.get(current).focus({preventScroll: true});
    const apart = visible.length - drawn.length;
    at("left").textContent = !data.points.length ? "There are no settings to draw." : !apart ? ""
      : `${apart} ${apart === 1 ? "setting has" : "settings have"} no place on this plot: `
        + (state.log ? "no score, or a speed that isn't above 0." : "no score or no speed.");
  }

  function bar(point, x, toY, className) {
    const [low, high] = point.bar.map(toY), path = `M${x} ${low}V${high}M${x - 4} ${low}h8M${x - 4} ${high}h8`;
    return make("path", {class: className, fill: "none", d: path});
  }

  // Labels of the marked points, of those on the front, and of the curves, where there is room.
  function write(labels, frame, toX, toY, curves, corners) {
    const place = {...frame, y: 2, h: frame.h + frame.y - 2};
    const boxes = drawn.map(point => {
      const reach = reachOf(point) - 3;
      return {x: toX(point.x[state.axis]) - reach, y: toY(point.y) - reach, w: 2 * reach, h: 2 * reach};
    });
    const lines = corners.slice(1).map(([x, y], step) => ({x: Math.min(x, corners[step][0]),
      y: Math.min(y, corners[step][1]), w: Math.abs(x - corners[step][0]), h: Math.abs(y - corners[step][1])}));
    const all = boxes.concat(lines);
    const taken = [];
    const set = (text, x, y, reach, className, crowded, avoided) => {
      const element = make("text", {class: className}, text);
      labels.append(element);
      const w = element.getComputedTextLength() + 4, h = 16;
      const found = (w <= frame.w * 0.45 || crowded)
        && placeFor(x, y, w, h, reach, place, taken.concat(avoided), avoided.length ? taken.concat(boxes) : []);
      if (!found) {
        element.remove();
        return false;
      }
      taken.push(found);
      element.setAttribute("x", found.x + 2);
      element.setAttribute("y", found.y + 12);
      if (found.far) {
        const nearX = Math.min(Math.max(x, found.x), found.x + w), nearY = Math.min(Math.max(y, found.y), found.y + h);
        labels.insertBefore(make("line", {class: "leader", x1: x, y1: y, x2: nearX, y2: nearY}), labels.firstChild);
      }
      return true;
    };
    const worth = point => (point.marks.length ? 2 : 0) + (point.marks.includes("recommended") ? 1 : 0);
    const named = drawn.filter(point => point.marks.length || point.front.includes(state.axis));
    const together = new Map(); // those at one place share a label
    for (const point of named.sort((a, b) => worth(b) - worth(a))) {
      const place = [toX(point.x[state.axis]), toY(point.y)].map(at => Math.round(at / 2)).join(" ");
      together.set(place, [...(together.get(place) || []), point]);
    }
    for (const [point, ...others] of together.values()) {
      const special = point.marks.length > 0;
      const number = [point, ...others].slice(0, 3).map(one => one.number).join(", ")
        + (others.length > 2 ? ` and ${others.length - 2} more` : "");
      const site = [toX(point.x[state.axis]), toY(point.y), reachOf(point), special ? "label marked" : "label"];
      const words = special ? point.marked : others.length ? "" : point.label, text = `${number} ${words}`.trim();
      const tries = [[text, special, all], [text, special, boxes], [number, true, boxes]];
      if (special) tries.push([text, true, []], [number, true, []]);
      tries.some(([label, crowded, avoided]) => set(label, ...site, crowded, avoided));
    }
    for (const curve of curves) {
      for (const [x, y] of curve.points.slice().reverse())
        if (set(curve.name, toX(x), toY(y), 6, "behind", false, all)) break;
    }
  }

  function tell(site) {
    const info = at("info"), [left, bottom] = layer.dataset.frame.split(" ");
    layer.replaceChildren(
      make("path", {class: "guide", d: `M${site.x} ${site.y}V${bottom}M${site.x} ${site.y}H${left}`}),
      make("circle", {class: "chosen", cx: site.x, cy: site.y, r: 8}));
    if (site.curve) {
      info.replaceChildren(html("p", "published: " + site.curve.name),
        html("p", `${site.tpf} tokens per forward, ${site.accuracy} %`, "soft"));
      return;
    }
    const point = data.points[site.index], line = html("p"), name = html("b");
    name.append(noted(point) ? point.number + " " : "",
      ...point.name.split(",").flatMap((part, order) => order ? [",", html("wbr"), part] : [part]));
    line.append(name);
    info.replaceChildren(line, ...point.lines.map(line => html("p", line)));
    const beside = sites.filter(other => other.index !== undefined && other.index !== site.index
      && Math.hypot(other.x - site.x, other.y - site.y) < 2);
    if (beside.length) info.append(html("p", "At the same place: "
      + beside.slice(0, 5).map(other => data.points[other.index].name).join("; ")
      + (beside.length > 5 ? `; and ${beside.length - 5} more` : ""), "soft"));
  }

  function choose(index, focus) {
    const site = sites.find(one => one.index === index);
    if (!site) return;
    if (elements.has(current)) elements.get(current).setAttribute("tabindex", -1);
    current = index;
    elements.get(index).setAttribute("tabindex", 0);
    if (focus) elements.get(index).focus({preventScroll: true});
    tell(site);
  }

  function hover(event) {
    const box = at("svg").getBoundingClientRect(), scale = at("svg").viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    const far = site => Math.hypot(site.x - x, site.y - y) + (site.curve ? 4 : 0);
    const nearest = sites.reduce((best, site) => best && far(best) <= far(site) ? best : site, null);
    if (!nearest || far(nearest) > NEAR) return;
    if (nearest.curve) tell(nearest); else choose(nearest.index, event.type === "click");
  }

  function key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey || !event.target.dataset.index) return;
    const byScore = drawn.slice().sort((a, b) => a.y - b.y || a.x[state.axis] - b.x[state.axis]);
    const go = {ArrowLeft: [drawn, -1], ArrowRight: [drawn, 1], ArrowDown: [byScore, -1], ArrowUp: [byScore, 1],
      Home: [drawn, -drawn.length], End: [drawn, drawn.length]}[event.key];
    if (!go) return;
    event.preventDefault();
    const [list, by] = go, now = list.findIndex(point => point.index === current);
    choose(list[Math.min(Math.max(now + by, 0), list.length - 1)].index, true);
  }

  function choice(parts, text, change, checked = true) {
    const label = html("label"), input = html("input"), words = html("span", text);
    input.type = "checkbox";
    input.checked = checked;
    input.addEventListener("change", () => { change(input.checked); draw(); });
    label.append(input, picture(parts), words);
    at("legend").append(label);
    return label;
  }

  function picture(parts) {
    const svg = make("svg", {width: 24, height: 22, viewBox: "-12 -11 24 22", "aria-hidden": "true"});
    svg.append(...parts);
    return svg;
  }

  function entry(parts, text) {
    const line = html("div", undefined, "key");
    line.append(picture(parts), html("span", text));
    at("legend").append(line);
  }

  function sorting(table) {
    const heads = [...table.querySelectorAll("th")], rows = table.tBodies[0];
    const value = text => {
      const number = parseFloat(text.replaceAll(",", "").replace("\u2212", "-"));
      return Number.isNaN(number) ? -Infinity : number;
    };
    heads.forEach((head, column) => {
      const button = html("button", head.textContent), figures = head.classList.contains("number");
      button.type = "button";
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort"), up = now ? now !== "ascending" : !figures;
        const cell = row => row.cells[column].textContent;
        const compare = (a, b) => figures ? value(cell(a)) - value(cell(b)) : cell(a).localeCompare(cell(b), "en");
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        rows.append(...[...rows.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)));
      });
    });
  }

  data.families.forEach((family, index) => {
    const mark = make("g", {class: "mark"});
    mark.append(make("path", {d: family.path, fill: family.colour}));
    choice([mark], `${family.name} (${family.count})`, on => state.hidden[on ? "delete" : "add"](index));
  });
  if (data.points.some(point => !point.complete)) {
    const mark = make("g", {class: "mark dropped"});
    mark.append(make("path", {d: data.families[0].path, fill: data.families[0].colour}));
    choice([mark], "dropped early", on => { state.dropped = on; });
  }
  let published = null;
  if (data.curves.length)
    published = choice([make("path", {class: "curve", d: "M-11 0H11"}), make("circle", {class: "dot", r: 2.5})],
      "published results", on => { state.curves = on; });
  entry([make("path", {class: "front", d: "M-11-5H0V5H11"})], "front: nothing is both better and faster");
  if (data.points.some(point => point.marks.includes("official")))
    entry([make("circle", {class: "ring", r: 9})], "official setting");
  if (data.points.some(point => point.marks.includes("recommended")))
    entry([make("path", {class: "around", d: data.star, transform: "scale(.7)"})], "recommended setting");

  at("score").textContent = data.score;
  at("bars").checked = state.bars;
  at("bars").addEventListener("change", () => { state.bars = at("bars").checked; draw(); });
  at("log").addEventListener("change", () => { state.log = at("log").checked; draw(); });
  for (const radio of document.getElementsByName("axis")) radio.addEventListener("change", () => {
    state.axis = radio.value;
    if (published) published.hidden = state.axis !== "tpf";
    draw();
  });
  at("svg").addEventListener("pointermove", hover);
  at("svg").addEventListener("click", hover);
  at("svg").addEventListener("keydown", key);
  at("svg").addEventListener("focusin", event => {
    if (event.target.dataset.index) choose(Number(event.target.dataset.index));
  });
  document.querySelectorAll("table").forEach(sorting);
  at("plot").hidden = false;
  const grown = () => { if (paper === null && at("svg").parentNode.clientWidth !== room) draw(); };
  new ResizeObserver(grown).observe(at("svg").parentNode);
  window.addEventListener("beforeprint", () => { paper = 680; draw(); });
  window.addEventListener("afterprint", () => { paper = null; draw(); });
  draw();
}

start(document, JSON.parse(document.getElementById("data").textContent));
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
