// What went wrong, said at the form, with a way on.

import { hasToken, saveToken } from "./api.js";
import { $, count, make, makeButton } from "./dom.js";

const TITLES = {
  overloaded: "The server is busy.",
  timeout: "That took too long.",
  gone: "The server is gone.",
  unauthorized: "This server wants a token.",
  server_error: "Something broke on the server.",
};
let timer = 0;

export function clearTrouble() {
  clearInterval(timer);
  $("trouble").hidden = $("key").hidden = true;
  for (const id of ["wrong", "again"]) $(id).replaceChildren();
  for (const field of document.querySelectorAll("[aria-invalid]")) field.removeAttribute("aria-invalid");
}

/** Shows what went wrong; `again` tries once more. */
export function showTrouble({ message, kind, retryAfter = 0, field = named(message) }, again) {
  clearTrouble();
  $("trouble").hidden = false;
  const title = kind === "unauthorized" && hasToken() ? "This token does not open it." : TITLES[kind];
  const label = field && document.querySelector(`label[for="${field.id.replace("-number", "")}"]`)?.textContent;
  make("b", "", $("wrong"), title ?? (label ? `Check “${label}”.` : "That cannot be done."));
  make("p", "", $("wrong"), sentence(message));
  if (field) {
    field.setAttribute("aria-invalid", "true");
    const folded = field.closest("details");
    if (folded) folded.open = true;
    field.focus();
  }
  if (kind === "unauthorized") return wantToken(again);
  if (["overloaded", "gone", "timeout", "server_error"].includes(kind)) offerAgain(again, retryAfter);
}

export const sentence = (text) => `${text.charAt(0).toUpperCase()}${text.slice(1).replace(/[^.!?]$/, "$&.")}`;

/** The field that a message of the server names, in its own words rather than in those that it quotes. */
function named(message) {
  const fields = [...$("form").querySelectorAll("input[id], select[id], textarea[id]")];
  const words = new Set(message.replace(/'[^']*'/g, "").match(/[a-z_]+/g));
  return fields.find((field) => words.has(field.id) && !field.closest("[hidden]"));
}

function offerAgain(again, seconds) {
  const button = makeButton("Try again", $("again"), again, "small");
  if (!seconds) return;
  let left = Math.ceil(seconds);
  const line = make("span", "", $("again"));
  const tell = () => {
    line.textContent = left > 0 ? `Try again in ${count(left, "second")}.` : "It may have room now.";
    button.disabled = left > 0;
    if (left <= 0) clearInterval(timer);
    left -= 1;
  };
  tell();
  timer = setInterval(tell, 1000);
}

function wantToken(again) {
  $("key").hidden = false;
  $("token").focus();
  $("unlock").onclick = () => { saveToken($("token").value); $("token").value = ""; again(); };
  $("token").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); $("unlock").click(); } };
}
