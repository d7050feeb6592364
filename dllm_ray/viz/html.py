"""A denoising as a web page that replays it: one file, which asks nothing of a network.

The page holds its data as JSON: for each row the canvas before the first step, and for each step what it changed and
how that made the canvas read. Tokens come from models and are not to be trusted: the file is plain ASCII, no character
of the data can close its element, and the script puts text on the page as text only.
"""

import html
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.output import complete_file
from dllm_ray.sampling.edits import after, in_turn
from dllm_ray.viz.spelling import Speller

if TYPE_CHECKING:
    from dllm_ray.sampling.engine import Commit

VERSION = 2
"""Of the data format inside the page."""


@dataclass
class ReplayRow:
    """One row to replay."""

    canvas: list[int]
    """The canvas before the first step (`Sampler.canvases`)."""
    commits: Sequence["Commit"]
    """What each step wrote, in order."""
    prompt_length: int = 0
    """Tokens at the beginning that are given; after them every token is given that isn't the mask token. Where prompts
    may be edited they are given as long as they aren't."""
    tokens: list[int] = field(default_factory=list)
    """The row when it was done; empty: what the commits make of the canvas."""
    label: str = ""
    """Heading of the row."""


def replay(
    path: str | Path | None,
    tokenizer,
    spec: DiffusionSpec,
    rows: Sequence[ReplayRow],
    title: str = "Denoising",
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Makes the page.

    Args:
        path: the file to write; None: only return the page.
        tokenizer: to spell tokens.
        spec: knows the mask token and the tokens that end a text.
        rows: what to replay, side by side in time.
        title: of the page.
        settings: shown below the title, e.g. those of the sampler.

    Returns:
        The page, as ASCII text.

    Raises:
        OutputError: the file can't be written.
    """
    data = {
        "version": VERSION,
        "mask": spec.mask_token_id,
        "settings": dict(settings or {}),
        "rows": [_row(tokenizer, spec, row) for row in rows],
    }
    page = _PAGE.format(title=_ascii(title), style=_STYLE, script=_SCRIPT, data=_json(data))
    if path is not None:
        with complete_file(Path(path)) as file:
            file.write(page)
    return page


def _row(tokenizer, spec: DiffusionSpec, row: ReplayRow) -> dict[str, Any]:
    """A row as the page's script reads it.

    Each step holds a list of changes with a `kind`, made one after another. `write` and `substitute` put tokens at
    positions of the canvas, over masks or over earlier tokens; `insert` puts them there and moves on what stood there;
    `delete` takes away what stands there. `texts` are the positions that read differently after the step, where what
    was inserted read as nothing.
    """
    speller = Speller(tokenizer, spec)
    tokens = list(row.canvas)
    texts = speller.spell(tokens)
    mask = spec.mask_token_id  # None: nothing is masked, and all that follows the prompt is written
    given = [index < row.prompt_length or (mask is not None and token != mask) for index, token in enumerate(tokens)]
    described = {"label": row.label, "canvas": list(tokens), "texts": texts, "given": _runs(given)}
    described["grows"] = spec.edit_heads is not None
    steps = []
    for commit in row.commits:
        step: dict[str, Any] = {"step": commit.step}
        if changes := _changes(commit):
            before = _moved(commit, texts)
            tokens = after(commit, tokens, commit.tokens)
            texts = speller.spell(tokens)
            changed = (index for index, text in enumerate(texts) if text != before[index])
            step |= {"changes": changes, "texts": {index: texts[index] for index in changed}}
        if commit.done:
            step["done"] = True
        steps.append(step)
    return described | {"steps": steps, "final": list(row.tokens) or tokens}


def _changes(commit: "Commit") -> list[dict[str, Any]]:
    """What a step changed, neighbours of one kind together."""
    known = iter([round(value, 4) if math.isfinite(value) else None for value in commit.confidences])
    if commit.edits:
        made = [
            (edit.kind, edit.position, edit.token, None if edit.kind == "delete" else next(known))
            for edit in in_turn(commit.edits)
        ]
    else:
        made = [("write", *change) for change in zip(commit.positions, commit.tokens, known, strict=True)]
    changes = []
    for kind, alike in itertools.groupby(made, itemgetter(0)):
        _, positions, tokens, confidences = map(list, zip(*alike, strict=True))
        changes.append({"kind": kind, "positions": positions, "tokens": tokens, "confidences": confidences})
    return changes


def _moved(commit: "Commit", texts: list[str]) -> list[str]:
    """Texts beside the tokens after a step: those that were there before it, and nothing where one was inserted."""
    if not commit.edits:
        return texts
    new = [texts[edit.position] if edit.kind == "substitute" else "" for edit in commit.edits if edit.kind != "delete"]
    return after(commit, texts, new)


def _runs(flags: Sequence[bool]) -> list[list[int]]:
    """[start, stop) of each run of true flags."""
    runs = []
    for flag, group in itertools.groupby(range(len(flags)), flags.__getitem__):
        positions = list(group)
        if flag:
            runs.append([positions[0], positions[-1] + 1])
    return runs


def _json(data: Any) -> str:
    text = json.dumps(data, separators=(",", ":"), default=str)  # ASCII: other characters are escaped
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _ascii(text: str) -> str:
    return html.escape(text).encode("ascii", "xmlcharrefreplace").decode()


_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1b1f; --soft: #5f6068; --line: #c9cad2; --panel: #f3f3f6;
  --tint: 84%; --accent: #2455c3; }
@media (prefers-color-scheme: dark) { :root { --page: #16171b; --text: #e9e9ee; --soft: #a3a5b0; --line: #44464f;
  --panel: #22242a; --tint: 27%; --accent: #8fb0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 1rem 1rem 9rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.bar { display: flex; flex-wrap: wrap; gap: .5rem; align-items: center; position: sticky; top: 0; padding: .5rem 0;
  background: var(--page); border-bottom: 1px solid var(--line); z-index: 1; }
.bar button, .bar select { min-height: 2.75rem; min-width: 2.75rem; padding: 0 .7rem; font: inherit; color: inherit;
  background: var(--panel); border: 1px solid var(--line); border-radius: .4rem; }
.bar input { flex: 1 1 12rem; min-height: 2.75rem; accent-color: var(--accent); }
.bar label { display: flex; gap: .4rem; align-items: center; }
.canvas { white-space: pre-wrap; overflow-wrap: anywhere; font: .95rem/1.9 ui-monospace, monospace; padding: .6rem;
  border: 1px solid var(--line); border-radius: .4rem; }
.canvas span { border-radius: .2rem; padding: .1rem 0; }
.given { color: var(--soft); }
.mask { color: var(--soft); }
.written { background: hsl(var(--hue) 65% var(--tint)); }
.edited { text-decoration: underline wavy; text-underline-offset: .2em; }
.fresh { outline: 2px solid var(--accent); outline-offset: -1px; font-weight: 600; }
.ended { padding: 0; }
.gone { color: var(--soft); text-decoration: line-through; }
.canvas span:hover { box-shadow: 0 0 0 1px var(--text); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 1px; }
.soft, .keys { color: var(--soft); font-size: .9rem; margin: .3rem 0; }
.scale { display: inline-block; width: 6rem; height: .7rem; border-radius: .2rem; }
.info { position: fixed; inset: auto 0 0; padding: .7rem 1rem calc(.7rem + env(safe-area-inset-bottom));
  background: var(--panel); border-top: 1px solid var(--line); max-height: 40vh; overflow: auto; white-space: pre-wrap;
  overflow-wrap: anywhere; }
td, th { text-align: left; vertical-align: top; padding: .1rem 1rem .1rem 0; font-weight: normal; }
th { color: var(--soft); }
"""

_SCRIPT = r"""
"use strict";

// What a row holds once its steps below `shown` are applied: lists with an entry for each token, and `gone`, what the
// last step deleted.
function stateAt(row, mask, shown) {
  const state = {
    tokens: row.canvas.slice(),
    texts: row.texts.slice(),
    given: row.canvas.map((_, position) => row.given.some(([start, stop]) => start <= position && position < stop)),
    inserted: row.canvas.map(() => false),
    steps: row.canvas.map(() => null),
    confidences: row.canvas.map(() => null),
    earlier: row.canvas.map(() => []),
    fresh: new Set(),
    gone: [],
    counts: {insert: 0, substitute: 0, delete: 0},
    done: false,
  };
  for (const step of row.steps) {
    if (step.step >= shown) break;
    for (const change of step.changes || []) {
      change.positions.forEach((position, index) => {
        const isNew = step.step === shown - 1;
        apply(state, mask, change.kind, position, change.tokens[index], change.confidences[index], step.step, isNew);
      });
    }
    for (const [position, text] of Object.entries(step.texts || {})) state.texts[position] = text;
    if (step.done) state.done = true;
  }
  return state;
}

// One change. Those of a step go from left to right, so that nothing which is fresh or gone is moved by a later one.
function apply(state, mask, kind, position, token, confidence, step, isNew) {
  if (isNew && kind in state.counts) state.counts[kind] += 1;
  const lists = [state.tokens, state.texts, state.given, state.inserted, state.steps, state.confidences, state.earlier];
  if (kind === "delete") {
    if (isNew) state.gone.push({position, token: state.tokens[position], text: state.texts[position], step});
    for (const list of lists) list.splice(position, 1);
    return;
  }
  if (kind === "insert") {
    const entries = [token, "", false, true, step, confidence, []];
    lists.forEach((list, index) => list.splice(position, 0, entries[index]));
  } else if (kind === "write" || kind === "substitute") {
    if (!isOpen(mask, state, position)) {
      state.earlier[position].push(
        {token: state.tokens[position], text: state.texts[position], step: state.steps[position]});
    }
    state.tokens[position] = token;
    state.steps[position] = step;
    state.confidences[position] = confidence;
  } else {
    throw new Error("a change of an unknown kind: " + kind);
  }
  if (isNew) state.fresh.add(position);
}

// What is drawn of a row, in order: {position} of a token, or {gone} of one that the last step deleted.
function itemsOf(state) {
  const items = [], gone = state.gone.slice();
  for (let position = 0; position <= state.tokens.length; position += 1) {
    while (gone.length && gone[0].position <= position) items.push({gone: gone.shift()});
    if (position < state.tokens.length) items.push({position});
  }
  return items;
}

// Steps that the longest row takes.
function stepsOf(rows) {
  return Math.max(0, ...rows.map(row => row.steps.length ? row.steps[row.steps.length - 1].step + 1 : 0));
}

// Whether a position waits to be written.
function isOpen(mask, state, position) {
  if (state.steps[position] === null) return !state.given[position];
  return state.tokens[position] === mask;
}

function quoted(text) {
  return "\u201c" + text.replaceAll("\n", "\u23ce") + "\u201d";
}

// Everything that is known of one token, in words.
function describe(row, mask, state, position) {
  const parts = ["position " + position], open = isOpen(mask, state, position);
  if (open && state.done && row.grows) return parts.concat("a mask that was left").join(", ");
  if (open && state.done) return parts.concat("behind the end of the text, token " + row.final[position]).join(", ");
  if (open) return parts.concat("not yet written").join(", ");
  parts.push("token " + state.tokens[position] + " " + quoted(state.texts[position]));
  if (state.steps[position] === null) return parts.concat("given").join(", ");
  const isInsertion = state.inserted[position] && !state.earlier[position].length;
  parts.push((isInsertion ? "inserted" : "written") + " in step " + (state.steps[position] + 1));
  if (state.confidences[position] !== null) parts.push("confidence " + state.confidences[position].toFixed(3));
  const lines = [parts.join(", ")];
  for (const old of state.earlier[position].slice().reverse()) {
    const when = old.step === null ? "given" : "written in step " + (old.step + 1);
    lines.push("before: token " + old.token + " " + quoted(old.text) + ", " + when);
  }
  return lines.join("\n");
}

function named(text) {
  return text === "" ? "empty" : text.replaceAll("\n", " line break ").trim() || "space";
}

// A token in the words of a screen reader.
function spoken(row, mask, state, position) {
  if (isOpen(mask, state, position)) {
    return !state.done ? "mask" : row.grows ? "a mask that was left" : "empty, behind the end of the text";
  }
  const parts = [named(state.texts[position])];
  if (state.steps[position] === null) return parts.concat("given").join(", ");
  parts.push("step " + (state.steps[position] + 1));
  if (state.confidences[position] !== null) parts.push("confidence " + state.confidences[position].toFixed(3));
  return parts.join(", ");
}

function start(document, data) {
  const at = id => document.getElementById(id);
  const make = (name, text, className) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const total = stepsOf(data.rows);
  let shown = 0, timer = null, inspected = null, states = [];

  for (const [name, value] of Object.entries(data.settings)) {
    const line = make("tr"), head = make("th", name);
    head.scope = "row";
    line.append(head, make("td", typeof value === "string" ? value : JSON.stringify(value)));
    at("settings").append(line);
  }
  at("about").hidden = Object.keys(data.settings).length === 0;

  const views = data.rows.map((row, index) => {
    const name = row.label || (data.rows.length > 1 ? "Row " + (index + 1) : "Canvas");
    const canvas = make("div", undefined, "canvas"), count = make("p", "", "soft");
    canvas.setAttribute("role", "group");
    canvas.setAttribute("aria-label", name);
    canvas.dir = "auto";
    const section = make("section");
    section.append(make("h2", name), canvas, count);
    at("rows").append(section);
    return {canvas, count, tokens: []};
  });

  // Makes sure that a row has so many places for tokens; those too many are hidden.
  function fit(index, places) {
    const {canvas, tokens} = views[index];
    while (tokens.length < places) {
      const token = make("span");
      token.setAttribute("role", "img");
      token.tabIndex = tokens.length ? -1 : 0;
      token.dataset.row = index;
      token.dataset.position = tokens.length;
      tokens.push(token);
      canvas.append(token);
    }
    tokens.forEach((token, place) => {
      token.hidden = place >= places;
      if (token.hidden) token.textContent = "";
    });
  }

  function hue(state, position, byStep) {
    if (byStep) return 225 + 165 * (state.steps[position] / Math.max(total - 1, 1));
    return 125 * (state.confidences[position] === null ? 0 : state.confidences[position]);
  }

  function draw() {
    const byStep = at("colour").value === "step";
    states = data.rows.map(row => stateAt(row, data.mask, shown));
    data.rows.forEach((row, index) => {
      const state = states[index], items = itemsOf(state);
      let masks = 0;
      fit(index, items.length);
      items.forEach(({position, gone}, place) => {
        const token = views[index].tokens[place];
        if (gone) {
          token.className = "gone";
          token.textContent = gone.text.replaceAll("\n", "\u23ce");
          token.setAttribute("aria-label", named(gone.text) + ", deleted");
          token.style.removeProperty("--hue");
          return;
        }
        const given = state.steps[position] === null && state.given[position];
        const open = isOpen(data.mask, state, position);
        const ended = open && state.done;
        if (open && !ended) masks += 1;
        const kinds = [given ? "given" : ended ? "ended" : open ? "mask" : "written"];
        if (!open && state.earlier[position].length) kinds.push("edited");
        if (state.fresh.has(position)) kinds.push("fresh");
        token.className = kinds.join(" ");
        const text = ended ? "" : state.texts[position].replaceAll("\n", "\u23ce\n");
        if (token.textContent !== text) token.textContent = text;
        token.setAttribute("aria-label", spoken(row, data.mask, state, position));
        if (given || open) token.style.removeProperty("--hue");
        else token.style.setProperty("--hue", hue(state, position, byStep).toFixed(0));
      });
      const steps = stepsOf([row]), parts = ["step " + Math.min(shown, steps) + " of " + steps];
      const many = (count, word) => count + " " + word + (count === 1 ? "" : "s");
      if (row.grows) parts.push(many(state.tokens.length, "token"));
      else parts.push(many(masks, "mask") + " left");
      for (const [kind, told] of [["insert", "inserted"], ["substitute", "substituted"], ["delete", "deleted"]]) {
        if (state.counts[kind]) parts.push(state.counts[kind] + " " + told);
      }
      views[index].count.textContent = parts.join(", ");
    });
    at("slider").value = shown;
    at("slider").setAttribute("aria-valuetext", "step " + shown + " of " + total);
    at("step").textContent = shown + " / " + total;
    at("low").textContent = byStep ? "first step" : "unsure";
    at("high").textContent = byStep ? "last step" : "sure";
    const from = byStep ? 225 : 0, to = byStep ? 390 : 125, stops = [];
    for (let part = 0; part <= 6; part += 1) {
      stops.push("hsl(" + (from + (to - from) * part / 6).toFixed(0) + " 65% var(--tint))");
    }
    at("scale").style.background = "linear-gradient(90deg, " + stops.join(", ") + ")";
    tell();
  }

  function tell() {
    if (inspected === null) return;
    const [row, place] = inspected, item = itemsOf(states[row])[place];
    let told = "No token stands here now.";
    if (item?.gone) {
      told = "token " + item.gone.token + " " + quoted(item.gone.text) + ", deleted in step " + (item.gone.step + 1);
    } else if (item) {
      told = describe(data.rows[row], data.mask, states[row], item.position);
    }
    at("info").textContent = told;
  }

  function inspect(event) {
    const found = event.target.dataset;
    if (!found || found.position === undefined) return;
    inspected = [Number(found.row), Number(found.position)];
    tell();
  }

  function go(step) {
    shown = Math.min(Math.max(step, 0), total);
    draw();
  }

  function pause() {
    clearInterval(timer);
    timer = null;
    at("play").textContent = "Play";
  }

  function play() {
    if (shown >= total) go(0);
    at("play").textContent = "Pause";
    clearInterval(timer);
    timer = setInterval(() => {
      go(shown + 1);
      if (shown >= total) pause();
    }, 1000 / Number(at("speed").value));
  }

  function toggle() {
    if (timer === null) play(); else pause();
  }

  function step(by) {
    pause();
    go(shown + by);
  }

  function focusBeside(token, by) {
    const beside = views[Number(token.dataset.row)].tokens;
    let next = Number(token.dataset.position) + by;
    while (beside[next] && beside[next].textContent === "") next += by;
    if (!beside[next]) return;
    token.tabIndex = -1;
    beside[next].tabIndex = 0;
    beside[next].focus();
  }

  function key(event) {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const name = event.target.tagName, back = event.key === "ArrowLeft", onward = event.key === "ArrowRight";
    if (event.key === " " && name !== "BUTTON" && name !== "SELECT" && name !== "SUMMARY") toggle();
    else if ((back || onward) && event.shiftKey && event.target.dataset.position !== undefined)
      focusBeside(event.target, back ? -1 : 1);
    else if ((back || onward) && name !== "SELECT") step(back ? -1 : 1);
    else if (event.key === "Home" && name !== "SELECT") step(-total);
    else if (event.key === "End" && name !== "SELECT") step(total);
    else return;
    event.preventDefault();
  }

  at("slider").max = total;
  at("slider").addEventListener("input", () => { pause(); go(Number(at("slider").value)); });
  at("play").addEventListener("click", toggle);
  at("back").addEventListener("click", () => step(-1));
  at("onward").addEventListener("click", () => step(1));
  at("colour").addEventListener("change", draw);
  at("speed").addEventListener("change", () => { if (timer !== null) play(); });
  for (const kind of ["pointerover", "focusin", "click"]) at("rows").addEventListener(kind, inspect);
  document.addEventListener("keydown", key);
  go(total);
}

if (typeof document !== "undefined") start(document, JSON.parse(document.getElementById("data").textContent));
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
<h1>{title}</h1>
<noscript><p>This replay needs JavaScript.</p></noscript>
<details id="about"><summary>Settings</summary><table><tbody id="settings"></tbody></table></details>
<div class="bar" role="toolbar" aria-label="Replay">
<button id="play" type="button">Play</button>
<button id="back" type="button" aria-label="One step back">&#9664;</button>
<button id="onward" type="button" aria-label="One step onward">&#9654;</button>
<input id="slider" type="range" min="0" max="0" value="0" aria-label="Step">
<span id="step"></span>
<label>Speed <select id="speed"><option value="2">slow</option><option value="6" selected>normal</option>
<option value="15">fast</option><option value="40">very fast</option></select></label>
<label>Colour by <select id="colour"><option value="step">step</option><option value="confidence">confidence</option>
</select></label>
</div>
<p class="soft"><span id="low"></span> <span id="scale" class="scale"></span> <span id="high"></span></p>
<p class="keys">Space plays and pauses, the arrow keys go step by step, Home and End to the first and the last; with
Shift the arrow keys walk from token to token. Point at a token, tap it or focus it to read about it.</p>
<main id="rows"></main>
<div id="info" class="info" role="status" aria-live="polite">Point at a token to read about it.</div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
