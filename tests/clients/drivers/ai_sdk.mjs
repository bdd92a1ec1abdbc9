// Drives Vercel's AI SDK; its model is the one that `lowmoe launch ai-sdk` writes down.

import { Output, generateText, jsonSchema, streamText, tool } from "ai";
import { GIRL, LONG, N_LONG, N_TOKENS, SCHEMA, SEA, TOO_LONG, TOOL, Absent, drive } from "./harness.mjs";
import { model } from "./snippet.mjs";

const exact = { model, maxOutputTokens: N_TOKENS, temperature: 0, maxRetries: 0 };

async function chat(prompt = GIRL) {
  const made = await generateText({ ...exact, prompt });
  return { text: made.text, finish: made.finishReason, n_new: made.usage.outputTokens };
}

async function stream() {
  const made = streamText({ ...exact, prompt: GIRL });
  const pieces = [];
  for await (const piece of made.textStream) pieces.push(piece);
  return { pieces, n_new: (await made.usage).outputTokens ?? null };
}

async function cancel() {
  const stop = new AbortController();
  const made = streamText({ model, maxOutputTokens: N_LONG, prompt: LONG, abortSignal: stop.signal });
  for await (const piece of made.textStream) {
    stop.abort();
    return { first: piece };
  }
}

async function tools() {
  const own = tool({ description: TOOL.description, inputSchema: jsonSchema(TOOL.parameters) });
  const made = await generateText({
    model, prompt: GIRL, maxRetries: 0, tools: { [TOOL.name]: own },
    toolChoice: { type: "tool", toolName: TOOL.name },
  });
  const [call] = made.toolCalls;
  return { name: call.toolName, arguments: JSON.stringify(call.input) };
}

async function schema() {
  const output = Output.object({ schema: jsonSchema(SCHEMA), name: "girl" });
  return JSON.stringify((await generateText({ model, prompt: GIRL, maxRetries: 0, output })).output);
}

async function error() {
  try {
    await chat(TOO_LONG);
  } catch (refused) {
    if (refused.statusCode) return { status: refused.statusCode, message: refused.message };
    throw refused;
  }
}

await drive({
  models: async () => { throw new Absent("lists no models"); },
  chat,
  other: () => chat(SEA),
  stream,
  cancel,
  tools,
  schema,
  error,
  two: async () => (await Promise.all([chat(GIRL), chat(SEA)])).map((made) => made.text),
});
