// The form as settings, settings as a request, and settings in the address of the page.

import { $ } from "./dom.js";

const NUMBERS = ["steps", "temperature", "n", "length", "blank_words", "seed"];
const NAMED = ["path", "solver"];
const MOST_CANDIDATES = 4096;

/** The form: fills itself from what the server offers, and is read and written as settings. */
export class Settings {
  constructor(model, board) {
    Object.assign(this, { model, board });
    for (const name of NAMED) {
      const select = $(name);
      for (const choice of model[`${name}s`]) select.add(new Option(choice.name));
      select.addEventListener("change", () => { $(`${name}-number`).value = ""; this.explain(name); });
    }
    const { limits } = model;
    $("steps").max = limits.steps;
    $("n").max = limits.texts;
    $("length").max = limits.length;
    $("mode-fill").disabled = !model.infills;
    if (!model.infills) document.querySelector("label[for=mode-fill]").title = "This model cannot fill in blanks";
    $("repair").addEventListener("change", () => this.repairs());
    for (const mode of ["write", "fill"]) $(`mode-${mode}`).addEventListener("change", () => this.turn());
    for (const range of document.querySelectorAll("input[type=range][step='0.05']")) {
      range.addEventListener("input", () => this.tell(range));
    }
    const { prompts: [prompt = ""], blanks: [text = ""] } = model.examples;
    this.write({ ...model.defaults, n: 1, mode: "write", prompt, text });
  }

  get mode() {
    return $("mode-fill").checked ? "fill" : "write";
  }

  /** All settings, in the order of the form; what is empty is left out. */
  read() {
    const mode = this.mode;
    const repair = mode === "fill" && $("repair").checked;
    const values = mode === "write" ? { mode, prompt: $("prompt").value } : { mode, text: this.board.text };
    if (repair) values.repair = Number($("strength").value);
    for (const name of NAMED) values[name] = [$(name).value, $(`${name}-number`).value.trim()].filter(Boolean).join(":");
    for (const name of NUMBERS) if ($(name).value !== "") values[name] = Number($(name).value);
    delete values[mode === "write" ? "blank_words" : "length"];
    return values;
  }

  /** Puts settings into the form; what they do not name stays, and what makes no sense is left out. */
  write(values) {
    if (values.mode === "fill" && this.model.infills) $("mode-fill").checked = true;
    if (values.mode === "write") $("mode-write").checked = true;
    if (typeof values.prompt === "string") $("prompt").value = values.prompt;
    if (typeof values.text === "string") this.board.text = values.text;
    $("repair").checked = Boolean(values.repair);
    if (Number(values.repair)) $("strength").value = values.repair;
    for (const name of NAMED) {
      const [choice, numbers = ""] = String(values[name] ?? "").split(/:(.*)/s);
      if (![...$(name).options].some((option) => option.value === choice)) continue;
      $(name).value = choice;
      $(`${name}-number`).value = numbers;
    }
    for (const name of NUMBERS) if (name in values) $(name).value = values[name] ?? "";
    this.turn();
  }

  /** Shows the fields of the mode that is on. */
  turn() {
    const fill = this.mode === "fill";
    for (const id of ["fill", "blank-row"]) $(id).hidden = !fill;
    for (const id of ["write", "length-row"]) $(id).hidden = fill;
    const [go, start] = !fill ? ["Write", "Write something"]
      : $("repair").checked ? ["Repair", "Repair the text"] : ["Fill in", "Fill in the blanks"];
    $("go").textContent = go;
    $("start").textContent = start;
    $("doubt").hidden = !$("repair").checked;
    this.board.off = $("repair").checked;
    for (const option of $("path").options) {
      option.disabled = fill && !this.model.paths.find((path) => path.name === option.value).infills;
    }
    for (const name of NAMED) this.explain(name);
    for (const id of ["temperature", "strength"]) this.tell($(id));
  }

  /** A repair goes along another path by default. */
  repairs() {
    const [before, now] = $("repair").checked ? [this.model.defaults.path, "uniform"] : ["uniform", this.model.defaults.path];
    if ($("path").value === before) $("path").value = now;
    this.turn();
  }

  explain(name) {
    const choice = this.model[`${name}s`].find((one) => one.name === $(name).value);
    const [, numbers] = choice.usage.split(":");
    const input = $(`${name}-number`);
    input.hidden = !numbers;
    if (numbers) {
      const words = numbers.toLowerCase().replaceAll(",", ", ");
      input.placeholder = words;
      input.setAttribute("aria-label", `${choice.name}: ${words}`);
      input.title = `A number for ${choice.name}, ${words}; may be left out`;
    }
    $(`${name}-about`).textContent = choice.about;
  }

  tell(range) {
    range.parentElement.querySelector("output").value = Number(range.value).toFixed(2).replace(/0$/, "");
  }

  /** The first field whose value cannot be, or undefined. */
  wrong() {
    return [...$("form").querySelectorAll("input")].find((input) => !input.closest("[hidden]") && !input.validity.valid);
  }
}

/** The request for some settings: where it goes and what it says. */
export function request({ mode, ...settings }) {
  const rest = Object.fromEntries(Object.entries(settings).filter(([name]) => !["prompt", "text"].includes(name)));
  const candidates = settings.n * settings.steps <= MOST_CANDIDATES ? 5 : 0;
  const body = { ...rest, stream: true, candidates };
  return mode === "write"
    ? { path: "/v1/generate", body: { ...body, prompt: settings.prompt } }
    : { path: "/v1/infill", body: { ...body, text: settings.text } };
}

export function toHash(settings) {
  return `#${new URLSearchParams(Object.entries(settings).map(([name, value]) => [name, String(value)]))}`;
}

/** Settings from the address of the page; numbers that are none are left out. */
export function fromHash(hash) {
  const values = Object.fromEntries(new URLSearchParams(hash.slice(1)));
  for (const name of [...NUMBERS, "repair"]) {
    if (name in values && (values[name].trim() === "" || !Number.isFinite(Number(values[name])))) delete values[name];
  }
  return values;
}
