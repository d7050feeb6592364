// A conversation: questions and their answers, what of them is sent, and how they outlive a reload.

const KEY = "dllm_ray.conversation";

// An exchange is a question with its answer: {question, answer, state, model, figures, problem}. `state` is one of
// running, done, stopped, failed.
export function exchange(question, model) {
  return {question, answer: "", state: "running", model, figures: null, problem: null};
}

// Whether an exchange is told to the model in later turns: a question without an answer is not.
export function counts({answer}) {
  return answer !== "";
}

// The messages that ask a question after earlier exchanges.
export function messages(system, earlier, question) {
  const turns = earlier.filter(counts).flatMap(({question, answer}) => [
    {role: "user", content: question}, {role: "assistant", content: answer},
  ]);
  const first = system.trim() ? [{role: "system", content: system}] : [];
  return [...first, ...turns, {role: "user", content: question}];
}

// Figures of an answer in words. Those of a running one are of what was written so far.
export function figures({tokens, length, seconds, forwards, tokensPerForward, tokensPerSecond}) {
  const parts = [];
  if (tokens !== undefined) {
    parts.push((length ? tokens + " of " + length : tokens) + ((length ?? tokens) === 1 ? " token" : " tokens"));
  }
  if (Number.isFinite(tokensPerSecond)) parts.push(rounded(tokensPerSecond) + " tokens/s");
  if (Number.isFinite(tokensPerForward)) parts.push(rounded(tokensPerForward) + " TPF");
  if (forwards) parts.push(forwards + (forwards === 1 ? " forward" : " forwards"));
  if (Number.isFinite(seconds)) parts.push(seconds.toFixed(seconds < 10 ? 2 : 0) + " s");
  return parts.join(" \u00b7 ");
}

function rounded(value) {
  return value < 10 ? value.toFixed(1) : String(Math.round(value));
}

// What the page keeps in this tab until it is closed: {exchanges, texts, system, model}.
export function load() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEY)) ?? {};
    const exchanges = Array.isArray(kept.exchanges) ? kept.exchanges.filter(isExchange) : [];
    for (const one of exchanges) if (one.state === "running") one.state = "stopped"; // the page was left meanwhile
    return {...kept, exchanges};
  } catch {
    return {exchanges: []}; // storage is forbidden, or holds something else
  }
}

export function save(kept) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(kept));
  } catch {
    // forbidden or full: the conversation lasts until the page is left
  }
}

function isExchange(one) {
  return one && typeof one.question === "string" && typeof one.answer === "string";
}
