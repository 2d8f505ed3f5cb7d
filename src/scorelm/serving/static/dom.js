// Small things for building the page. Text only ever enters it as text.

export const $ = (id) => document.getElementById(id);

export function make(tag, className, parent, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
  return element;
}

export function makeButton(text, parent, onClick, className = "plain small") {
  const button = make("button", className, parent, text);
  button.type = "button";
  button.addEventListener("click", onClick);
  return button;
}

export const clamp = (value, low, high) => Math.max(low, Math.min(high, value));

export const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;

export const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** Puts text on the clipboard, also where the page came over plain HTTP and the browser has no clipboard for it. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const focused = document.activeElement;
    const area = make("textarea", "sr", document.body);
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
    focused?.focus();
  }
}

/** Shows on a button for a moment what has come of it. */
export function flash(button, text) {
  button.dataset.label ??= button.textContent;
  button.textContent = text;
  clearTimeout(button.timer);
  button.timer = setTimeout(() => { button.textContent = button.dataset.label; }, 1500);
}

/** Says something to those who listen to the page rather than look at it. */
export function announce(text) {
  $("announce").textContent = text;
}

export function download(name, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/html" }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
