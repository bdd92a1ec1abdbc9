// Requests to the server that this page came from.
//
// Knows:        the key, what went wrong, in words.
// Ignorant of:  conversations, experts.

import { events } from "/page/sse.js";
import { session } from "/page/stored.js";

const KEY = "lowmoe.key";

export class KeyNeeded extends Error {}
/** The server answered that something is wrong. */
export class Refused extends Error {}
/** There was no whole answer; asking again may help. */
export class Broken extends Error {}

let given = "";
export const key = {
  get: () => given || (session.get(KEY) ?? ""),
  set(value) {
    given = value;
    session.set(KEY, value);
  },
};

/** A response that is fine.  Throws KeyNeeded, Refused, Broken, or AbortError. */
export async function request(path, { json, signal } = {}) {
  const headers = {};
  if (key.get()) headers.Authorization = `Bearer ${key.get()}`;
  if (json) headers["Content-Type"] = "application/json";
  const method = json ? "POST" : "GET";
  let response;
  try {
    response = await fetch(path, { method, headers, body: json && JSON.stringify(json), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Broken("The server cannot be reached. Is lowmoe serve still running?");
  }
  if (response.ok) return response;
  const words = await wordsOf(response);
  if (response.status === 401) throw new KeyNeeded(words);
  throw new Refused(words);
}

async function wordsOf(response) {
  try {
    const { error, detail } = await response.json();
    return error?.message ?? String(detail);
  } catch {
    return `The server answered ${response.status} ${response.statusText}.`;
  }
}

/** Tokens of a prompt of these messages.  Throws as `request`. */
export async function countTokens(model, messages, signal) {
  const system = messages.filter(({ role }) => role === "system").map(({ content }) => content);
  const others = messages.filter(({ role }) => role !== "system");
  const json = { model, messages: others, ...(system.length && { system: system.join("\n") }) };
  const response = await request("/v1/messages/count_tokens", { json, signal });
  return (await response.json()).input_tokens;
}

/**
 * The pieces of an answer: {thinking}, {text}, {reason}, {usage}.
 * Throws as `request`, Broken also for a stream that ends before the answer does.
 */
export async function* answer(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const response = await request("/v1/chat/completions", { json: asked, signal });
  let ended = false;
  try {
    for await (const { data } of events(response.body)) {
      if (data === "[DONE]") break;
      const { error, choices, usage } = JSON.parse(data);
      if (error) throw new Refused(error.message);
      const [choice] = choices ?? [];
      const thinking = choice?.delta?.reasoning_content;
      if (thinking) yield { thinking };
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) {
        ended = true;
        yield { reason: choice.finish_reason };
      }
      if (usage) yield { usage };
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Refused) throw error;
    throw new Broken("The connection broke in mid-answer. What came is kept.");
  }
  if (!ended) throw new Broken("The connection ended in mid-answer. What came is kept.");
}
