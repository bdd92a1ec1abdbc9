// What the machine does: where every expert is, how often it was used, how fast tokens come.
//
// Knows:        the frames of /lowmoe/live, when to connect again.
// Ignorant of:  how it is shown.

import { KeyNeeded, request } from "/page/server.js";
import { events } from "/page/sse.js";

export const TIERS = ["gpu", "ram", "disk"];
export const TIER_NAMES = { gpu: "GPU", ram: "RAM", disk: "disk" };
const AGAIN_AFTER_MS = 2000;
const REMEMBERED = 120; // speeds, one a half second

const numbers = (Kind, text) => new Kind(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

export class Machine {
  /** changed: called after every frame; used: called with (expert numbers, times) as they are. */
  constructor(changed, used, needKey) {
    this.changed = changed;
    this.used = used;
    this.needKey = needKey;
    this.about = null; // of /lowmoe/machine
    this.rates = null;
    this.speeds = [];
    this.isConnected = false;
  }

  /** For ever: connect, and connect again. */
  async watch() {
    for (;;) {
      try {
        await this.watchOnce();
      } catch (error) {
        if (error instanceof KeyNeeded) await this.needKey(error.message);
      }
      this.isConnected = false;
      this.changed();
      await new Promise((then) => setTimeout(then, AGAIN_AFTER_MS));
    }
  }

  async watchOnce() {
    this.begin(await (await request("/lowmoe/machine")).json());
    const { body } = await request("/lowmoe/live");
    this.isConnected = true;
    this.changed();
    for await (const { data } of events(body)) this.take(JSON.parse(data));
  }

  begin(about) {
    this.about = about;
    // Experts are numbered layer by layer: `first` is where a layer's begin.
    this.first = [0];
    for (const n of about.layers) this.first.push(this.first.at(-1) + n);
    this.total = this.first.at(-1);
    this.places = new Uint8Array(this.total).fill(TIERS.indexOf("disk"));
    this.uses = new Float64Array(this.total);
    this.isNew = true; // nothing is drawn of it yet
  }

  take({ moved, used, rates, whole }) {
    const [movedAt, to] = [numbers(Uint32Array, moved.at), numbers(Uint8Array, moved.to)];
    movedAt.forEach((expert, i) => (this.places[expert] = to[i]));
    const [usedAt, times] = [numbers(Uint32Array, used.at), numbers(Uint32Array, used.times)];
    usedAt.forEach((expert, i) => (this.uses[expert] = times[i] + (whole ? 0 : this.uses[expert])));
    this.rates = rates;
    this.remember(rates.tokens_per_s);
    this.changed();
    if (!whole) this.used(usedAt, times);
  }

  remember(speed) {
    const now = performance.now();
    if (now < (this.rememberAt ?? 0)) return;
    this.rememberAt = now + 500;
    this.speeds = [...this.speeds, speed ?? 0].slice(-REMEMBERED);
  }

  /** [layer, expert] of a number. */
  place(number) {
    let layer = 0;
    while (this.first[layer + 1] <= number) layer += 1;
    return [layer, number - this.first[layer]];
  }

  /** How many experts are in each tier, of the whole model or of a layer. */
  counts(layer) {
    const [begin, end] = layer === undefined ? [0, this.total] : [this.first[layer], this.first[layer + 1]];
    const counts = [0, 0, 0];
    for (let i = begin; i < end; i++) counts[this.places[i]] += 1;
    return counts;
  }

  usesOfLayer(layer) {
    let sum = 0;
    for (let i = this.first[layer]; i < this.first[layer + 1]; i++) sum += this.uses[i];
    return sum;
  }
}
