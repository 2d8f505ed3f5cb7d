// A run on the page: its settings, and every text with its picture.

import { hideCard, describe, showCard } from "./card.js";
import { copy, count, flash, make, makeButton } from "./dom.js";
import { saveFilm } from "./film.js";
import { Prose } from "./prose.js";
import { Trace } from "./trace.js";


/** The settings of a run in a line. */
function describeRun({ path, solver, steps, temperature, seed, repair }, model) {
  const parts = [count(steps, "step"), `temperature ${temperature}`, `seed ${seed}`];
  if (repair) parts.unshift(`doubt ${repair}`);
  if (solver !== model.defaults.solver) parts.unshift(solver);
  return [path, parts.join(", ")];
}

export class RunView {
  /** `onSeek(k)` is called when the picture is pressed, `onUnpin()` when the run is to go. */
  constructor(run, model, onSeek, onUnpin) {
    Object.assign(this, { run, onSeek, texts: [], k: 0 });
    const [path, rest] = describeRun(run.settings, model);
    this.element = make("article", "run");
    this.element.setAttribute("aria-label", `Run on the path ${path}`);
    const head = make("header", "", this.element);
    const name = make("h2", "", head, path);
    make("small", "", name, rest);
    const actions = make("div", "", head);
    this.unpin = makeButton("Unpin", actions, onUnpin);
    const film = makeButton("Save film", actions, async () => {
      await saveFilm(run.recording, run.settings.text ?? run.settings.prompt, `${model.name}, ${path}, ${rest}`)
        .then(() => flash(film, "Saved"), () => flash(film, "Server gone"));
    });
    this.film = film;
    this.note = make("p", "note", this.element);
    this.note.hidden = true;
    this.pinned = false;
  }

  /** Shows what the server says of the texts that it was given. */
  set notes(sentences) {
    this.note.textContent = sentences.join(" ");
    this.note.hidden = !sentences.length;
  }

  set pinned(value) {
    this.element.classList.toggle("pinned", value);
    this.unpin.hidden = !value;
  }

  add(r) {
    const section = make("div", "sample", this.element);
    section.setAttribute("role", "group");
    section.setAttribute("aria-label", `Text ${r + 1}`);
    const text = { section };
    const look = (i, anchor) => this.look(text, this.at, i, anchor);
    text.prose = new Prose(section, this.run.recording, r, look);
    const foot = make("div", "foot", section);
    text.trace = new Trace(section, this.run.recording, r, this.onSeek, (k, i, event) => this.look(text, k, i, event));
    text.nfe = make("span", "nfe", foot);
    text.copy = makeButton("Copy", foot, async () => { await copy(this.run.recording.samples[r].text); flash(text.copy, "Copied"); });
    text.trace.mark(-1);
    this.texts.push(text);
    text.r = r;
  }

  /** The step that is shown: the last one, for a run that is shorter than another beside it. */
  get at() {
    return Math.min(this.k, this.run.recording.last);
  }

  /** Draws what has come in; pictures side by side are `span` steps wide and `top` nats high. */
  draw(span, top) {
    const { recording } = this.run;
    while (this.texts.length < recording.rows.length) this.add(this.texts.length);
    for (const { trace, copy: button } of this.texts) {
      trace.draw(span, top);
      button.hidden = !recording.samples;
    }
    this.element.classList.toggle("many", this.texts.length > 4);
    this.film.hidden = this.run.state === "running" || recording.last < 1;
  }

  show(k) {
    this.k = k;
    for (const { prose, trace, nfe, r } of this.texts) {
      prose.show(this.at);
      trace.show(k);
      nfe.textContent = count(this.run.recording.rows[r].nfe[this.at], "evaluation");
    }
    this.lookAgain();
  }

  /** Brings the card up to date with the step, and with where its token is now. */
  lookAgain() {
    const [text, i, anchor] = this.looked ?? [];
    if (text) this.look(text, this.at, i, anchor);
  }

  /** Shows the card of a position next to a token, or to the pointer in the picture. */
  look(text, k, i, anchor) {
    const { prose, trace, r } = text;
    if (i < 0 || i >= this.run.recording.shown(r, k)) {
      this.looked = null;
      prose.mark(-1);
      trace.mark(-1);
      return hideCard();
    }
    const look = this.run.recording.look(r, k, i);
    const point = anchor.clientX === undefined ? null : { left: anchor.clientX + 12, top: anchor.clientY, bottom: anchor.clientY };
    this.looked = point ? null : [text, i, anchor];
    prose.mark(i);
    trace.mark(i);
    if (!point) prose.spans[i].setAttribute("aria-label", describe(look));
    showCard(look, i, point ?? anchor.getBoundingClientRect());
  }

}
