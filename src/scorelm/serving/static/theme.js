// Light or dark: as the system says, until the button is pressed.

import { $ } from "./dom.js";
import { forgetColours } from "./trace.js";

const KEY = "scorelm-theme";
const dark = matchMedia("(prefers-color-scheme: dark)");
const root = document.documentElement.style;

export function applyTheme() {
  root.colorScheme = localStorage.getItem(KEY) ?? "";
}

/** Calls `repaint` when colours have changed. */
export function onTheme(repaint) {
  const changed = () => { forgetColours(); repaint(); };
  dark.addEventListener("change", changed);
  $("theme").addEventListener("click", () => {
    const now = root.colorScheme || (dark.matches ? "dark" : "light");
    root.colorScheme = now === "dark" ? "light" : "dark";
    localStorage.setItem(KEY, root.colorScheme);
    changed();
  });
}
