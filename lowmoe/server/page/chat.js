// The conversation on the left, and where one writes.
//
// Knows:        the order of messages, the field below them, what is said to who cannot see them.
// Ignorant of:  where answers come from.

import { Assistant, User } from "/page/message.js";
import { count } from "/page/numbers.js";
import { session } from "/page/stored.js";
import { Component, html, icon } from "/page/view.js";

const BEGINNINGS = [
  "Once upon a time there was a lighthouse",
  "Tell me a story about a clockmaker and a fox.",
  "What do you dream of?",
];

function Beginning({ machine, onSay }) {
  const total = machine?.layers.reduce((sum, n) => sum + n, 0);
  const depth = machine?.layers.filter((n) => n > 0).length;
  return html`
    <div class="beginning">
      <h2>Ask the experts.</h2>
      <p>
        ${machine
          ? html`<b>${machine.model}</b> has ${count(total, "expert")} in ${count(depth, "layer")} and asks
              ${" "}${machine.n_active} of each layer for every token. All of it happens on this machine.`
          : "A Mixture-of-Experts model, on this machine alone."}
      </p>
      <ul>
        ${BEGINNINGS.map((text) => html`<li><button type="button" onClick=${() => onSay(text)}>${text}</button></li>`)}
      </ul>
    </div>
  `;
}

class Composer extends Component {
  state = { text: session.get("lowmoe.draft") ?? "" };

  set(text) {
    session.set("lowmoe.draft", text);
    this.setState({ text });
  }

  send = (event) => {
    event.preventDefault();
    const text = this.state.text.trim();
    if (!text || this.props.isWriting) return;
    this.set("");
    this.props.onSay(text);
  };

  keys = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.send(event);
  };

  componentDidMount() {
    this.grow();
    if (matchMedia("(pointer: fine)").matches) this.field.focus();
  }

  componentDidUpdate() {
    this.grow();
  }

  /** As high as its text, up to what the style sheet allows. */
  grow() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }

  render({ isWriting, onStop }, { text }) {
    return html`
      <form class="composer" onSubmit=${this.send}>
        <textarea
          rows="1"
          aria-label="Your message"
          placeholder="Write something …"
          value=${text}
          ref=${(field) => (this.field = field ?? this.field)}
          onInput=${(e) => this.set(e.target.value)}
          onKeyDown=${this.keys}
        ></textarea>
        ${isWriting
          ? html`<button type="button" class="round stop" aria-label="Stop the answer" title="Stop (Esc)" onClick=${onStop}>
              ${icon("stop")}
            </button>`
          : html`<button type="submit" class="round" aria-label="Send" title="Send (Enter)" disabled=${!text.trim()}>
              ${icon("send")}
            </button>`}
      </form>
    `;
  }
}

export class Chat extends Component {
  atEnd = true;

  /** Follow what is written, unless one has scrolled up to read. */
  componentDidUpdate() {
    if (this.atEnd) this.list.scrollTop = this.list.scrollHeight;
  }

  componentDidMount() {
    this.list.scrollTop = this.list.scrollHeight;
  }

  scrolled = () => {
    const { scrollTop, scrollHeight, clientHeight } = this.list;
    this.atEnd = scrollHeight - scrollTop - clientHeight < 48;
  };

  say = (text, n) => {
    this.atEnd = true;
    this.props.conversation.say(text, n);
  };

  again = (n) => {
    this.atEnd = true;
    this.props.conversation.again(n);
  };

  render({ conversation, machine }) {
    const { messages, isWriting, undone } = conversation;
    const last = messages.length - 1;
    const row = (message, n) => html`
      ${n > 0 && n === conversation.first && html`<p class="left-out">The model is no longer given what is above: its context is full.</p>`}
      ${one(message, n)}
    `;
    const one = (message, n) =>
      message.role === "user"
        ? html`<${User} key=${n} message=${message} onEdit=${(text) => this.say(text, n)} />`
        : html`<${Assistant}
            key=${n}
            message=${message}
            isLast=${n === last}
            isBusy=${isWriting}
            onAgain=${() => this.again(n)}
          />`;
    return html`
      <section class="chat" aria-label="Conversation">
        ${messages.length > 0 && html`<h2 class="sr-only">Conversation</h2>`}
        <div class="messages" tabindex="0" role="log" aria-live="off" aria-label="Messages" ref=${(list) => (this.list = list ?? this.list)} onScroll=${this.scrolled}>
          <div class="column">
            ${messages.length ? messages.map(row) : html`<${Beginning} machine=${machine} onSay=${this.say} />`}
          </div>
        </div>
        <p class="sr-only" role="status">${spoken(messages[last])}</p>
        <div class="under">
          <div class="column below">
            ${undone &&
            html`<p class="note">
              ${count(undone.length - messages.filter((m) => undone.includes(m)).length, "message")} replaced.
              <button type="button" class="quiet" onClick=${() => conversation.undo()}>Undo</button>
            </p>`}
            ${!conversation.isKept && html`<p class="note">This browser does not let the conversation be kept over a reload.</p>`}
            <${Composer} isWriting=${isWriting} onSay=${this.say} onStop=${() => conversation.stop()} />
          </div>
        </div>
      </section>
    `;
  }
}

/** For who listens: not every token, but that something begins, and the answer when it is whole. */
function spoken(message) {
  if (message?.role !== "assistant") return "";
  return message.state === "writing" ? "An answer is being written." : `Answer: ${message.text.slice(0, 2000)}`;
}
