// A question and its answer on the page: denoised in place, then plain text, with a replay of the steps.

import {Canvas, CanvasView, canvasAt} from "./canvas.js";
import {counts, figures} from "./conversation.js";

const BETWEEN_STEPS_MS = 250;

export class ExchangeView {
  // `again` is called to have the question answered anew.
  constructor(exchange, again) {
    this.exchange = exchange;
    this.element = document.getElementById("exchange").content.firstElementChild.cloneNode(true);
    for (const name of ["question", "answer", "model", "canvas", "legend", "replay", "slider", "step", "play", "about",
      "figures", "note", "problem", "copy", "steps", "again"]) {
      this[name] = this.element.querySelector("." + name);
    }
    this.text = this.answer.querySelector(".text");
    this.question.querySelector(".text").textContent = exchange.question;
    this.model.textContent = exchange.model;
    this.events = [];
    this.policy = undefined;
    this.live = null; // the canvas that is being written
    this.follows = true;
    this.view = null;
    this.timer = null;
    this.copy.addEventListener("click", () => this.copyText());
    this.again.addEventListener("click", again);
    this.steps.addEventListener("click", () => this.showReplay(this.replay.hidden));
    this.slider.addEventListener("input", () => {
      this.pause();
      this.goTo(Number(this.slider.value));
    });
    this.play.addEventListener("click", () => this.timer === null ? this.start() : this.pause());
    for (const kind of ["pointerover", "click", "focusin"]) {
      this.canvas.addEventListener(kind, event => this.inspect(event.target));
    }
    this.canvas.addEventListener("keydown", event => this.walk(event));
    this.settle();
  }

  // --- while it is written

  // Begins an answer; `policy` tells how confidences are to be read.
  begin(policy) {
    this.showReplay(false);
    Object.assign(this.exchange, {answer: "", state: "running", figures: null, problem: null});
    this.events = [];
    this.policy = policy;
    this.live = null;
    this.follows = true;
    this.began = performance.now();
    this.frame = null;
    this.settle();
    this.note.textContent = "Waiting for the model\u2026";
    this.note.hidden = false;
  }

  // What a step wrote.
  writeCanvas(event) {
    if (!this.live) {
      this.live = new Canvas(this.policy);
      this.openCanvas(false);
      this.began = performance.now();
    }
    this.events.push(event);
    this.live.apply(event);
    this.draw();
  }

  // Text that can no longer change.
  writeText(piece) {
    this.exchange.answer += piece;
    this.draw();
  }

  // Draws before the next frame, however many events come until then.
  draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.exchange.state !== "running") return;
      this.note.hidden = true;
      this.text.textContent = this.exchange.answer;
      this.text.hidden = this.live !== null;
      if (this.live) this.drawCanvas(this.live);
      this.figures.textContent = figures(this.measured());
      this.keepInSight();
    });
  }

  // Figures as far as the page can tell.
  measured() {
    if (!this.live) return {};
    const {written, cells, grows, forwards} = this.live, seconds = (performance.now() - this.began) / 1000;
    return {
      tokens: written, length: grows ? undefined : cells.length, forwards,
      tokensPerForward: forwards ? written / forwards : undefined,
      tokensPerSecond: seconds > 0 && written ? written / seconds : undefined,
    };
  }

  // Ends an answer: done, stopped or failed. `found` are the server's figures, null where it sent none.
  finish(state, found, problem) {
    Object.assign(this.exchange, {state, figures: found ?? this.measured(), problem});
    if (state !== "done") delete this.exchange.figures.length;
    this.live = null;
    this.settle();
  }

  // The first mask stays in sight, and at last the end of the answer, unless the user has scrolled away.
  keepInSight() {
    if (!this.follows) return;
    const place = this.element.closest("main"), edge = place.getBoundingClientRect().bottom - 24;
    const target = (this.live && this.canvas.querySelector(".mask")) || this.element;
    const below = target.getBoundingClientRect().bottom - edge;
    if (below > 0) place.scrollTop += below + (this.live ? place.clientHeight / 4 : 0);
  }

  // --- once it is written

  // Shows the state that the exchange is in.
  settle() {
    const {answer, state, problem, reason} = this.exchange, running = state === "running";
    this.answer.setAttribute("aria-busy", String(running));
    this.text.textContent = answer;
    this.text.hidden = answer === "";
    this.canvas.hidden = this.legend.hidden = true;
    this.figures.textContent = this.exchange.figures ? figures(this.exchange.figures) : "";
    this.problem.textContent = problem ?? "";
    this.problem.hidden = !problem;
    const notes = [];
    if (state === "stopped") notes.push("Stopped.");
    if (state === "done" && reason === "length") notes.push("Cut at the most tokens.");
    if (state === "done" && !answer) notes.push("The answer is empty.");
    if (!running && !counts(this.exchange)) notes.push("Later questions are asked without this one.");
    this.note.textContent = notes.join(" ");
    this.note.hidden = notes.length === 0;
    this.copy.hidden = running || answer === "";
    this.steps.hidden = running || this.events.length < 2;
  }

  // Only the last exchange can be answered again, and only when nothing is running.
  showAgain(may) {
    this.again.hidden = !may;
    this.again.textContent = this.exchange.state === "failed" ? "Retry" : "Regenerate";
  }

  async copyText() {
    let copied = true;
    try {
      await navigator.clipboard.writeText(this.exchange.answer);
    } catch {
      // without a secure connection there is no clipboard: copy what is selected
      this.showReplay(false);
      getSelection().selectAllChildren(this.text);
      copied = document.execCommand("copy");
    }
    this.copy.textContent = copied ? "Copied" : "Selected";
    setTimeout(() => { this.copy.textContent = "Copy"; }, 2000);
  }

  // --- replay

  openCanvas(readable) {
    this.canvas.replaceChildren();
    this.view = new CanvasView(this.canvas, readable);
    this.canvas.hidden = this.legend.hidden = false;
    if (readable) this.canvas.removeAttribute("aria-hidden");
    else this.canvas.setAttribute("aria-hidden", "true");
  }

  drawCanvas(canvas) {
    this.view.draw(canvas);
    this.legend.querySelector(".gone").hidden = !canvas.grows;
  }

  showReplay(open) {
    this.pause();
    this.replay.hidden = !open;
    this.steps.setAttribute("aria-expanded", String(open));
    this.steps.textContent = open ? "Hide steps" : "Show steps";
    if (!open) {
      this.canvas.hidden = this.legend.hidden = true;
      this.text.hidden = this.exchange.answer === "";
      return;
    }
    this.text.hidden = true;
    this.openCanvas(true);
    this.about.textContent = "Point at a token, tap it or focus it to read about it; the arrow keys walk on.";
    this.slider.max = this.events.length - 1; // the first event is the canvas before the first step
    this.goTo(this.events.length - 1);
    this.replay.scrollIntoView({block: "nearest"});
  }

  goTo(step) {
    const last = this.events.length - 1, canvas = canvasAt(this.events, step + 1, this.policy);
    canvas.ended = step === last;
    this.drawCanvas(canvas);
    this.slider.value = step;
    const told = "step " + step + " of " + last;
    const tokens = canvas.written + (canvas.written === 1 ? " token" : " tokens");
    this.slider.setAttribute("aria-valuetext", told + ", " + tokens + " written");
    this.step.textContent = told;
  }

  start() {
    if (Number(this.slider.value) >= this.events.length - 1) this.goTo(0);
    this.play.textContent = "Pause";
    this.timer = setInterval(() => {
      const next = Number(this.slider.value) + 1;
      this.goTo(next);
      if (next >= this.events.length - 1) this.pause();
    }, BETWEEN_STEPS_MS);
  }

  pause() {
    clearInterval(this.timer);
    this.timer = null;
    this.play.textContent = "Play";
  }

  inspect(target) {
    if (!this.replay.hidden && target.dataset.position !== undefined) this.about.textContent = target.title;
  }

  walk(event) {
    const by = {ArrowLeft: -1, ArrowRight: 1}[event.key];
    if (by === undefined || event.target.dataset.position === undefined) return;
    event.preventDefault();
    this.view.focus(Number(event.target.dataset.position), by);
  }
}
