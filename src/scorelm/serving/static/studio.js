// The page: what is asked for, what comes in, and what is shown of it.

import { Trouble, getModel, stream } from "./api.js";
import { Board } from "./board.js";
import { hideCard } from "./card.js";
import { $, announce, calm, copy, count, flash, makeButton } from "./dom.js";
import { Player } from "./player.js";
import { Recording } from "./recording.js";
import { RunView } from "./runview.js";
import { Settings, fromHash, request, toHash } from "./settings.js";
import { applyTheme, onTheme } from "./theme.js";
import { clearTrouble, sentence, showTrouble } from "./trouble.js";

const OTHER_PATH = { uniform: "bounded" };
let model, settings;
/** The runs on the page, {settings, recording, state, view}; of two, the first is pinned. */
let runs = [];
let pinned = false;
let abort = null;

const player = new Player(
  (k) => { for (const { view } of runs) view.show(k); reserve(); },
  () => ({
    last: Math.max(-1, ...runs.map(({ recording }) => recording.last)),
    steps: Math.max(1, ...runs.map((run) => run.settings.steps)),
    ended: runs.every(({ state }) => state !== "running"),
  }),
);

/** Pictures are as wide and as high as the largest beside them, so that they can be compared. */
function draw() {
  const drawn = runs.filter(({ recording }) => recording.last >= 0);
  const span = 1 + Math.max(...drawn.map(({ recording }) => recording.last));
  const top = Math.max(1, ...drawn.flatMap(({ recording }) => recording.rows.map((row) => Math.max(...row.nats))));
  for (const { view } of drawn) view.draw(span, top);
}

/** A text keeps the height that it once took, and so does the one beside it; from a new width on, all begin anew. */
let width = 0;
function reserve() {
  const now = $("runs").clientWidth / runs.length;
  const texts = runs.flatMap(({ view }) => view.texts);
  if (now !== width) for (const { prose } of texts) prose.reserve(0);
  width = now;
  const heights = [];
  for (const { prose, r } of texts) heights[r] = Math.max(heights[r] ?? 0, prose.height);
  for (const { prose, r } of texts) prose.reserve(heights[r]);
}

let drawing = 0;
function drawSoon() {
  drawing ||= requestAnimationFrame(() => { drawing = 0; draw(); player.grow(); });
}

function place() {
  $("runs").replaceChildren(...runs.map(({ view }) => view.element));
  $("runs").classList.toggle("pair", runs.length > 1);
  runs.forEach((run, i) => { run.view.pinned = pinned && i === 0; });
  $("locked").hidden = !pinned;
  for (const id of ["words", "seed"]) $(id).disabled = pinned;
}

function status(text) {
  $("status").textContent = text;
  $("bar").hidden = false;
}

/** What can be done now that a run has begun or ended. */
function offer() {
  const running = Boolean(abort);
  const run = runs.at(-1);
  $("go").hidden = running;
  $("cancel").hidden = !running;
  $("player").hidden = $("legend").hidden = !run || run.recording.last < 0;
  const other = OTHER_PATH[run?.settings.path] ?? "uniform";
  $("compare").textContent = `Compare with ${other}`;
  $("compare").onclick = () => { pin(); write({ ...run.settings, path: other }); };
  $("another").onclick = () => write({ ...run.settings, seed: run.settings.seed + run.settings.n });
  for (const id of ["compare", "another", "pin"]) $(id).hidden = pinned;
  $("compare").hidden ||= model.objective === "autoregressive";
  for (const id of ["compare", "another", "pin"]) $(id).disabled = running;
  $("compare").disabled ||= !run?.recording.samples;
  $("pin").disabled ||= !run?.recording.samples;
  const { activeElement: focused } = document;
  if (focused === document.body || focused.disabled || focused.closest("[hidden]")) {
    $(running ? "cancel" : "go").focus({ preventScroll: true });
  }
}

/** The newest run stays, and so do its text and seed in the form. */
function pin() {
  pinned = true;
  settings.write(runs.at(-1).settings);
  place();
  offer();
  status("Pinned. The next run stands beside it, with the same text and seed.");
}

/** Keeps the newest run only. */
function unpin() {
  pinned = false;
  runs = runs.slice(-1);
  place();
  if (runs.length) draw();
  offer();
  player.go(player.k);
}

/** Puts settings into the form, and runs them. */
function write(values) {
  settings.write(values);
  start();
}

async function start() {
  clearTrouble();
  announce("");
  const wrong = settings.wrong();
  if (wrong) return showTrouble({ message: wrong.validationMessage, field: wrong });
  const values = settings.read();
  history.replaceState(null, "", toHash(values));
  const run = { settings: values, recording: new Recording(model), state: "running" };
  run.view = new RunView(run, model, (k) => player.seek(k), unpin);
  runs = pinned ? [runs[0], run] : [run];
  abort = new AbortController();
  hideCard();
  $("welcome").hidden = true;
  place();
  offer();
  status("Waiting for the server…");
  if ($("stage").getBoundingClientRect().top > innerHeight / 2) {
    $("stage").scrollIntoView({ behavior: calm.matches ? "auto" : "smooth" });
  }
  await follow(run, abort.signal).catch((error) => fail(run, error));
  abort = null;
  offer();
  if (run.recording.last >= 0) drawSoon();
}

async function follow(run, signal) {
  const { path, body } = request(run.settings);
  const before = performance.now();
  for await (const { name, data } of stream(path, body, signal)) {
    if (name === "queued") status(`Waiting: ${count(data.ahead, "request")} ahead of yours.`);
    if (name === "step") {
      if (run.recording.last < 0) begin(run);
      run.recording.add(data);
      drawSoon();
    }
    if (name === "done") finish(run, data, performance.now() - before);
  }
}

function begin(run) {
  status("Writing…");
  run.since = performance.now();
  requestAnimationFrame(() => { offer(); player.start(); });
}

function finish(run, { samples, notes }, ms) {
  const said = notes.map(sentence);
  run.view.notes = said;
  run.recording.finish(samples);
  run.state = "done";
  width = 0;
  const texts = samples.map(({ text }) => text);
  status(`Written in ${(ms / 1000).toFixed(1)} s, with ${evaluations(samples)}.`);
  const finished = texts.length === 1 ? "Finished:" : `${texts.length} texts are finished.`;
  announce([...said, finished, ...texts].join(" "));
}

function evaluations(samples) {
  const nfe = samples.map((sample) => sample.nfe);
  const [least, most] = [Math.min(...nfe), Math.max(...nfe)];
  return least === most ? count(most, "evaluation") : `${least} to ${count(most, "evaluation")} each`;
}

function fail(run, error) {
  const steps = run.recording.last;
  const cancelled = error.name === "AbortError";
  run.recording.finish(null);
  run.state = "failed";
  if (steps < 0) drop(run);
  else status(`${cancelled ? "Cancelled" : "Stopped"} after ${count(steps, "step")}.`);
  if (cancelled) return announce("Cancelled.");
  if (!(error instanceof Trouble)) console.error(error);
  showTrouble(error, start);
}

/** Takes a run away that has shown nothing, and goes back to what was there before. */
function drop(run) {
  runs = runs.filter((one) => one !== run);
  place();
  $("welcome").hidden = runs.length > 0;
  status("");
  $("bar").hidden = !runs.length;
  if (runs.length) player.go(player.k);
}

/** Buttons that put an example into a field. */
function offerExamples(id, examples, take) {
  const group = $(id).querySelector(".examples");
  for (const example of examples) makeButton(example, group, () => { take(example); share(); }, "plain example");
}

function share() {
  history.replaceState(null, "", toHash(settings.read()));
}

function open() {
  if (location.hash.length > 1) settings.write(fromHash(location.hash));
}

function present() {
  const millions = `${(model.parameters / 1e6).toFixed(1)} million`;
  const size = `${model.parameters >= 1e6 ? millions : model.parameters.toLocaleString("en")} parameters`;
  $("model").textContent = `${model.name} · ${size}`;
  $("about").textContent = `${[`The model here is ${model.name}: ${size}`, model.about].filter(Boolean).join(", ")}.`;
  settings = new Settings(model, new Board(() => share()));
  for (const line of document.querySelectorAll(".noisy")) line.hidden = model.objective === "autoregressive";
  offerExamples("write", ["", ...model.examples.prompts], (prompt) => { $("prompt").value = prompt; });
  $("write").querySelector(".example").textContent = "from nothing";
  offerExamples("fill", model.examples.blanks, (text) => settings.write({ ...settings.read(), repair: 0, text }));
  open();
  for (const id of ["go", "start", "share"]) $(id).disabled = false;
}

async function load() {
  clearTrouble();
  try {
    model = await getModel();
    present();
  } catch (error) {
    showTrouble(error, load);
  }
}

function listen() {
  $("form").addEventListener("submit", (event) => { event.preventDefault(); if (!abort && model) start(); });
  $("form").addEventListener("change", () => { if (settings) share(); });
  $("form").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
  });
  $("cancel").addEventListener("click", () => abort?.abort());
  $("start").addEventListener("click", () => $("form").requestSubmit());
  $("pin").addEventListener("click", pin);
  $("share").addEventListener("click", async () => { share(); await copy(location.href); flash($("share"), "Copied"); });
  addEventListener("hashchange", () => {
    if (!settings) return;
    if (pinned) unpin();
    open();
  });
  addEventListener("keydown", (event) => { if (event.key === "Escape") hideCard(); });
  addEventListener("scroll", () => { for (const { view } of runs) view.lookAgain(); }, { passive: true, capture: true });
  addEventListener("resize", () => { if (runs.length) player.go(player.k); });
  onTheme(() => { if (runs.length) draw(); });
}

applyTheme();
listen();
load();
