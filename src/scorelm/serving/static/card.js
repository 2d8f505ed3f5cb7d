// The card beside a token: how sure the model was of it, and what else it thought of.

import { $, clamp, make } from "./dom.js";

const GAP = 8;
const percent = (share) => (share >= 0.995 ? "100 %" : share >= 0.01 ? `${Math.round(100 * share)} %` : "< 1 %");
const sure = (certainty) => (certainty < 0.01 ? "below 0.01" : certainty.toFixed(2));
const name = (text) => text.trim() || "a space";

/** What a token is, as a sentence. */
function state({ token, sigma, certainty, finished, given, step }) {
  if (given) return "Given";
  if (finished) return `Written in step ${step}`;
  const noise = sigma === null ? "no evidence yet" : `noise σ ${Number(sigma).toPrecision(2)}`;
  if (token.kind === "blank") return "Not looked at yet";
  return certainty === 0 ? `Given and doubted, ${noise}` : `A guess, certainty ${sure(certainty)}, ${noise}`;
}

/** All of a card as one sentence. */
export function describe(look) {
  const others = look.candidates.map(([text, share]) => `${name(text)} ${percent(share)}`).join(", ");
  return `${name(look.token.text)}. ${state(look)}.${others ? ` Likeliest: ${others}.` : ""}`;
}

/** Shows the card for what was looked up, next to a rectangle of the window. */
export function showCard(look, i, box) {
  const card = $("card");
  card.replaceChildren();
  const head = make("p", "card-head", card);
  make("b", "serif", head, look.token.kind === "control" ? "end of text" : name(look.token.text));
  make("span", "", head, `position ${i}`);
  make("p", "", card, state(look));
  if (look.candidates.length) {
    const list = make("ol", "", card);
    for (const [text, share] of look.candidates) {
      const item = make("li", text === look.token.text ? "chosen" : "", list);
      make("span", "serif", item, name(text));
      make("i", "", item).style.width = `${100 * share}%`;
      make("span", "", item, percent(share));
    }
    if (look.finished) make("p", "", card, "Likeliest before it was written");
  }
  if (!look.kept && !look.given && look.token.kind !== "blank") make("p", "", card, "What else it thought of is not kept for so many steps and texts.");
  card.hidden = false;
  const { offsetWidth: width, offsetHeight: height } = card;
  const below = box.bottom + GAP + height < innerHeight || box.top < height + GAP;
  card.style.left = `${clamp(box.left, GAP, document.documentElement.clientWidth - width - GAP)}px`;
  card.style.top = `${below ? box.bottom + GAP : box.top - GAP - height}px`;
}

export function hideCard() {
  $("card").hidden = true;
}
