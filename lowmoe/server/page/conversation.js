// A conversation: what was said, how it goes on, kept over a reload.
//
// Knows:        messages, which may be edited, how an answer comes and how it breaks off.
// Ignorant of:  how it is shown; HTTP.

import { answer, Broken, countTokens, KeyNeeded, Refused } from "/page/server.js";
import { local } from "/page/stored.js";

const KEPT = "lowmoe.conversation";
const SETTINGS = "lowmoe.settings";
// Of the context: with more than MOST the oldest turns are left out, until LEFT is taken. So there is
// room for an answer, and the turns after it go on from what was read for this one.
const MOST = 0.75;
const LEFT = 0.5;

function read(name, otherwise) {
  try {
    return { ...otherwise, ...JSON.parse(local.get(name) ?? "null") };
  } catch {
    return otherwise; // what somebody else wrote there
  }
}

function keep(name, value) {
  return local.set(name, JSON.stringify(value));
}

const isMessage = ({ role, text }) => ["user", "assistant"].includes(role) && typeof text === "string";

export class Conversation {
  /** changed: called after every change; needKey: called when the server wants a key. */
  constructor(changed, needKey) {
    this.changed = changed;
    this.needKey = needKey;
    this.settings = read(SETTINGS, { system: "", options: {}, think: "" });
    const { messages, first } = read(KEPT, { messages: [], first: 0 });
    this.messages = Array.isArray(messages) ? messages.filter(isMessage) : [];
    this.first = this.messages[first]?.role === "user" ? first : 0; // that the model is given
    this.about = null; // the model
    for (const message of this.messages) {
      if (message.state === "writing") message.state = "interrupted"; // by a reload
    }
    this.isKept = true;
    this.undone = null; // messages before the latest change that threw some away
    this.writing = null; // an AbortController while an answer comes
    // Whoever leaves aborts what is under way; it is to be found as it was.
    addEventListener("pagehide", () => {
      this.isLeft = true;
      this.keep();
    });
    addEventListener("pageshow", (event) => event.persisted && location.reload());
  }

  get isWriting() {
    return this.writing !== null;
  }

  setSettings(settings) {
    this.settings = settings;
    this.isKept = keep(SETTINGS, settings);
    this.changed();
  }

  begin() {
    this.replace([]);
  }

  undo() {
    this.stop();
    this.messages = this.undone;
    this.undone = null;
    this.first = 0;
    this.keep();
  }

  stop() {
    this.writing?.abort();
  }

  /** Say something after the first n messages, in the place of what came after them. */
  say(text, n = this.messages.length) {
    if (n < this.messages.length) this.replace(this.messages.slice(0, n));
    else this.undone = null;
    this.messages = [...this.messages, { role: "user", text }];
    return this.goOn();
  }

  /** Answer anew what came before message n. */
  again(n) {
    this.replace(this.messages.slice(0, n));
    return this.goOn();
  }

  replace(messages) {
    this.stop();
    this.undone = this.messages.length > messages.length ? this.messages : null;
    this.messages = messages;
    if (this.first >= messages.length) this.first = 0;
    this.keep();
  }

  async goOn() {
    const writing = new AbortController();
    const message = { role: "assistant", text: "", thinking: "", state: "writing" };
    this.messages = [...this.messages, message];
    this.writing = writing;
    this.keep();
    const began = performance.now();
    try {
      await this.fit(writing.signal);
      for await (const piece of answer(this.body(), writing.signal)) {
        this.take(message, piece, (performance.now() - began) / 1000);
        this.changed();
      }
      message.state = "done";
    } catch (error) {
      if (this.isLeft) return;
      this.breakOff(message, error);
    } finally {
      if (this.writing === writing && !this.isLeft) {
        this.writing = null;
        this.keep();
      }
    }
  }

  /** Leave out the oldest turns, where all are too much for the context. */
  async fit(signal) {
    if (!this.about) return;
    for (;;) {
      const turns = this.messages.flatMap(({ role }, i) => (role === "user" && i >= this.first ? [i] : []));
      if (turns.length < 2) return; // the server says so, if even that is too much
      const { messages } = this.body();
      const n = await countTokens(this.about.model, messages, signal);
      if (n <= MOST * this.about.n_context) return;
      const size = (from) => this.messages.slice(from).reduce((sum, { text }) => sum + text.length, 1);
      const aim = (size(this.first) * LEFT * this.about.n_context) / n;
      this.first = turns.slice(1).find((i) => size(i) <= aim) ?? turns.at(-1);
      this.keep();
    }
  }

  take(message, { thinking, text, reason, usage }, seconds) {
    if (thinking || text) {
      message.firstAfter ??= seconds;
      message.lastAfter = seconds;
    }
    if (thinking) message.thinking += thinking;
    if (text) {
      message.text += text;
      if (message.thinking) message.thoughtFor ??= seconds - message.firstAfter;
    }
    if (reason) message.reason = reason;
    if (usage) message.usage = usage;
  }

  breakOff(message, error) {
    if (error.name === "AbortError") {
      message.state = "stopped";
      return;
    }
    message.state = "broken";
    message.trouble = error.message;
    if (error instanceof KeyNeeded) this.needKey(error.message);
    else if (!(error instanceof Refused || error instanceof Broken)) throw error;
  }

  /** What is asked: every message that says something; of one role together, as some models want. */
  body() {
    const { system, options, think } = this.settings;
    const messages = [];
    for (const { role, text } of this.messages.slice(this.first)) {
      if (messages.at(-1)?.role === role) messages.at(-1).content += text && `\n\n${text}`;
      else if (text) messages.push({ role, content: text });
    }
    if (system.trim()) messages.unshift({ role: "system", content: system });
    const given = Object.entries(options).filter(([, value]) => value !== "" && value !== null);
    const thinking = think && { chat_template_kwargs: { enable_thinking: think === "yes" } };
    return { messages, ...thinking, ...Object.fromEntries(given) };
  }

  keep() {
    this.isKept = keep(KEPT, { messages: this.messages, first: this.first });
    this.changed();
  }
}
