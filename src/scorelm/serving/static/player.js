// Playback: which step is shown, by itself or by hand.

import { $, calm, clamp } from "./dom.js";

const STEPS_A_SECOND = 10;
const SECONDS_AT_MOST = 8;
const CALM_MS = 500;
const GAP_MS = 100;
const SHAPES = { play: "M3 1.5v13L14 8z", pause: "M3 2h4v12H3zM9 2h4v12H9z" };

export class Player {
  /** `show(k)` shows a step; `source()` says how many there are: {last, steps, ended}. */
  constructor(show, source) {
    Object.assign(this, { show, source, k: 0, playing: false, following: false, due: 0, owed: 0 });
    $("play").addEventListener("click", () => this.toggle());
    $("back").addEventListener("click", () => this.seek(this.k - 1));
    $("next").addEventListener("click", () => this.seek(this.k + 1));
    $("step").addEventListener("input", () => this.seek(Number($("step").value)));
    document.addEventListener("keydown", (event) => this.key(event));
  }

  /** From the start, as steps come in; those who want no motion see a new state now and then. */
  start() {
    this.k = 0;
    this.following = calm.matches;
    this.due = 0;
    if (this.following) this.pause();
    else this.play();
  }

  /** More steps have come, or the last one. */
  grow() {
    const { last, ended } = this.source();
    if (this.following && (ended || performance.now() >= this.due)) {
      this.due = performance.now() + CALM_MS;
      this.following = !ended;
      return this.go(last);
    }
    this.go(this.k);
  }

  go(k) {
    const { last } = this.source();
    if (last < 0) return;
    this.k = clamp(k, 0, last);
    const text = `step ${this.k} of ${last}`;
    $("step").max = last;
    $("step").value = this.k;
    $("step").setAttribute("aria-valuetext", text);
    $("count").textContent = text;
    this.show(this.k);
  }

  seek(k) {
    this.following = false;
    this.pause();
    this.go(k);
  }

  toggle() {
    this.following = false;
    if (this.playing) return this.pause();
    const { last, ended } = this.source();
    if (this.k >= last && ended) this.go(0);
    this.play();
  }

  play() {
    if (!this.playing) this.frame = requestAnimationFrame((time) => this.tick(time, time));
    Object.assign(this, { playing: true, owed: 0 });
    this.draw();
  }

  pause() {
    cancelAnimationFrame(this.frame);
    this.playing = false;
    this.draw();
  }

  /** Goes on by the steps that are due; waits at the end if more are to come. A page that was away does not catch up. */
  tick(time, before) {
    const { last, steps, ended } = this.source();
    const pace = Math.max(STEPS_A_SECOND, steps / SECONDS_AT_MOST) * Number($("speed").value);
    this.owed += Math.min(time - before, GAP_MS) / 1000 * pace;
    const due = Math.floor(this.owed);
    this.owed -= due;
    if (due > 0 && this.k < last) this.go(this.k + due);
    if (this.k >= last && ended) return this.pause();
    this.frame = requestAnimationFrame((next) => this.tick(next, time));
  }

  draw() {
    $("play").setAttribute("aria-label", this.playing ? "Pause" : "Play");
    $("play").querySelector("path").setAttribute("d", SHAPES[this.playing ? "pause" : "play"]);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.shiftKey || $("player").hidden) return;
    if (event.target.closest("input:not(#step), textarea, select, #board, summary")) return;
    if (event.key === " " && event.target.closest("button, a")) return;
    const keys = {
      " ": () => this.toggle(),
      ArrowLeft: () => this.seek(this.k - 1),
      ArrowRight: () => this.seek(this.k + 1),
      Home: () => this.seek(0),
      End: () => this.seek(this.source().last),
    };
    if (!keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  }
}
