// Experts as a grid on a canvas: a row a layer, a cell an expert; lit when used, then fading.
//
// Every cell is one pixel of a small image, whose colours are looked up by tier and heat; the image
// is drawn large, and a mask cuts the gaps. So a frame costs the same for any size of cells.
//
// Knows:        pixels, heat, colours of the style sheet.
// Ignorant of:  what experts are.

const FADES_IN_MS = 300; // to 1/e
const PASS_MS = 90; // from the first row to the last: experts light up in the order of layers
const COLD = 1 / 300;
const MOST_AT_REST = 0.34; // of heat: what was used more glows more, when nothing is used
const SHADES = 256;
// Of a cell, px.
const WIDEST = 72;
const HIGHEST = 30;
const LOWEST = 6; // where there is room for that

export class Grid {
  /** tints: elements whose background is a tier's colour; surface: one behind the canvas. */
  constructor(canvas, tints, surface) {
    Object.assign(this, { canvas, tints, surface });
    this.context = canvas.getContext("2d");
    this.small = document.createElement("canvas");
    this.mask = document.createElement("canvas");
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.marked = null; // an expert that is looked at
    this.frameMs = 0; // that drawing took, a running mean
    new ResizeObserver(() => this.resize()).observe(canvas.parentElement);
  }

  /** rows: how many experts each has.  places: the tier of each expert, as it changes. */
  begin(rows, places) {
    this.rows = rows;
    this.places = places;
    this.columns = Math.max(...rows);
    const cells = (this.cells = rows.length * this.columns);
    this.heat = new Float32Array(cells);
    this.due = new Float64Array(cells);
    this.glow = new Float32Array(cells);
    this.rest = new Float32Array(cells);
    this.cellOf = new Uint32Array(places.length);
    this.expertAt = new Int32Array(cells).fill(-1);
    let expert = 0;
    rows.forEach((n, row) => {
      for (let i = 0; i < n; i++, expert++) {
        this.cellOf[expert] = row * this.columns + i;
        this.expertAt[row * this.columns + i] = expert;
      }
    });
    this.small.width = this.columns;
    this.small.height = rows.length;
    this.image = new ImageData(this.columns, rows.length);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.recolour();
    this.resize();
  }

  resize() {
    if (!this.rows) return;
    const room = this.canvas.parentElement.clientWidth;
    const scale = devicePixelRatio;
    const wide = Math.min(room, this.columns * WIDEST);
    const most = parseFloat(getComputedStyle(this.canvas).getPropertyValue("--most-high"));
    const row = Math.min(HIGHEST, Math.max(wide / this.columns, LOWEST), most / this.rows.length);
    const high = this.rows.length * row;
    this.canvas.style.width = `${wide}px`;
    this.canvas.style.height = `${high}px`;
    this.canvas.width = Math.round(wide * scale);
    this.canvas.height = Math.round(high * scale);
    this.cut();
    this.wake();
  }

  /** What is left between cells: nothing where they are too narrow for it. */
  cut() {
    const { mask, canvas, columns, rows } = this;
    [mask.width, mask.height] = [canvas.width, canvas.height];
    const [across, down] = [gap(canvas.width / columns), gap(canvas.height / rows.length)];
    // The last gap lies beyond the edge.
    this.span = [canvas.width + across, canvas.height + down];
    const [wide, high] = [this.span[0] / columns, this.span[1] / rows.length];
    const radius = Math.min(wide, high) < 9 ? 0 : Math.min(wide, high) * 0.16;
    const context = mask.getContext("2d");
    for (let row = 0; row < rows.length; row++) {
      const [top, bottom] = [Math.round(row * high), Math.round((row + 1) * high)];
      for (let column = 0; column < rows[row]; column++) {
        const [left, right] = [Math.round(column * wide), Math.round((column + 1) * wide)];
        context.beginPath();
        context.roundRect(left, top, right - left - across, bottom - top - down, radius);
        context.fill();
      }
    }
  }

  /** Colours by tier and heat, from the style sheet. */
  recolour() {
    const surface = colour(this.surface);
    const dark = luminance(surface) < 0.4;
    this.shades = this.tints.map((tint) => shades(colour(tint), surface, dark));
    this.isDark = dark;
    this.wake();
  }

  /** These experts were used so often since the last time. */
  light(experts, times) {
    const now = performance.now();
    // One use is seen; of many, who is used most is told from who is used less.
    const most = times.reduce((a, b) => Math.max(a, b), 1);
    for (let i = 0; i < experts.length; i++) {
      const cell = this.cellOf[experts[i]];
      const row = Math.floor(cell / this.columns);
      this.glow[cell] = Math.max(this.heat[cell], most === 1 ? 0.85 : 0.4 + (0.6 * times[i]) / most);
      this.due[cell] = now + (this.calm.matches ? 0 : (row / this.rows.length) * PASS_MS);
    }
    this.wake();
  }

  /** How often each expert was used so far. */
  settle(uses) {
    const { rows, columns, rest } = this;
    let first = 0;
    rows.forEach((n, row) => {
      const ofRow = uses.subarray(first, first + n);
      const most = Math.max(...ofRow);
      for (let i = 0; i < n; i++) rest[row * columns + i] = most && MOST_AT_REST * (ofRow[i] / most);
      first += n;
    });
    this.wake();
  }

  mark(expert) {
    this.marked = expert;
    this.wake();
  }

  /** The expert at a place on the canvas, in px, or null. */
  at(x, y) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor(((x - box.left) / box.width) * this.columns);
    const row = Math.floor(((y - box.top) / box.height) * this.rows.length);
    if (column < 0 || column >= this.columns || row < 0 || row >= this.rows.length) return null;
    const expert = this.expertAt[row * this.columns + column];
    return expert < 0 ? null : expert;
  }

  /** Where an expert is on the canvas: its middle, in px. */
  middle(expert) {
    const box = this.canvas.getBoundingClientRect();
    const cell = this.cellOf[expert];
    const [row, column] = [Math.floor(cell / this.columns), cell % this.columns];
    return [
      ((column + 0.5) / this.columns) * box.width,
      ((row + 0.5) / this.rows.length) * box.height,
    ];
  }

  wake() {
    if (this.asked || !this.rows) return;
    this.asked = requestAnimationFrame((now) => this.frame(now));
  }

  frame(now) {
    this.asked = null;
    const began = performance.now();
    const isHot = this.cool(now);
    this.draw();
    this.frameMs += 0.1 * (performance.now() - began - this.frameMs);
    this.then = isHot ? now : null;
    if (!isHot) return;
    // With reduced motion nothing fades: what was used goes out after a while, in one step.
    if (this.calm.matches) setTimeout(() => this.wake(), FADES_IN_MS);
    else this.wake();
  }

  cool(now) {
    const { heat, due, glow, rest, pixels, cellOf, places, shades } = this;
    const fade = this.calm.matches ? 0 : Math.exp(-(now - (this.then ?? now)) / FADES_IN_MS);
    let isHot = false;
    for (let expert = 0; expert < cellOf.length; expert++) {
      const cell = cellOf[expert];
      let warmth = heat[cell] * fade;
      if (due[cell] !== 0) {
        if (due[cell] <= now) {
          warmth = glow[cell];
          due[cell] = 0;
        }
        isHot = true;
      }
      if (warmth < COLD) warmth = 0;
      else isHot = true;
      heat[cell] = warmth;
      pixels[cell] = shades[places[expert]][(Math.max(warmth, rest[cell]) * (SHADES - 1)) | 0];
    }
    return isHot;
  }

  draw() {
    const { context, canvas, small, mask } = this;
    small.getContext("2d").putImageData(this.image, 0, 0);
    context.globalCompositeOperation = "source-over";
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.imageSmoothingEnabled = false;
    context.drawImage(small, 0, 0, ...this.span);
    context.globalCompositeOperation = "destination-in";
    context.drawImage(mask, 0, 0);
    context.globalCompositeOperation = "source-over";
    if (this.marked !== null) this.outline(this.marked);
  }

  outline(expert) {
    const { context } = this;
    const [wide, high] = [this.span[0] / this.columns, this.span[1] / this.rows.length];
    const cell = this.cellOf[expert];
    const [row, column] = [Math.floor(cell / this.columns), cell % this.columns];
    const around = Math.max(1, Math.round(devicePixelRatio));
    context.lineWidth = 2 * around;
    context.strokeStyle = this.isDark ? "#fff" : "#111";
    context.strokeRect(column * wide - around, row * high - around, wide + around, high + around);
  }
}

/** Between cells of a size, in pixels. */
function gap(size) {
  return size < 3.5 ? 0 : Math.min(Math.max(1, Math.round(size * 0.12)), 4 * devicePixelRatio);
}

function colour(element) {
  const probe = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  probe.fillStyle = getComputedStyle(element).backgroundColor;
  probe.fillRect(0, 0, 1, 1);
  return probe.getImageData(0, 0, 1, 1).data.slice(0, 3);
}

const luminance = ([r, g, b]) => (0.2126 * r + 0.7152 * g + 0.0722 * b) / 255;

const mix = (a, b, share) => a.map((value, i) => value + (b[i] - value) * share);

/** From at rest, close to the surface, to lit: on dark glowing to white, on light deepening. */
function shades(tint, surface, dark) {
  const [from, tone] = [[...surface], [...tint]];
  const rest = mix(from, tone, dark ? 0.2 : 0.24);
  const lit = dark ? mix(tone, [255, 255, 255], 0.62) : mix(tone, [0, 0, 0], 0.22);
  const table = new Uint32Array(SHADES);
  for (let i = 0; i < SHADES; i++) {
    const warmth = (i / (SHADES - 1)) ** 1.3; // what is almost out is told from what is not
    const [r, g, b] = warmth < 0.6 ? mix(rest, tone, warmth / 0.6) : mix(tone, lit, (warmth - 0.6) / 0.4);
    table[i] = (255 << 24) | (b << 16) | (g << 8) | r;
  }
  return table;
}
