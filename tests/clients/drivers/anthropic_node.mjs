// Drives Anthropic's library for Node.

import Anthropic from "@anthropic-ai/sdk";
import { GIRL, LONG, MODEL, N_LONG, N_TOKENS, SCHEMA, SEA, TOO_LONG, TOOL, drive, said } from "./harness.mjs";

const client = new Anthropic({ maxRetries: 0 });
const exact = { model: MODEL, max_tokens: N_TOKENS, temperature: 0 };

async function chat(text = GIRL) {
  const made = await client.messages.create({ ...exact, messages: said(text) });
  const finish = made.stop_reason === "max_tokens" ? "length" : "stop";
  return { text: made.content[0].text, finish, n_new: made.usage.output_tokens };
}

async function stream() {
  const pieces = [];
  const events = client.messages.stream({ ...exact, messages: said(GIRL) });
  events.on("text", (piece) => pieces.push(piece));
  return { n_new: (await events.finalMessage()).usage.output_tokens, pieces };
}

async function cancel() {
  const events = await client.messages.create({
    model: MODEL, messages: said(LONG), max_tokens: N_LONG, stream: true,
  });
  for await (const event of events) {
    if (event.type === "content_block_delta") {
      events.controller.abort();
      return { first: event.delta.text };
    }
  }
}

async function tools() {
  const own = { name: TOOL.name, description: TOOL.description, input_schema: TOOL.parameters };
  const made = await client.messages.create({
    model: MODEL, messages: said(GIRL), max_tokens: 200, tools: [own],
    tool_choice: { type: "tool", name: TOOL.name },
  });
  const [call] = made.content.filter((block) => block.type === "tool_use");
  return { name: call.name, arguments: JSON.stringify(call.input) };
}

async function schema() {
  const made = await client.messages.create({
    model: MODEL, messages: said(GIRL), max_tokens: 200,
    output_config: { format: { type: "json_schema", schema: SCHEMA } },
  });
  return made.content[0].text;
}

async function error() {
  try {
    await chat(TOO_LONG);
  } catch (refused) {
    if (refused instanceof Anthropic.BadRequestError) return { status: refused.status, message: refused.message };
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
