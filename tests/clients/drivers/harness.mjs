// What a driver in JavaScript is: a program that does one thing after another with a client, and
// writes a line of JSON for each, of what it saw.  The questions are those of harness.py.

import { readFileSync } from "node:fs";

const questions = readFileSync(new URL("questions.json", import.meta.url));

export const MODEL = process.env.DRIVEN_MODEL;
export const { GIRL, SEA, LONG, N_TOKENS, N_LONG, TOOL, SCHEMA } = JSON.parse(questions);
export const TOO_LONG = "word ".repeat(3000);
export const said = (text) => [{ role: "user", content: text }];

export class Absent extends Error {}

export async function drive(behaviours) {
  for (const [behaviour, act] of Object.entries(behaviours)) {
    let told;
    try {
      told = { saw: await act() };
    } catch (error) {
      told = error instanceof Absent ? { absent: error.message } : { failed: String(error?.stack) };
    }
    console.log(JSON.stringify({ behaviour, ...told }));
  }
}
