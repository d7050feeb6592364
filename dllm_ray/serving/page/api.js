// Talks to the server: models, and answers as they are written. Knows nothing of the page.

// What the server, or the way to it, says against a request. `status` is 0 where there was no answer.
export class Refusal extends Error {
  constructor(message, {status = 0, param = null} = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

// Cuts a stream of text into server-sent events; gives the data of each as it becomes whole.
export class EventSplitter {
  constructor() {
    this.rest = "";
  }

  *feed(text) {
    this.rest += text;
    // a lone \r at the end may be half of \r\n
    const whole = this.rest.endsWith("\r") ? this.rest.slice(0, -1) : this.rest;
    const blocks = whole.split(/\r\n\r\n|\n\n|\r\r/);
    this.rest = blocks.pop() + this.rest.slice(whole.length);
    for (const block of blocks) {
      const lines = block.split(/\r\n|\n|\r/).filter(line => line.startsWith("data:"));
      if (lines.length) yield lines.map(line => line.slice(5).replace(/^ /, "")).join("\n");
    }
  }
}

// The models that are served, as the server lists them.
export async function models(key) {
  const {data} = await (await ask("v1/models", {headers: headers(key)})).json();
  return data;
}

// The chunks of an answer.
export async function* answer(path, body, key, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: {...headers(key), "Content-Type": "application/json"},
    body: JSON.stringify(body),
    signal,
  });
  const splitter = new EventSplitter(), decoder = new TextDecoder(), reader = response.body.getReader();
  for (;;) {
    const {done, value} = await read(reader);
    if (done) throw new Refusal("The connection ended before the answer did.");
    for (const data of splitter.feed(decoder.decode(value, {stream: true}))) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw refusal(chunk, 0, null);
      yield chunk;
    }
  }
}

// A refusal in words for the user.
export function refusal(body, status, retryAfter) {
  const error = body && typeof body.error === "object" && body.error !== null ? body.error : {};
  let message = typeof error.message === "string" ? error.message : "";
  if (!message) message = "The server answered " + status + ".";
  if (retryAfter) message += " Try again in " + retryAfter + (retryAfter === "1" ? " second." : " seconds.");
  return new Refusal(message, {status, param: typeof error.param === "string" ? error.param : null});
}

function headers(key) {
  return key ? {Authorization: "Bearer " + key} : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    throw named(error, "The server can't be reached.");
  }
  if (response.ok) return response;
  let body = null;
  try {
    body = await response.json();
  } catch {
    // no JSON: the status has to do
  }
  throw refusal(body, response.status, response.headers.get("Retry-After"));
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    throw named(error, "The connection broke off.");
  }
}

function named(error, message) {
  return error.name === "AbortError" ? error : new Refusal(message);
}
