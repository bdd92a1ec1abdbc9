// Drives OpenAI's library for Node.

import OpenAI from "openai";
import { GIRL, LONG, MODEL, N_LONG, N_TOKENS, SCHEMA, SEA, TOO_LONG, TOOL, drive, said } from "./harness.mjs";

const client = new OpenAI({ maxRetries: 0 });
const exact = { model: MODEL, max_tokens: N_TOKENS, temperature: 0 };

async function chat(text = GIRL) {
  const made = await client.chat.completions.create({ ...exact, messages: said(text) });
  const [choice] = made.choices;
  return { text: choice.message.content, finish: choice.finish_reason, n_new: made.usage.completion_tokens };
}

async function stream() {
  const chunks = await client.chat.completions.create({
    ...exact, messages: said(GIRL), stream: true, stream_options: { include_usage: true },
  });
  const pieces = [];
  let n_new;
  for await (const chunk of chunks) {
    if (chunk.choices[0]?.delta.content) pieces.push(chunk.choices[0].delta.content);
    if (chunk.usage) n_new = chunk.usage.completion_tokens;
  }
  return { pieces, n_new };
}

async function cancel() {
  const chunks = await client.chat.completions.create({
    model: MODEL, messages: said(LONG), max_tokens: N_LONG, stream: true,
  });
  for await (const chunk of chunks) {
    if (chunk.choices[0]?.delta.content) {
      chunks.controller.abort();
      return { first: chunk.choices[0].delta.content };
    }
  }
}

async function tools() {
  const made = await client.chat.completions.create({
    model: MODEL, messages: said(GIRL), tools: [{ type: "function", function: TOOL }],
    tool_choice: { type: "function", function: { name: TOOL.name } },
  });
  const [call] = made.choices[0].message.tool_calls;
  return { name: call.function.name, arguments: call.function.arguments };
}

async function schema() {
  const form = { type: "json_schema", json_schema: { name: "girl", schema: SCHEMA } };
  const made = await client.chat.completions.create({ model: MODEL, messages: said(GIRL), response_format: form });
  return made.choices[0].message.content;
}

async function error() {
  try {
    await chat(TOO_LONG);
  } catch (refused) {
    if (refused instanceof OpenAI.BadRequestError) return { status: refused.status, message: refused.message };
    throw refused;
  }
}

await drive({
  models: async () => (await client.models.list()).data.map((model) => model.id),
  chat,
  other: () => chat(SEA),
  stream,
  cancel,
  tools,
  schema,
  error,
  two: async () => (await Promise.all([chat(GIRL), chat(SEA)])).map((made) => made.text),
});
