// Talking to the server: one place for keys, errors and streams. Addresses are relative: the page's own origin only.

import { remember, remembered } from "./local.js";

const KEY = "gemcut-api-key";

/** What the server or the network said. `retry`: whether the same request may go well later. */
export class ApiFailure extends Error {
  constructor(message, { status = 0, code = "", retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

let key = remembered(KEY, "sessionStorage");

export const getKey = () => key;

/** Take a key for this tab; "" forgets it. */
export function setKey(given) {
  key = given;
  remember(KEY, given, "sessionStorage");
}

/** The server's state: {state: "ready" | "loading" | "draining" | "away", stage}. */
export async function readiness() {
  try {
    const answer = await fetch("ready", { cache: "no-store" });
    if (answer.ok) return { state: "ready", stage: "" };
    const { status, stage, done, total } = await answer.json();
    const named = typeof stage === "string" && stage !== "loading" ? stage : "";
    const share = done > 0 && total >= done ? `${Math.floor((100 * done) / total)} %` : named;
    return { state: status === "draining" ? "draining" : "loading", stage: share };
  } catch {
    return { state: "away", stage: "" };
  }
}

/** The model that is served. Throws ApiFailure. */
export async function servedModel() {
  const answer = await request("v1/models", {});
  const { data } = await answer.json();
  if (!Array.isArray(data) || !data.length || typeof data[0].id !== "string") {
    throw new ApiFailure("The server names no model.");
  }
  return data[0];
}

/**
 * Send a request and read its stream. `body` is OpenAI's, for a chat or (with `prompt`) a completion; `on` has text(piece), usage(usage), finish(reason) and
 * progress(done, all) for a prompt that is being read. Throws ApiFailure, or AbortError where `signal` ended it.
 */
export async function streamAnswer(body, on, signal) {
  const answer = await request("prompt" in body ? "v1/completions" : "v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let ended = false;
  const handle = (line) => {
    if (line.startsWith(":")) {
      const progress = /^: ?prefill (\d+)\/(\d+)/.exec(line);
      if (progress) on.progress(Number(progress[1]), Number(progress[2]));
      return;
    }
    if (!line.startsWith("data:")) return;
    const data = line.slice(5).trim();
    if (data === "[DONE]") {
      ended = true;
      return;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw failureOf(chunk.error, answer.status);
    if (typeof chunk.id === "string") on.named?.(chunk.id);
    const choice = chunk.choices?.[0];
    const piece = choice?.delta?.content ?? choice?.text;
    if (piece) on.text(piece);
    if (choice?.delta?.refusal) on.refusal?.(choice.delta.refusal);
    if (choice?.finish_reason) on.finish(choice.finish_reason);
    if (chunk.usage) on.usage(chunk.usage);
  };
  try {
    for await (const line of linesOf(answer.body)) handle(line);
  } catch (error) {
    if (error instanceof ApiFailure || error.name === "AbortError") throw error;
    if (error instanceof SyntaxError) throw new ApiFailure("The server sent something that is no event of a chat.");
    throw new ApiFailure("The connection was lost while the answer was written.");
  }
  if (!ended) throw new ApiFailure("The connection ended before the answer did.");
}

/** Send a report of misuse. Throws ApiFailure. */
export async function sendReport(body) {
  await request("v1/reports", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
}

async function request(address, options) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let answer;
  try {
    answer = await fetch(address, { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure("The server cannot be reached.");
  }
  if (answer.ok) return answer;
  const text = await answer.text();
  const retryAfter = Math.min(60, Number(answer.headers.get("Retry-After")) || 0);
  try {
    throw failureOf(JSON.parse(text).error, answer.status, retryAfter);
  } catch (error) {
    if (error instanceof ApiFailure) throw error;
    throw new ApiFailure(`The server answered ${answer.status} ${answer.statusText}.`, { status: answer.status, retryAfter });
  }
}

function failureOf(error, status, retryAfter = 0) {
  const message = typeof error === "string" ? error : error?.message;
  const code = typeof error?.code === "string" ? error.code : "";
  return new ApiFailure(message || `The server answered ${status}.`, { status, code, retryAfter });
}

/** The lines of a stream of bytes, without their ends. */
async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      rest += value;
      const lines = rest.split("\n");
      rest = lines.pop();
      for (const line of lines) yield line.endsWith("\r") ? line.slice(0, -1) : line;
    }
    if (rest) yield rest;
  } finally {
    reader.cancel().catch(() => {});
  }
}
