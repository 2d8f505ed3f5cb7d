// A text of a run: every token as sure as it is, and each of them a place to look closer.

import { make } from "./dom.js";

const END = "</s>";

export class Prose {
  /** `onLook(i, element)` is called when a token is pointed at, and with -1 when none is any more. */
  constructor(parent, recording, r, onLook) {
    Object.assign(this, { recording, r, onLook, k: -1, active: 0, gaps: [], spans: [] });
    this.element = make("p", "prose", parent);
    Object.assign(this.element, { dir: "auto", lang: "", translate: false });
    this.element.setAttribute("role", "listbox");
    this.element.setAttribute("aria-orientation", "horizontal");
    this.element.setAttribute("aria-label", `Tokens of text ${r + 1}`);
    const place = (event) => this.spans.indexOf(event.target.closest("span"));
    this.element.addEventListener("pointerover", (event) => this.onLook(place(event), event.target));
    this.element.addEventListener("pointerleave", () => this.onLook(-1));
    this.element.addEventListener("click", (event) => { if (place(event) >= 0) this.focus(place(event)); });
    this.element.addEventListener("focusin", (event) => this.onLook(place(event), event.target));
    this.element.addEventListener("focusout", () => this.onLook(-1));
    this.element.addEventListener("keydown", (event) => this.key(event));
  }

  show(k) {
    const { recording, r } = this;
    const row = recording.rows[r];
    const size = recording.shown(r, k);
    while (this.spans.length < size) this.grow();
    this.k = k;
    this.first = row.token[k].findIndex((place) => recording.tokens[place].kind !== "control");
    this.spans.forEach((span, i) => {
      span.hidden = i >= size;
      if (span.hidden) this.gaps[i].data = "";
      else this.paint(i, recording.tokens[row.token[k][i]], row.sigma[k][i] === 0, row.certainty[k][i]);
    });
    this.rove();
  }

  grow() {
    const gap = document.createTextNode("");
    this.element.append(gap);
    this.gaps.push(gap);
    const span = make("span", "", this.element);
    span.setAttribute("role", "option");
    this.spans.push(span);
  }

  paint(i, { text, kind }, finished, certainty) {
    const span = this.spans[i];
    const gap = text.startsWith(" ") && i > this.first ? 1 : 0;
    const given = this.recording.rows[this.r].sigma[0][i] === 0;
    const shown = kind === "control" && text === END ? "∎" : text.replace(/^ /, "");
    if (this.gaps[i].data.length !== gap) this.gaps[i].data = gap ? " " : "";
    if (span.textContent !== shown) span.textContent = shown;
    const doubted = !finished && kind !== "blank" && certainty === 0;
    const state = kind === "blank" ? "" : finished ? (given ? "given" : "done") : doubted ? "doubted" : "guess";
    const looked = span.classList.contains("looked") ? " looked" : "";
    span.className = `${kind} ${state}${looked}`;
    span.hidden = kind === "control" && text !== END;
    span.removeAttribute("aria-label");
    span.style.setProperty("--sure", finished ? 1 : this.recording.known(certainty));
  }

  get height() {
    return this.element.getBoundingClientRect().height;
  }

  /** Takes so much height at least, so that nothing below it jumps; 0 lets it go. */
  reserve(height) {
    this.element.style.minHeight = height ? `${height}px` : "";
  }

  mark(i) {
    this.spans.forEach((span, j) => span.classList.toggle("looked", i === j));
  }

  /** The tokens that can be reached, one of which is in the order of the Tab key. */
  rove() {
    if (this.spans[this.active]?.hidden !== false) this.active = Math.max(0, this.spans.findIndex((span) => !span.hidden));
    this.spans.forEach((span, i) => { span.tabIndex = i === this.active ? 0 : -1; });
  }

  focus(i) {
    this.active = i;
    this.rove();
    this.spans[i].focus();
  }

  key(event) {
    const open = this.spans.flatMap((span, i) => (span.hidden ? [] : [i]));
    const at = open.indexOf(this.active);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: open.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    event.stopPropagation();
    this.focus(open[Math.max(0, Math.min(open.length - 1, next))]);
  }
}
