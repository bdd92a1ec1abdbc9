// What is asked in between: a key, and how to answer.
//
// Knows:        forms.
// Ignorant of:  what becomes of what is entered.

import { Component, html, iconButton } from "/page/view.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", hint: "0 picks the likeliest token", min: 0, max: 100, step: "any" },
  { name: "top_p", label: "Top p", hint: "of the probability, 0 to 1", min: 0.001, max: 1, step: "any" },
  { name: "top_k", label: "Top k", hint: "tokens, 0 for all", min: 0, step: 1 },
  { name: "min_p", label: "Min p", hint: "of the likeliest's, 0 to 1", min: 0, max: 1, step: "any" },
  { name: "repetition_penalty", label: "Repetition penalty", hint: "1 for none", min: 0.01, max: 10, step: "any" },
  { name: "max_tokens", label: "Most tokens", hint: "of an answer", otherwise: "what fits", min: 1, step: 1 },
  { name: "seed", label: "Seed", hint: "the same, the same answer", otherwise: "at random", min: 0, step: 1 },
];

/** A modal dialog while it is shown; Escape closes it where it may be closed. */
class Modal extends Component {
  componentDidMount() {
    this.dialog.showModal();
  }

  render({ title, onClose, children }) {
    return html`
      <dialog aria-label=${title} ref=${(dialog) => (this.dialog = dialog ?? this.dialog)} onClose=${onClose}>
        <header>
          <h2>${title}</h2>
          <${iconButton} name="close" label="Close" onClick=${() => this.dialog.close()} />
        </header>
        ${children}
      </dialog>
    `;
  }
}

export class Settings extends Component {
  state = { ...this.props.settings };

  save = (event) => {
    event.preventDefault();
    this.props.onSave(this.state);
    event.target.closest("dialog").close();
  };

  clear = () => this.setState({ system: "", options: {}, think: "" });

  set(name, field) {
    const value = field.value === "" ? "" : field.valueAsNumber;
    this.setState({ options: { ...this.state.options, [name]: value } });
  }

  render({ thinks, onClose }, { system, options, think }) {
    return html`
      <${Modal} title="How to answer" onClose=${onClose}>
        <form class="settings" onSubmit=${this.save}>
          <label class="whole">
            <span>System prompt</span>
            <textarea rows="4" value=${system} placeholder="Who the model is to be, and what to keep in mind" onInput=${(e) => this.setState({ system: e.target.value })}></textarea>
          </label>
          ${FIELDS.map(
            ({ name, label, hint, otherwise = "recommended", ...limits }) => html`<label>
              <span>${label}</span>
              <input type="number" inputmode="decimal" placeholder=${otherwise} ...${limits} value=${options[name] ?? ""} onInput=${(e) => this.set(name, e.target)} />
              <small>${hint}</small>
            </label>`,
          )}
          ${thinks &&
          html`<label>
            <span>Thinking first</span>
            <select value=${think} onChange=${(e) => this.setState({ think: e.target.value })}>
              <option value="">as the model likes</option>
              <option value="yes">yes</option>
              <option value="no">no</option>
            </select>
          </label>`}
          <footer class="whole">
            <small>What is left empty is as the model's makers recommend.</small>
            <button type="button" class="quiet" onClick=${this.clear}>Clear all</button>
            <button type="submit" class="primary">Save</button>
          </footer>
        </form>
      <//>
    `;
  }
}

export class KeyPrompt extends Component {
  save = (event) => {
    event.preventDefault();
    this.props.onKey(this.field.value.trim());
    event.target.closest("dialog").close();
  };

  render({ words, onClose }) {
    return html`
      <${Modal} title="This server wants a key" onClose=${onClose}>
        <form class="key" onSubmit=${this.save}>
          <p>It was given to lowmoe serve as --api-key. It is kept in this tab until you close it.</p>
          ${words && html`<p class="trouble">${words}</p>`}
          <label>
            <span>Key</span>
            <input type="password" autocomplete="off" required autofocus ref=${(field) => (this.field = field ?? this.field)} />
          </label>
          <footer><button type="submit" class="primary">Go on</button></footer>
        </form>
      <//>
    `;
  }
}
