// The picture of a text: the noise at every position after every step, and the uncertainty that is left.

import { clamp, make } from "./dom.js";

const WARMTH = 0.85;
const LEAST_WIDTH = 16;
const NAMES = ["noise", "half", "clean", "given", "sure"];
let palette = null;

/** The colours of the theme as [red, green, blue]. */
function colours() {
  if (!palette) {
    const probe = make("i", "", document.body);
    palette = Object.fromEntries(NAMES.map((name) => {
      probe.style.color = `var(--${name})`;
      return [name, getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number)];
    }));
    probe.remove();
  }
  return palette;
}

export const forgetColours = () => { palette = null; };

const mix = (a, b, share) => a.map((value, c) => value + share * (b[c] - value));

export class Trace {
  /** `onSeek(k)` follows the pointer when it is down, `onLook(k, i, event)` when it only points; i is -1 when it leaves. */
  constructor(parent, recording, r, onSeek, onLook) {
    Object.assign(this, { recording, r, span: 1, top: 1, painted: 0, palette: null });
    this.element = make("figure", "trace", parent);
    this.plot = make("div", "plot", this.element);
    this.map = make("div", "map", this.plot);
    this.canvas = make("canvas", "", this.map);
    this.canvas.setAttribute("role", "img");
    this.line = make("div", "line", this.map);
    this.curve = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    this.curve.setAttribute("preserveAspectRatio", "none");
    this.curve.setAttribute("aria-hidden", "true");
    this.fill = this.curve.appendChild(document.createElementNS(this.curve.namespaceURI, "path"));
    this.stroke = this.curve.appendChild(document.createElementNS(this.curve.namespaceURI, "path"));
    this.plot.append(this.curve);
    this.later = make("div", "later", this.plot);
    this.now = make("div", "now", this.plot);
    this.caption = make("figcaption", "", this.element);
    this.listen(onSeek, onLook);
  }

  listen(onSeek, onLook) {
    const place = (event) => {
      const box = this.map.getBoundingClientRect();
      const k = clamp(Math.floor((event.clientX - box.left) / box.width * this.span), 0, this.recording.last);
      const size = this.recording.shown(this.r, k);
      return { k, i: clamp(Math.floor((event.clientY - box.top) / box.height * this.canvas.height), 0, size - 1) };
    };
    this.plot.addEventListener("pointerdown", (event) => {
      this.plot.setPointerCapture(event.pointerId);
      onSeek(place(event).k);
    });
    this.plot.addEventListener("pointermove", (event) => {
      const { k, i } = place(event);
      if (event.buttons) onSeek(k);
      if (this.map.contains(event.target)) onLook(k, i, event);
    });
    for (const name of ["pointerleave", "pointercancel"]) this.plot.addEventListener(name, () => onLook(-1, -1));
  }

  /** Draws all steps; `span` is how many the picture is wide, `top` how many nats the curve is high. */
  draw(span, top) {
    Object.assign(this, { span, top });
    this.paint();
    const { nats } = this.recording.rows[this.r];
    const point = (value, k) => `${k + 0.5} ${(100 * (1 - value / top)).toFixed(2)}`;
    const path = `M${nats.map(point).join("L")}`;
    this.curve.setAttribute("viewBox", `0 0 ${span} 100`);
    this.stroke.setAttribute("d", path);
    this.fill.setAttribute("d", `${path}L${nats.length - 0.5} 100L0.5 100Z`);
  }

  /** Paints the steps that are new, or all of them where the size or the colours have changed. */
  paint() {
    const row = this.recording.rows[this.r];
    const { noise, half, clean, given, sure } = colours();
    const [width, height] = [Math.max(LEAST_WIDTH, 2 ** Math.ceil(Math.log2(this.span))), row.size];
    if (this.palette !== palette || this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
      Object.assign(this, { palette, painted: 0 });
    }
    this.canvas.style.width = `${100 * width / this.span}%`;
    this.canvas.setAttribute("aria-label", `Noise at ${height} positions over ${this.recording.last} steps`);
    this.map.style.height = `${clamp(5 * height, 56, this.recording.rows.length > 2 ? 120 : 220)}px`;
    const from = this.painted;
    this.painted = row.sigma.length;
    if (from === this.painted) return;
    const image = this.canvas.getContext("2d").createImageData(this.painted - from, height);
    for (let k = from; k < this.painted; k += 1) {
      row.sigma[k].slice(0, height).forEach((sigma, i) => {
        const signal = sigma === null ? 0 : this.recording.norm / (this.recording.norm + sigma);
        const base = signal < 0.5 ? mix(noise, half, 2 * signal) : mix(half, clean, 2 * signal - 1);
        const warm = this.recording.known(row.certainty[k][i]) * (1 - signal) * WARMTH;
        const colour = row.sigma[0][i] === 0 && sigma === 0 ? given : mix(base, sure, warm);
        image.data.set([...colour, 255], 4 * (i * image.width + k - from));
      });
    }
    this.canvas.getContext("2d").putImageData(image, from, 0);
  }

  show(k) {
    const { last, rows } = this.recording;
    this.now.style.left = `${100 * k / this.span}%`;
    this.now.style.width = `max(3px, ${100 / this.span}%)`;
    this.later.style.left = `${100 * (k + 1) / this.span}%`;
    const nats = rows[this.r].nats[Math.min(k, last)];
    this.caption.textContent = `uncertainty ${nats.toFixed(nats < 10 ? 1 : 0)} nats`;
  }

  /** Marks the line of a position; -1 marks none. */
  mark(i) {
    this.line.hidden = i < 0;
    this.line.style.top = `${100 * i / this.canvas.height}%`;
    this.line.style.height = `${100 / this.canvas.height}%`;
  }
}
