// The machine on the right: its experts, and the numbers of what they do.
//
// Knows:        what is shown of a machine, and how it is said to who cannot see it.
// Ignorant of:  how a frame arrives; pixels.

import { Grid } from "/page/grid.js";
import { TIER_NAMES, TIERS } from "/page/machine.js";
import { bytes, count, figure, percent } from "/page/numbers.js";
import { Component, html } from "/page/view.js";

const SPOKEN_EVERY_MS = 15000;

/** Shares of a whole side by side: [{name, share, words}]. */
function Stack({ parts }) {
  return html`
    <div class="stack" aria-hidden="true">
      ${parts.map(({ name, share }) => html`<i class=${`tier ${name}`} style=${{ flexGrow: share }} hidden=${!share}></i>`)}
    </div>
    <ul class="parts">
      ${parts.map(
        ({ name, words, share }) => html`<li class=${share ? "" : "none"}>
          <i class=${`dot tier ${name}`} aria-hidden="true"></i>${TIER_NAMES[name]} <b>${words}</b>
        </li>`,
      )}
    </ul>
  `;
}

const parts = (machine, of, words) => {
  const total = TIERS.reduce((sum, name) => sum + of[name], 0) || 1;
  return machine.about.tiers.map((name) => ({ name, share: of[name] / total, words: words(of[name], total) }));
};

/** Tokens/s beside what was predicted and what the bandwidths allow. */
function Speed({ rates, speeds }) {
  const { tokens_per_s: measured, predicted_tokens_per_s: predicted, bound_tokens_per_s: bound } = rates;
  const speed = measured ?? 0;
  const most = Math.max(speed, predicted ?? 0, bound ?? 0, 1e-9) * 1.04;
  const at = (value) => ({ left: `${(100 * value) / most}%` });
  return html`
    <section class="speed">
      <h3>Speed</h3>
      <div class="headline"><strong>${figure(measured)}</strong> tokens/s <${Sparkline} values=${speeds} /></div>
      <div class="gauge" aria-hidden="true">
        <i class="bar" style=${{ width: `${(100 * speed) / most}%` }}></i>
        ${predicted !== null && html`<i class="tick predicted" style=${at(predicted)}></i>`}
        ${bound !== null && html`<i class="tick bound" style=${at(bound)}></i>`}
      </div>
      <ul class="parts">
        <li><i class="key predicted" aria-hidden="true"></i>predicted <b>${figure(predicted)}</b></li>
        <li><i class="key bound" aria-hidden="true"></i>memory allows <b>${figure(bound)}</b></li>
      </ul>
    </section>
  `;
}

function Sparkline({ values }) {
  const most = Math.max(...values, 1e-9);
  const points = values.map((value, i) => `${120 - values.length + i},${(23 - (21 * value) / most).toFixed(1)}`).join(" ");
  return html`
    <svg class="sparkline" viewBox="0 0 120 24" preserveAspectRatio="none" aria-hidden="true">
      ${values.length > 4 && html`<polyline points=${points} />`}
    </svg>
  `;
}

function Meter({ name, value, most, words }) {
  return html`
    <section class="meter">
      <h3>${name}</h3>
      <div class="gauge thin" aria-hidden="true"><i class="bar" style=${{ width: `${(100 * value) / (most || 1)}%` }}></i></div>
      <p>${words}</p>
    </section>
  `;
}

function requestWords({ n_answers, n_reading, n_waiting }) {
  const words = [`${n_answers} under way`];
  if (n_reading) words.push(n_reading === n_answers ? "reading" : `${n_reading} reading`);
  if (n_waiting) words.push(`${n_waiting} waiting`);
  return words.join(", ");
}

/** The same in numbers, made only while it is open. */
class Table extends Component {
  render({ machine }, { open }) {
    return html`
      <details class="table-on-demand" onToggle=${(e) => this.setState({ open: e.currentTarget.open })}>
        <summary>Experts by layer, as a table</summary>
        ${open && html`<div class="scroller" tabindex="0" role="region" aria-label="Experts by layer">${this.table(machine)}</div>`}
      </details>
    `;
  }

  table(machine) {
    const { layers, tiers } = machine.about;
    return html`
      <table>
        <thead>
          <tr>
            <th scope="col">Layer</th>
            ${tiers.map((name) => html`<th scope="col">${TIER_NAMES[name]}</th>`)}
            <th scope="col">Uses</th>
            <th scope="col">Used most</th>
          </tr>
        </thead>
        <tbody>
          ${layers.map((n, layer) => n > 0 && this.row(machine, layer))}
        </tbody>
      </table>
    `;
  }

  row(machine, layer) {
    const counts = machine.counts(layer);
    const uses = machine.uses.subarray(machine.first[layer], machine.first[layer + 1]);
    const best = uses.indexOf(Math.max(...uses));
    const total = machine.usesOfLayer(layer);
    return html`
      <tr>
        <th scope="row">${layer}</th>
        ${machine.about.tiers.map((name) => html`<td>${counts[TIERS.indexOf(name)]}</td>`)}
        <td>${total.toLocaleString("en")}</td>
        <td>${total ? `${best} (${percent(uses[best] / total)})` : "–"}</td>
      </tr>
    `;
  }
}

/** The canvas, its legend, and what is known of the expert that is pointed at. */
class Experts extends Component {
  componentDidMount() {
    const tints = TIERS.map((name) => this.box.querySelector(`.tint.${name}`));
    this.grid = new Grid(this.canvas, tints, this.box);
    this.props.onGrid(this.grid);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.grid.recolour());
  }

  componentDidUpdate(before) {
    if (before.isOpen !== this.props.isOpen) this.grid.resize();
  }

  look(expert, x, y) {
    if (expert === this.state.expert) return;
    this.grid.mark(expert);
    this.setState({ expert, at: expert === null ? null : [x, y] });
  }

  point = (event) => {
    const expert = this.grid.rows ? this.grid.at(event.clientX, event.clientY) : null;
    this.look(expert, ...(expert === null ? [] : this.grid.middle(expert)));
  };

  keys = (event) => {
    const { machine } = this.props;
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (event.key === "Escape") this.look(null);
    if (!step || !machine.about) return;
    event.preventDefault();
    const layers = machine.about.layers;
    let [layer, expert] = this.state.expert == null ? [layers.findIndex((n) => n > 0), -step[1]] : machine.place(this.state.expert);
    do layer += step[0];
    while (layers[layer] === 0);
    if (!layers[layer]) return;
    expert = Math.max(0, Math.min(layers[layer] - 1, expert + step[1]));
    const number = machine.first[layer] + expert;
    this.look(number, ...this.grid.middle(number));
  };

  words() {
    const { machine } = this.props;
    const { expert } = this.state;
    if (expert === null || expert === undefined) return "";
    const [layer, id] = machine.place(expert);
    const total = machine.usesOfLayer(layer);
    const share = total ? ` (${percent(machine.uses[expert] / total)} of its layer)` : "";
    const tier = TIERS[machine.places[expert]];
    const where = tier === "gpu" ? "on the GPU" : tier === "ram" ? "in RAM" : "on disk";
    const used = machine.about.counts_uses ? `, used ${count(machine.uses[expert], "time")}${share}` : "";
    return `Layer ${layer}, expert ${id}: ${where}${used}`;
  }

  render({ machine }, { at }) {
    const counts = machine.about ? machine.counts() : [0, 0, 0];
    const words = this.words();
    const tiers = machine.about?.tiers ?? [];
    return html`
      <section class="experts" ref=${(box) => (this.box = box ?? this.box)}>
        <h2>Experts</h2>
        <ul class="parts legend">
          ${TIERS.map(
            (name, i) => html`<li hidden=${!tiers.includes(name)}>
              <i class=${`dot tint tier ${name}`} aria-hidden="true"></i>${TIER_NAMES[name]} <b>${counts[i].toLocaleString("en")}</b>
            </li>`,
          )}
        </ul>
        <div class="map">
          <canvas
            tabindex="0"
            role="application"
            aria-roledescription="map of experts"
            aria-label="Experts by layer. Arrow keys move from one to the next; a table is below."
            ref=${(canvas) => (this.canvas = canvas ?? this.canvas)}
            onPointerMove=${this.point}
            onPointerDown=${this.point}
            onPointerLeave=${() => this.look(null)}
            onBlur=${() => this.look(null)}
            onKeyDown=${this.keys}
          ></canvas>
          ${words &&
          html`<div class=${`tip ${at[0] > this.canvas.clientWidth / 2 ? "left" : ""}`} style=${{ left: `${at[0]}px`, top: `${at[1]}px` }}>
            ${words}
          </div>`}
        </div>
        <p class="caption">
          A row is a layer, a cell an expert, its colour where it lives.
          ${" "}${!machine.about || machine.about.counts_uses ? "It lights up when it is used, and keeps a glow of how often." : "All are on the GPU, which alone knows which it uses."}
        </p>
        <p class="sr-only" aria-live="polite">${words}</p>
      </section>
    `;
  }
}

export class Panel extends Component {
  /** What is said to who cannot see, rarely enough not to be a nuisance. */
  summary(machine) {
    const now = performance.now();
    if (now < (this.sayAt ?? 0)) return this.said;
    this.sayAt = now + SPOKEN_EVERY_MS;
    const counts = machine.counts();
    const where = machine.about.tiers.map((name) => `${counts[TIERS.indexOf(name)]} ${name === "gpu" ? "on the GPU" : name === "ram" ? "in RAM" : "on disk"}`);
    const speed = machine.rates.tokens_per_s ? ` ${figure(machine.rates.tokens_per_s)} tokens a second.` : "";
    this.said = `Of ${count(machine.total, "expert")}, ${where.join(", ")}.${speed}`;
    return this.said;
  }

  render({ machine, isOpen, onGrid }) {
    const { about, rates } = machine;
    return html`
      <section class="panel" aria-label="The machine">
        <${Experts} machine=${machine} isOpen=${isOpen} onGrid=${onGrid} />
        ${about && rates
          ? html`
              <${Speed} rates=${rates} speeds=${machine.speeds} />
              <section>
                <h3>Experts were found</h3>
                <${Stack} parts=${parts(machine, rates.hit_rate, (n, total) => percent(n / total))} />
              </section>
              <section>
                <h3>Read for a token</h3>
                <${Stack} parts=${parts(machine, rates.bytes_per_token, (n) => bytes(n))} />
              </section>
              <div class="meters">
                <${Meter}
                  name="Context"
                  value=${rates.n_context}
                  most=${about.n_context}
                  words=${`${rates.n_context.toLocaleString("en")} of ${count(about.n_context, "token")}`}
                />
                <${Meter}
                  name="Requests"
                  value=${rates.n_answers}
                  most=${about.n_sequences}
                  words=${requestWords(rates)}
                />
              </div>
              <${Table} machine=${machine} />
              <p class="away">Experts of ${about.bits} bits, ${bytes(about.expert_bytes)} each, computed by ${about.isa}.</p>
              <p class="sr-only" role="status">${this.summary(machine)}</p>
            `
          : html`<p class="away">${machine.isConnected ? "" : "Waiting for the server …"}</p>`}
      </section>
    `;
  }
}
