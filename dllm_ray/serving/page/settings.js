// Sampler settings that the page can change: what they are, and how they go into a request.
//
// An empty field leaves a setting as the model has it, and is not sent.

const number = (text, problem, fits) => {
  const value = Number(text);
  if (!Number.isFinite(value) || !fits(value)) throw new RangeError(problem);
  return value;
};
const count = text => number(text, "a whole number of at least 1", value => Number.isSafeInteger(value) && value >= 1);
const natural = text => number(text, "a whole number, 0 or more", value => Number.isSafeInteger(value) && value >= 0);
const share = text => number(text, "a number above 0 and at most 1", value => value > 0 && value <= 1);
const warmth = text => number(text, "a number between 0 and 2", value => value >= 0 && value <= 2);
const orNone = read => text => {
  if (text.toLowerCase() === "none") return null;
  try {
    return read(text);
  } catch (error) {
    throw new RangeError(error.message + ", or none");
  }
};
const word = text => text;

// `sampler` names the field of the model's settings that holds the default. Those with `everyRequest` are parameters
// of every OpenAI request, the others belong into its `diffusion` object.
export const FIELDS = [
  {name: "temperature", label: "Temperature", sampler: "temperature", everyRequest: true, read: warmth,
    help: "0 takes the likeliest token, above 0 one is drawn"},
  {name: "max_tokens", label: "Most tokens", sampler: "max_new_tokens", everyRequest: true, read: count,
    help: "length of the canvas that an answer is written on, or that it may grow to"},
  {name: "steps", label: "Steps", sampler: "steps", read: count,
    help: "for the whole answer; fewer are faster"},
  {name: "block_size", label: "Block size", sampler: "block_size", read: orNone(count),
    help: "tokens in a block; blocks are finished from left to right; none: one block"},
  {name: "threshold", label: "Threshold", sampler: "threshold", read: orNone(share),
    help: "write every token at least this probable, however many they are; none: by steps"},
  {name: "policy", label: "Policy", sampler: "policy", read: word, help: "which masks a step fills",
    choices: ["low_confidence", "random", "entropy", "topk_margin", "maskgit_plus", "origin", "llada2", "llada21"]},
  {name: "cache", label: "Cache", sampler: "cache", read: word, help: "what is not computed again in every step",
    choices: ["none", "prefix", "dual", "block"]},
  {name: "start_tokens", label: "Start tokens", sampler: "start_tokens", read: natural,
    help: "masks that an answer begins with; 0: it begins empty"},
  {name: "kappa", label: "Schedule of edits", sampler: "kappa", read: word, help: "how edits spread over time",
    choices: ["linear", "cubic", "cosine"]},
  {name: "edit_probability", label: "Edit probability", sampler: "edit_probability", read: orNone(share),
    help: "make steps longer, as long as no edit gets more probable than this; none: equal steps"},
  {name: "seed", label: "Seed", sampler: "seed", everyRequest: true, read: natural,
    help: "the same seed draws the same answer"},
];

// What a field's text stands for; undefined: nothing was set. Throws a RangeError that tells what was expected.
export function value(field, text) {
  const trimmed = text.trim();
  return trimmed === "" ? undefined : field.read(trimmed);
}

// Whether a model lets requests change a field: it tells of it, or every request has it.
export function offered(field, sampler) {
  return Boolean(field.everyRequest) || field.sampler in sampler;
}

// The part of a request that holds what was changed. `texts` are the fields' texts by name; what a model doesn't offer
// and what can't be read is left out.
export function changes(texts, sampler) {
  const found = {}, diffusion = {};
  for (const field of FIELDS) {
    let set;
    try {
      set = offered(field, sampler) ? value(field, texts[field.name] ?? "") : undefined;
    } catch {
      continue; // its field shows what is wrong
    }
    if (set !== undefined) (field.everyRequest ? found : diffusion)[field.name] = set;
  }
  return {...found, diffusion};
}

// A default in words.
export function shown(setting) {
  return setting === undefined ? "the model's" : setting === null ? "none" : String(setting);
}

// The form of the settings panel. `changed` is called with the fields' texts after each change.
export class SettingsForm {
  constructor(place, changed) {
    this.rows = FIELDS.map(field => {
      const row = document.getElementById("setting").content.firstElementChild.cloneNode(true);
      const [label, help, problem] = row.querySelectorAll("label, .help, .problem");
      const input = document.createElement(field.choices ? "select" : "input");
      const id = "setting-" + field.name;
      Object.assign(input, {id, name: field.name, autocomplete: "off"});
      if (field.choices) {
        input.append(new Option("", ""), ...field.choices.map(choice => new Option(choice, choice)));
      } else {
        input.type = "text";
        input.inputMode = field.read === warmth || field.read === natural ? "decimal" : "text";
      }
      label.htmlFor = id;
      label.textContent = field.label;
      help.id = id + "-help";
      help.textContent = field.help;
      problem.id = id + "-problem";
      input.setAttribute("aria-describedby", help.id + " " + problem.id);
      label.after(input);
      input.addEventListener("input", () => {
        this.check();
        changed(this.texts);
      });
      place.append(row);
      return {field, row, input, problem};
    });
  }

  get texts() {
    return Object.fromEntries(this.rows.map(({field, input}) => [field.name, input.value]));
  }

  set texts(texts) {
    for (const {field, input} of this.rows) input.value = texts[field.name] ?? "";
    this.check();
  }

  // Shows the defaults of a model, and only what it lets requests change.
  fit(sampler) {
    for (const {field, row, input} of this.rows) {
      row.hidden = !offered(field, sampler);
      const text = shown(sampler[field.sampler]);
      if (field.choices) input.options[0].textContent = text + " (default)";
      else input.placeholder = field.name === "seed" ? "drawn anew" : text;
    }
  }

  // Marks the fields that can't be read; returns the first of them.
  check() {
    let first = null;
    for (const {field, row, input, problem} of this.rows) {
      let wrong = "";
      try {
        value(field, input.value);
      } catch (error) {
        wrong = "Expected " + error.message + ".";
      }
      this.mark(input, problem, wrong);
      if (wrong && !row.hidden) first ??= input;
    }
    return first;
  }

  // Marks the field that a refused request names ("diffusion.steps"); returns it.
  blame(param, message) {
    const name = (param ?? "").replace(/^diffusion\./, "");
    const found = this.rows.find(({field, row}) => field.name === name && !row.hidden);
    if (!found) return null;
    this.mark(found.input, found.problem, message);
    return found.input;
  }

  mark(input, problem, text) {
    problem.textContent = text;
    problem.hidden = text === "";
    if (text) input.setAttribute("aria-invalid", "true");
    else input.removeAttribute("aria-invalid");
  }
}
