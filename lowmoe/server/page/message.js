// One message: what was said or is being written, and what can be done with it.
//
// Knows:        markdown blocks, thinking, troubles, usage.
// Ignorant of:  where answers come from.

import { blocks, copied, nodes } from "/page/markdown.js";
import { count, figure, seconds } from "/page/numbers.js";
import { Component, html, icon } from "/page/view.js";

/** A block of markdown; built anew only when its source has changed. */
class Block extends Component {
  shouldComponentUpdate(next) {
    return next.block.raw !== this.props.block.raw;
  }

  fill() {
    this.place.replaceChildren(nodes(this.props.block));
  }

  componentDidMount() {
    this.fill();
  }

  componentDidUpdate() {
    this.fill();
  }

  render() {
    return html`<div class="block" ref=${(place) => (this.place = place ?? this.place)}></div>`;
  }
}

class Markdown extends Component {
  shouldComponentUpdate(next) {
    return next.text !== this.props.text;
  }

  render({ text }) {
    return html`<div class="markdown">${blocks(text).map((block) => html`<${Block} block=${block} />`)}</div>`;
  }
}

function Thinking({ message }) {
  if (!message.thinking) return null;
  const now = message.state === "writing" && !message.text;
  const took = message.thoughtFor ?? message.lastAfter - message.firstAfter;
  return html`
    <details class="thinking">
      <summary>${now ? "Thinking …" : `Thought for ${seconds(took)}`}</summary>
      <div class="thought">${message.thinking}</div>
    </details>
  `;
}

/** Tokens, their speed, and how long the first one took. */
function usageWords({ usage, firstAfter, lastAfter, reason }) {
  const words = [];
  if (usage) {
    const n = usage.completion_tokens;
    words.push(count(n, "token"));
    if (n > 1 && lastAfter > firstAfter) words.push(`${figure((n - 1) / (lastAfter - firstAfter))} tokens/s`);
  }
  if (firstAfter !== undefined) words.push(`first after ${seconds(firstAfter)}`);
  if (reason === "length") words.push("ended by the limit of tokens");
  return words.join(" · ");
}

function Trouble({ message, onAgain, isLast }) {
  if (message.state === "writing" || message.state === "done") return null;
  const words = {
    stopped: "Stopped.",
    interrupted: "The page was left while this was being written.",
    broken: message.trouble,
  }[message.state];
  return html`
    <div class=${`trouble ${message.state}`} role=${message.state === "broken" ? "alert" : undefined}>
      <span>${words}</span>
      ${isLast && html`<button type="button" class="quiet" onClick=${onAgain}>Try again</button>`}
    </div>
  `;
}

export function Assistant({ message, isLast, isBusy, onAgain }) {
  const waiting = message.state === "writing" && !message.text && !message.thinking;
  const words = message.state === "writing" ? "" : usageWords(message);
  return html`
    <article class=${`message assistant ${message.state}`} aria-label="Answer">
      ${waiting && html`<${Waiting} />`}
      <${Thinking} message=${message} />
      <${Markdown} text=${message.text} />
      <${Trouble} message=${message} isLast=${isLast} onAgain=${onAgain} />
      ${message.state !== "writing" &&
      html`
        <footer>
          ${message.text &&
          html`<button type="button" class="quiet" onClick=${(e) => copied(e.currentTarget.lastElementChild, message.text)}>
            ${icon("copy")}<span>Copy</span>
          </button>`}
          ${isLast &&
          message.state === "done" &&
          html`<button type="button" class="quiet" disabled=${isBusy} onClick=${onAgain}>
            ${icon("again")}<span>Again</span>
          </button>`}
          ${words && html`<span class="usage">${words}</span>`}
        </footer>
      `}
    </article>
  `;
}

/** Nothing has come yet: the prompt is being read, which may take long. */
class Waiting extends Component {
  componentDidMount() {
    this.begun = performance.now();
    this.timer = setInterval(() => this.setState({ s: (performance.now() - this.begun) / 1000 }), 1000);
  }

  componentWillUnmount() {
    clearInterval(this.timer);
  }

  render(_, { s = 0 }) {
    return html`
      <p class="waiting"><span class="dots" aria-hidden="true"></span>Reading${s >= 1 ? `, ${Math.round(s)} s` : " …"}</p>
    `;
  }
}

export class User extends Component {
  begin = () => this.setState({ draft: this.props.message.text }, () => this.field?.focus());

  end = () => this.setState({ draft: undefined });

  send = (event) => {
    event.preventDefault();
    const text = this.state.draft.trim();
    if (!text) return;
    this.end();
    this.props.onEdit(text);
  };

  keys = (event) => {
    if (event.key === "Escape") this.end();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) this.send(event);
  };

  render({ message }, { draft }) {
    if (draft === undefined) {
      return html`
        <article class="message user" aria-label="You">
          <div class="said">${message.text}</div>
          <footer>
            <button type="button" class="quiet" onClick=${this.begin}>${icon("edit")}<span>Edit</span></button>
          </footer>
        </article>
      `;
    }
    return html`
      <form class="message user editing" onSubmit=${this.send}>
        <textarea
          aria-label="Edit your message"
          rows=${Math.min(12, draft.split("\n").length + 1)}
          value=${draft}
          ref=${(field) => (this.field = field)}
          onInput=${(e) => this.setState({ draft: e.target.value })}
          onKeyDown=${this.keys}
        ></textarea>
        <footer>
          <span class="hint">What follows it is replaced.</span>
          <button type="button" class="quiet" onClick=${this.end}>Cancel</button>
          <button type="submit" class="primary">Ask again</button>
        </footer>
      </form>
    `;
  }
}
