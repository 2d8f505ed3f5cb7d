// A text whose words can be made blanks: by a click, by dragging across words, or with the keys.

import { $, announce, make } from "./dom.js";

const BLANK = "____";
const HOLE = /((?<!\\)_{4,})/g;
const HINTS = {
  choose: "Click a word to make it a blank, and again to give it back. Drag, or hold Shift with the arrow keys, for several.",
  type: "Write four underscores, ____, for a blank.",
  off: "Every word is in doubt, so there is nothing to choose.",
};
const words = new Intl.Segmenter(undefined, { granularity: "word" });

/** A text in pieces: {text, kind, blank}, where a kind is "word", "gap" (between words) or "hole" (a blank without a word). */
function split(text) {
  return text.split(HOLE).flatMap((part, i) => {
    if (i % 2) return [{ text: part, kind: "hole", blank: true }];
    return [...words.segment(part)].map(({ segment, isWordLike }) => (
      { text: segment, kind: isWordLike ? "word" : "gap", blank: false }
    ));
  });
}

export class Board {
  constructor(onChange) {
    Object.assign(this, { element: $("board"), area: $("text"), onChange });
    Object.assign(this, { pieces: [], typing: false, repairing: false, drag: null });
    $("edit").addEventListener("click", () => (this.typing ? this.choose() : this.type()));
    this.area.addEventListener("keydown", (event) => { if (event.key === "Escape") this.choose(); });
    this.element.addEventListener("click", (event) => this.click(event));
    this.element.addEventListener("keydown", (event) => this.key(event));
    this.element.addEventListener("pointerdown", (event) => this.press(event));
    this.element.addEventListener("pointermove", (event) => this.move(event));
    document.addEventListener("pointerup", () => { if (this.drag?.moved) this.onChange(); });
    this.show();
  }

  /** The text as the server wants it: blanks as four underscores, blanks side by side as one. */
  get text() {
    if (this.written) return this.area.value;
    return this.pieces.map((piece, i) => {
      if (!piece.blank) return this.joins(i) ? "" : piece.text;
      return this.continues(i) ? "" : BLANK;
    }).join("");
  }

  set text(value) {
    this.area.value = value;
    this.pieces = split(value);
    this.typing = value.trim() === "";
    this.show();
  }

  /** While every word is doubted there are no blanks to choose. */
  set off(value) {
    if (value === this.repairing) return;
    if (value) {
      if (this.typing) this.pieces = split(this.area.value);
      this.area.value = this.before = this.whole;
    }
    this.repairing = value;
    if (!value) this.take();
    this.show();
  }

  /** Whether the text is being written rather than its words chosen. */
  get written() {
    return this.typing || this.repairing;
  }

  /** The text with every word given back. */
  get whole() {
    return this.written ? this.area.value : this.pieces.map((piece) => piece.text).join("");
  }

  type() {
    this.area.value = this.before = this.text;
    this.typing = true;
    this.show();
    this.area.focus();
  }

  choose() {
    if (this.area.value.trim() === "") return this.area.focus();
    this.take();
    this.show();
    this.onChange();
    this.element.querySelector("[tabindex='0']")?.focus();
  }

  /** Takes over what was written; if it is what it was, the words behind its blanks can still be given back. */
  take() {
    if (this.area.value !== this.before) this.pieces = split(this.area.value);
    this.typing = this.area.value.trim() === "";
  }

  /** Whether a gap lies within one blank. */
  joins(i) {
    const { pieces } = this;
    return pieces[i].kind === "gap" && !pieces[i].text.trim() && pieces[i - 1]?.blank && pieces[i + 1]?.blank;
  }

  /** Whether a blank goes on from the one before it. */
  continues(i) {
    return Boolean(this.pieces[i - 1]?.blank || (i > 1 && this.joins(i - 1)));
  }

  show() {
    this.element.hidden = this.written;
    this.area.hidden = !this.written;
    $("edit").hidden = this.repairing;
    $("edit").textContent = this.typing ? "Choose blanks" : "Edit the text";
    $("fill-label").htmlFor = this.written ? "text" : "";
    $("fill-hint").textContent = HINTS[this.repairing ? "off" : this.typing ? "type" : "choose"];
    this.element.replaceChildren();
    this.buttons = this.pieces.map((piece, i) => {
      if (piece.kind === "gap") return make("span", "gap", this.element, piece.text);
      const button = make("button", piece.kind, this.element);
      Object.assign(button, { type: "button", tabIndex: -1 });
      button.dataset.place = i;
      make("span", "", button, piece.kind === "word" ? piece.text : "\u2003\u2003");
      return button;
    });
    const first = this.element.querySelector("button");
    if (first) first.tabIndex = 0;
    this.paint();
  }

  paint() {
    this.pieces.forEach((piece, i) => {
      const element = this.buttons[i];
      element.classList.toggle("joined", Boolean(this.joins(i)));
      if (piece.kind === "gap") return;
      element.setAttribute("aria-pressed", piece.blank);
      element.setAttribute("aria-label", piece.kind === "hole" ? "blank" : piece.blank ? `blank, was ${piece.text}` : piece.text);
      element.classList.toggle("goes-on", piece.blank && this.continues(i));
      element.classList.toggle("goes-to", piece.blank && this.pieces.length > i + 1
        && Boolean(this.pieces[i + 1].blank || this.joins(i + 1)));
    });
  }

  set(i, blank) {
    if (this.pieces[i].kind === "word") this.pieces[i].blank = blank;
  }

  place(target) {
    const button = target?.closest?.("#board button");
    return button ? Number(button.dataset.place) : -1;
  }

  click(event) {
    const i = this.place(event.target);
    if (i < 0 || (event.detail && this.drag?.moved)) return;
    if (this.pieces[i].kind === "hole") {
      return this.rewrite(i);
    }
    this.set(i, !this.pieces[i].blank);
    this.focus(i);
    this.paint();
    this.onChange();
  }

  /** A blank that never had a word is selected in the text, so that one can be written in its place. */
  rewrite(i) {
    const nth = this.pieces.slice(0, i + 1).filter((piece, j) => piece.blank && !this.continues(j)).length;
    this.type();
    const { index } = [...this.area.value.matchAll(HOLE)][nth - 1];
    this.area.setSelectionRange(index, index + BLANK.length);
  }

  focus(i) {
    for (const button of this.element.querySelectorAll("button")) button.tabIndex = -1;
    this.buttons[i].tabIndex = 0;
    this.buttons[i].focus();
  }

  key(event) {
    const i = this.place(event.target);
    const all = this.pieces.flatMap((piece, j) => (piece.kind === "gap" ? [] : [j]));
    const at = all.indexOf(i);
    const next = { ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowDown: at + 1, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || at < 0) return;
    event.preventDefault();
    const to = all[Math.max(0, Math.min(all.length - 1, next))];
    if (event.shiftKey) {
      for (let j = Math.min(i, to); j <= Math.max(i, to); j += 1) this.set(j, this.pieces[i].blank);
      this.paint();
      this.onChange();
      announce(this.buttons[to].getAttribute("aria-label"));
    }
    this.focus(to);
  }

  press(event) {
    const from = this.place(event.target);
    const before = this.pieces.map((piece) => piece.blank);
    this.drag = from < 0 || event.button ? null : { from, before, blank: !before[from], moved: false };
  }

  /** Gives all words between the first one and the one under the pointer what a click would give the first. */
  move(event) {
    const { drag } = this;
    if (!drag || !event.buttons) return;
    const to = this.place(document.elementFromPoint(event.clientX, event.clientY));
    if (to < 0 || (to === drag.from && !drag.moved)) return;
    drag.moved = true;
    const within = (i) => i >= Math.min(drag.from, to) && i <= Math.max(drag.from, to);
    this.pieces.forEach((_, i) => this.set(i, within(i) ? drag.blank : drag.before[i]));
    this.paint();
  }
}
