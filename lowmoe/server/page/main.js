// The page: a conversation, and beside it the machine that has it.
//
// Knows:        what is on the page, and which part hears of what.
// Ignorant of:  how any part does what it does.

import { Chat } from "/page/chat.js";
import { Conversation } from "/page/conversation.js";
import { KeyPrompt, Settings } from "/page/dialogs.js";
import { Machine } from "/page/machine.js";
import { Panel } from "/page/panel.js";
import { key } from "/page/server.js";
import { local } from "/page/stored.js";
import { atNextFrame, Component, html, iconButton, render } from "/page/view.js";

const PANEL_EVERY_MS = 250; // numbers that change faster cannot be read
const SCHEMES = ["system", "light", "dark"];
const SCHEME_ICONS = { system: "system", light: "sun", dark: "moon" };

class App extends Component {
  state = { scheme: document.documentElement.dataset.scheme ?? "system" };
  show = atNextFrame(() => this.setState({}));
  conversation = new Conversation(this.show, (words) => this.needKey(words));
  machine = new Machine(
    () => this.heard(),
    (experts, times) => this.grid.light(experts, times),
    (words) => this.needKey(words),
  );

  componentDidMount() {
    this.machine.watch();
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !document.querySelector("dialog[open]")) this.conversation.stop();
    });
  }

  /** A frame came: the grid shows it now, the numbers soon. */
  heard() {
    const { machine } = this;
    if (machine.isNew) {
      machine.isNew = false;
      this.conversation.about = machine.about;
      this.grid.begin(machine.about.layers.filter((n) => n > 0), machine.places);
      document.title = `${machine.about.model} · lowmoe`;
    }
    const due = (this.shownAt ?? 0) + PANEL_EVERY_MS - performance.now();
    if (due <= 0) {
      this.shownAt = performance.now();
      this.show();
      if (machine.about) this.grid.settle(machine.uses);
    } else {
      this.later ??= setTimeout(() => {
        this.later = undefined;
        this.heard();
      }, due);
    }
  }

  /** Asks for a key, whoever needs it; resolves when there is one. */
  needKey(words) {
    this.setState({ dialog: "key", words: key.get() ? words : "" });
    this.asking ??= new Promise((then) => (this.gotKey = then));
    return this.asking;
  }

  takeKey = (given) => {
    key.set(given);
    this.gotKey?.();
    this.asking = this.gotKey = undefined;
  };

  closeDialog = () => this.setState({ dialog: undefined });

  nextScheme = () => {
    const scheme = SCHEMES[(SCHEMES.indexOf(this.state.scheme) + 1) % SCHEMES.length];
    if (scheme === "system") {
      delete document.documentElement.dataset.scheme;
      local.set("lowmoe.scheme", undefined);
    } else {
      document.documentElement.dataset.scheme = scheme;
      local.set("lowmoe.scheme", scheme);
    }
    this.setState({ scheme });
    this.grid.recolour();
  };

  render(_, { scheme, dialog, words, isOpen }) {
    const { conversation, machine } = this;
    return html`
      <header class="top">
        <h1 class="brand"><a href="/"><img src="/page/icon.svg" alt="" width="24" height="24" />lowmoe</a></h1>
        <span class=${`state ${machine.isConnected ? "on" : "off"}`} role="status">
          ${machine.isConnected ? machine.about.model : this.asking ? "a key is needed" : "no connection"}
        </span>
        <nav aria-label="Page">
          <${iconButton} name="add" label="New conversation" disabled=${!conversation.messages.length} onClick=${() => conversation.begin()} />
          <${iconButton} name="options" label="How to answer" onClick=${() => this.setState({ dialog: "settings" })} />
          <${iconButton} name=${SCHEME_ICONS[scheme]} label=${`Colours: ${scheme}`} onClick=${this.nextScheme} />
          <${iconButton} name="machine" class="icon-button only-narrow" label="The machine" aria-expanded=${Boolean(isOpen)} onClick=${() => this.setState({ isOpen: !isOpen })} />
        </nav>
      </header>
      <main class=${`both ${isOpen ? "machine-open" : ""}`}>
        <${Chat} conversation=${conversation} machine=${machine.about} />
        <${Panel} machine=${machine} isOpen=${isOpen} onGrid=${(grid) => (this.grid = grid)} />
      </main>
      ${dialog === "settings" && html`<${Settings} settings=${conversation.settings} thinks=${machine.about?.thinks} onSave=${(s) => conversation.setSettings(s)} onClose=${this.closeDialog} />`}
      ${dialog === "key" && html`<${KeyPrompt} words=${words} onKey=${this.takeKey} onClose=${this.closeDialog} />`}
    `;
  }
}

render(html`<${App} />`, document.querySelector("#app"));
