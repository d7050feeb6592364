// The canvas of an answer: what the steps have written on it, and how it is drawn.

export const MASK = "\u2591";

// How sure a token is, between 0 and 1, whatever the policy measures; null: not known. Entropies come with a minus.
export function certainty(confidence, policy) {
  if (typeof confidence !== "number" || !Number.isFinite(confidence)) return null;
  const share = policy === "entropy" ? Math.exp(confidence) : confidence;
  return Math.min(Math.max(share, 0), 1);
}

// Certainty in words and as a class: they are drawn apart by underlines as well as by colours.
export function band(share) {
  if (share === null) return "unknown";
  return share < 0.5 ? "unsure" : share < 0.9 ? "middling" : "sure";
}

export function quoted(text) {
  return "\u201c" + text.replaceAll("\n", "\u23ce") + "\u201d";
}

// What a canvas holds after some of its events.
export class Canvas {
  constructor(policy) {
    this.policy = policy;
    this.cells = [];
    this.gone = []; // what the last step deleted, each with the position that it stood in front of
    this.grows = false; // whether its length has changed
    this.step = -1;
    this.forwards = 0;
    this.ended = false;
  }

  // The changes of an event are made one after another: an insertion moves what stands behind it, and so does a
  // deletion. The first event, of step -1, tells what is given.
  apply({step, length, positions = [], tokens = [], confidences = [], kinds = []}) {
    this.step = step;
    this.gone = [];
    if (step >= 0) this.forwards += 1;
    else {
      this.cells = [];
      this.fit(length);
    }
    positions.forEach((position, index) => this.change(kinds[index] ?? "write", position, {
      text: tokens[index] ?? "", confidence: confidences[index] ?? null, step, given: step < 0, earlier: [],
    }));
    this.fit(length);
  }

  change(kind, position, cell) {
    const old = this.cells[position];
    if (kind === "delete" || kind === "insert") this.move(kind, position, cell);
    else if (!old) this.cells[position] = cell;
    else if (kind === "edit") this.cells[position] = {...cell, inserted: old.inserted, earlier: [...old.earlier, old]};
    else this.cells[position] = {...old, text: cell.text}; // the same token, which reads otherwise beside a new one
  }

  move(kind, position, cell) {
    const before = this.gone.filter(one => one.position <= position);
    const behind = this.gone.filter(one => one.position > position);
    const moved = by => behind.map(one => ({...one, position: one.position + by}));
    this.grows = true;
    if (kind === "insert") {
      this.cells.splice(position, 0, {...cell, inserted: true});
      this.gone = [...before, ...moved(1)];
    } else {
      const [old] = this.cells.splice(position, 1);
      this.gone = [...before, {position, text: old ? old.text : MASK, step: cell.step}, ...moved(-1)];
    }
  }

  // What is drawn, from left to right: {position} of a place, or {gone} of what the last step deleted.
  get items() {
    const items = [];
    for (let position = 0; position <= this.cells.length; position += 1) {
      for (const gone of this.gone) if (gone.position === position) items.push({gone});
      if (position < this.cells.length) items.push({position});
    }
    return items;
  }

  fit(length) {
    if (!Number.isInteger(length)) return;
    while (this.cells.length < length) this.cells.push(null);
    this.cells.length = length;
  }

  get written() {
    return this.cells.filter(cell => cell && !cell.given).length;
  }

  get open() {
    return this.cells.filter(cell => !cell).length;
  }

  // How something that is gone is drawn, and all that is known of it.
  lookGone({text}) {
    return [text.replaceAll("\n", "\u23ce"), "gone"];
  }

  describeGone({text, step}) {
    return quoted(text) + ", deleted in step " + (step + 1);
  }

  // How a place is drawn: its text and its classes.
  look(position) {
    const cell = this.cells[position];
    if (!cell) return this.ended ? ["", "ended"] : [MASK, "mask"];
    const text = cell.text.replaceAll("\n", "\u23ce\n");
    if (cell.given) return [text, "given"];
    const share = certainty(cell.confidence, this.policy);
    const names = ["written", band(share)];
    if (share !== null) names.push("tint-" + Math.round(share * 10));
    if (cell.earlier.length) names.push("edited");
    if (cell.step === this.step) names.push("fresh");
    return [text, names.join(" ")];
  }

  // All that is known of a place, in words.
  describe(position) {
    const cell = this.cells[position];
    if (!cell) return this.ended ? "behind the end of the text" : "not written yet";
    if (cell.given) return quoted(cell.text) + ", given";
    const came = cell.inserted && !cell.earlier.length ? "inserted" : "written";
    const parts = [quoted(cell.text), came + " in step " + (cell.step + 1)];
    if (cell.confidence !== null) parts.push(this.measure(cell.confidence));
    for (const old of cell.earlier.slice().reverse()) {
      parts.push("before " + quoted(old.text) + (old.given ? ", given" : " from step " + (old.step + 1)));
    }
    return parts.join(", ");
  }

  measure(confidence) {
    if (!Number.isFinite(confidence)) return "confidence unknown";
    if (this.policy === "entropy") return "entropy " + Math.abs(confidence).toFixed(3);
    return (this.policy === "topk_margin" ? "margin " : "confidence ") + confidence.toFixed(3);
  }
}

// A canvas after the first `count` of its events.
export function canvasAt(events, count, policy) {
  const canvas = new Canvas(policy);
  for (const event of events.slice(0, count)) canvas.apply(event);
  return canvas;
}

// Draws canvases into an element, one span for each item; only what differs from before is touched. `readable` names
// each in words and lets the keyboard walk over them.
export class CanvasView {
  constructor(element, readable) {
    this.element = element;
    this.readable = readable;
    this.spans = [];
  }

  draw(canvas) {
    const items = canvas.items;
    while (this.spans.length > items.length) this.spans.pop().remove();
    while (this.spans.length < items.length) this.add();
    this.spans.forEach((span, index) => {
      const {position, gone} = items[index];
      const [text, names] = gone ? canvas.lookGone(gone) : canvas.look(position);
      if (span.textContent !== text) span.textContent = text;
      if (span.className !== names) span.className = names;
      const about = gone ? canvas.describeGone(gone) : canvas.describe(position);
      if (span.title === about) return;
      span.title = about;
      if (this.readable) span.setAttribute("aria-label", about);
    });
  }

  add() {
    const span = document.createElement("span");
    span.dataset.position = this.spans.length;
    if (this.readable) {
      span.setAttribute("role", "img");
      span.tabIndex = this.spans.length ? -1 : 0;
    }
    this.spans.push(span);
    this.element.append(span);
  }

  // Moves the focus from a place to the next one that is drawn.
  focus(from, by) {
    let next = from + by;
    while (this.spans[next]?.textContent === "") next += by;
    if (!this.spans[next]) return;
    this.spans[from].tabIndex = -1;
    this.spans[next].tabIndex = 0;
    this.spans[next].focus();
  }
}
