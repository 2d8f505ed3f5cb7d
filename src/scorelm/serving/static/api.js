// The server: requests, its stream of events, and what can go wrong on the way.

const KEY = "scorelm-token";

/** What went wrong, as a sentence; `kind` is the type that the server gives, or "gone" where there is no answer. */
export class Trouble extends Error {
  constructor(message, kind, retryAfter = 0) {
    super(message);
    Object.assign(this, { kind, retryAfter });
  }
}

export function saveToken(token) {
  sessionStorage.setItem(KEY, token);
}

export const hasToken = () => Boolean(sessionStorage.getItem(KEY));

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const token = sessionStorage.getItem(KEY);
  if (token) headers.Authorization = `Bearer ${token}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Trouble("The server does not answer. Is scorelm serve still running?", "gone");
  }
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  const message = error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  const kind = response.status === 401 ? "unauthorized" : error?.type ?? "server_error";
  throw new Trouble(message, kind, Number(response.headers.get("Retry-After")) || 0);
}

export const getModel = async () => (await ask("/v1/model")).json();
export const getFilmPage = async () => (await ask("/film.html")).text();

/** Sends a request and yields its events, {name, data}; the last is "done". Aborting `signal` cancels it on the server. */
export async function* stream(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const response = await ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  const broken = new Trouble("The connection to the server broke before the text was finished.", "gone");
  try {
    for await (const event of readEvents(response.body.getReader())) {
      if (event.name === "error") throw new Trouble(event.data.error.message, event.data.error.type);
      yield event;
      if (event.name === "done") return;
    }
  } catch (error) {
    throw error.name === "AbortError" || error instanceof Trouble ? error : broken;
  }
  throw broken;
}

async function* readEvents(reader) {
  let name = "message";
  let data = [];
  for await (const line of readLines(reader)) {
    if (line === "") {
      if (data.length) yield { name, data: JSON.parse(data.join("\n")) };
      [name, data] = ["message", []];
    }
    const [, field, value] = line.match(/^(event|data): ?(.*)$/s) ?? [];
    if (field === "event") name = value;
    if (field === "data") data.push(value);
  }
}

async function* readLines(reader) {
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    rest += decoder.decode(value, { stream: !done });
    const lines = rest.split(done ? /\r\n|\r|\n/ : /\r\n|\r(?!$)|\n/);
    rest = lines.pop();
    yield* lines;
    if (done) return;
  }
}
