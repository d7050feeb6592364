// The chat page: wires the form, the settings, the conversation and the server together.

import {answer, models, Refusal} from "./api.js";
import * as conversation from "./conversation.js";
import {ExchangeView} from "./exchange.js";
import {SettingsForm, changes} from "./settings.js";

const KEY = "dllm_ray.key";
const NARROW = "(max-width: 50rem)";

const at = id => document.getElementById(id);
const kept = conversation.load();
const place = document.querySelector("main");
let views = [], served = [], running = null, afterKey = null;
let leaving = false; // then connections break off because the page is left
let key = storedKey();

// --- models and the API key

async function loadModels() {
  notice("");
  try {
    served = await models(key);
  } catch (error) {
    if (error.status === 401) askForKey(loadModels);
    else notice(error.message, "Try again", loadModels);
    return;
  }
  at("key-form").hidden = true;
  at("model").replaceChildren(...served.map(({id}) => new Option(id, id)));
  at("model").disabled = served.length === 0;
  if (served.length === 0) notice("The server has no model.", "Try again", loadModels);
  if (served.some(({id}) => id === kept.model)) at("model").value = kept.model;
  if (served.length) kept.model = at("model").value;
  fitToModel();
}

function model() {
  return served.find(({id}) => id === at("model").value);
}

function facts() {
  return model()?.diffusion ?? {};
}

// A model without a chat template continues texts.
function chats() {
  return facts().can_chat !== false;
}

function fitToModel() {
  form.fit(facts().sampler ?? {});
  at("question").placeholder = chats() ? "Ask something" : "A text to continue";
  at("system").closest(".row").hidden = !chats();
  countChanges();
}

function storedKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

// Shows the field for the API key; `then` is done once there is one.
function askForKey(then) {
  afterKey = then;
  at("key-form").hidden = false;
  const problem = key ? "The server doesn't know this key." : "This server asks for an API key.";
  at("key-form").querySelector("label").textContent = problem + " It is kept until the tab is closed.";
  place.scrollTop = 0;
  at("key").focus();
}

function useKey(event) {
  event.preventDefault();
  key = at("key").value.trim();
  at("key").value = "";
  try {
    sessionStorage.setItem(KEY, key);
  } catch {
    // it holds until the page is left
  }
  at("key-form").hidden = true;
  toBox();
  const next = afterKey;
  afterKey = null;
  next?.();
}

// --- settings

const form = new SettingsForm(at("fields"), texts => {
  kept.texts = texts;
  keep();
  countChanges();
});

function countChanges() {
  const {diffusion, ...rest} = changes(form.texts, facts().sampler ?? {});
  const system = chats() && at("system").value.trim() ? 1 : 0;
  const count = Object.keys(diffusion).length + Object.keys(rest).length + system;
  at("changed").textContent = count ? " (" + count + ")" : "";
  at("open-settings").setAttribute("aria-label", "Settings" + (count ? ", " + count + " changed" : ""));
}

function openSettings() {
  if (at("settings").open) return at("settings").close();
  if (matchMedia(NARROW).matches) at("settings").showModal();
  else at("settings").show();
  return at("open-settings").setAttribute("aria-expanded", "true");
}

function resetSettings() {
  form.texts = {};
  at("system").value = "";
  kept.texts = {};
  kept.system = "";
  keep();
  countChanges();
}

// --- questions and answers

function send(event) {
  event?.preventDefault();
  const question = at("question").value;
  if (running || !question.trim()) return;
  if (!model()) {
    loadModels();
    return;
  }
  const wrong = form.check();
  if (wrong) {
    if (!at("settings").open) openSettings();
    wrong.focus();
    return;
  }
  at("question").value = "";
  grow();
  const exchange = conversation.exchange(question, model().id);
  kept.exchanges.push(exchange);
  run(show(exchange));
}

// Puts an exchange on the page.
function show(exchange) {
  const view = new ExchangeView(exchange, () => again(view));
  views.push(view);
  at("exchanges").append(view.element);
  update();
  return view;
}

function again(view) {
  if (running || !model()) return;
  toBox();
  run(view);
}

async function run(view) {
  const {exchange} = view, abort = new AbortController(), sampler = facts().sampler ?? {};
  const changed = changes(form.texts, sampler);
  exchange.model = view.model.textContent = model().id;
  view.begin(changed.diffusion.policy ?? sampler.policy);
  leaving = false;
  running = {view, abort};
  update();
  notice(""); // what is cleared now stays so
  at("announcement").textContent = "";
  view.element.scrollIntoView({block: "end"});
  let usage = null, began = performance.now();
  try {
    for await (const chunk of answer(...request(exchange, changed), key, abort.signal)) {
      usage = chunk.usage ?? usage;
      const event = chunk.diffusion;
      if (event?.event === "canvas" && !event.index) view.writeCanvas(event);
      const choice = chunk.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text;
      if (piece) view.writeText(piece);
      if (choice?.finish_reason) exchange.reason = choice.finish_reason;
    }
    view.finish("done", figuresOf(usage, (performance.now() - began) / 1000), null);
    at("announcement").textContent = "Answer: " + (exchange.answer || "empty");
  } catch (error) {
    if (error.name === "AbortError" || (leaving && !error.status)) {
      view.finish("stopped", null, null);
      at("announcement").textContent = "Stopped.";
    } else {
      const known = error instanceof Refusal;
      if (!known) console.error(error);
      view.finish("failed", null, known ? error.message : "The answer can't be read.");
      at("announcement").textContent = "The answer failed: " + view.exchange.problem;
      form.blame(error.param, error.message);
      if (error.status === 401) askForKey(() => again(view));
    }
  }
  running = null;
  update();
  view.keepInSight();
  keep();
}

// Path and body of the request for an answer.
function request(exchange, changed) {
  const {diffusion, ...rest} = changed;
  const body = {
    model: exchange.model, ...rest, stream: true, stream_options: {include_usage: true},
    diffusion: {...diffusion, stream_canvas: true},
  };
  if (!chats()) return ["v1/completions", {...body, prompt: exchange.question}];
  const earlier = kept.exchanges.slice(0, kept.exchanges.indexOf(exchange));
  return ["v1/chat/completions",
    {...body, messages: conversation.messages(at("system").value, earlier, exchange.question)}];
}

function figuresOf(usage, seconds) {
  if (!usage) return null;
  const {nfe, tpf, tokens_per_s: tokensPerSecond} = usage.diffusion ?? {};
  return {tokens: usage.completion_tokens, forwards: nfe, tokensPerForward: tpf, tokensPerSecond, seconds};
}

function stop() {
  running?.abort.abort();
  toBox();
}

function clear() {
  const gone = kept.exchanges;
  kept.exchanges = [];
  replaceAll();
  keep();
  notice("The conversation is gone from this page.", "Undo", () => {
    kept.exchanges = gone;
    notice("");
    replaceAll();
    keep();
  });
  toBox();
}

function replaceAll() {
  at("exchanges").replaceChildren();
  views = [];
  kept.exchanges.forEach(show);
  update();
}

// Shows and hides what depends on whether something is running, and on how much there is.
function update() {
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  at("clear").hidden = running !== null || views.length === 0;
  at("empty").hidden = views.length > 0;
  views.forEach((view, index) => view.showAgain(running === null && index === views.length - 1));
}

// --- the rest of the page

function keep() {
  conversation.save(kept);
}

function notice(text, action = "", act = null) {
  const [words, button] = at("notice").children;
  at("notice").hidden = text === "";
  words.textContent = text;
  button.textContent = action;
  button.hidden = action === "";
  button.onclick = act;
}

function isTouched() {
  return matchMedia("(hover: none) and (pointer: coarse)").matches;
}

// Puts the cursor into the message box, but for where that would bring up a keyboard on the screen.
function toBox() {
  if (!isTouched()) at("question").focus();
}

// The message box is as high as its text.
function grow() {
  const box = at("question");
  box.style.height = "auto";
  box.style.height = box.scrollHeight + box.offsetHeight - box.clientHeight + "px";
}

function keyInBox(event) {
  // on a touch screen's keyboard Enter is the only way to a new line
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !isTouched()) send(event);
}

function keyAnywhere(event) {
  if (event.key !== "Escape" || event.isComposing || at("settings").matches(":modal")) return;
  if (running) stop();
  else if (at("settings").open) at("settings").close();
}

function wire() {
  at("composer").addEventListener("submit", send);
  at("question").addEventListener("keydown", keyInBox);
  at("question").addEventListener("input", grow);
  at("stop").addEventListener("click", stop);
  at("clear").addEventListener("click", clear);
  at("key-form").addEventListener("submit", useKey);
  at("model").addEventListener("change", () => {
    kept.model = at("model").value;
    fitToModel();
    keep();
  });
  at("open-settings").addEventListener("click", openSettings);
  at("close-settings").addEventListener("click", () => at("settings").close());
  at("settings").addEventListener("close", () => at("open-settings").setAttribute("aria-expanded", "false"));
  matchMedia(NARROW).addEventListener("change", () => at("settings").close());
  at("reset").addEventListener("click", resetSettings);
  at("system").addEventListener("input", () => {
    kept.system = at("system").value;
    keep();
    countChanges();
  });
  document.addEventListener("keydown", keyAnywhere);
  for (const kind of ["wheel", "touchmove"]) {
    place.addEventListener(kind, () => { if (running) running.view.follows = false; }, {passive: true});
  }
  addEventListener("beforeunload", () => { leaving = true; });
  addEventListener("pagehide", () => {
    keep();
    running?.abort.abort();
  });
}

form.texts = kept.texts ?? {};
at("system").value = kept.system ?? "";
wire();
replaceAll();
place.scrollTop = place.scrollHeight;
toBox();
loadModels();
