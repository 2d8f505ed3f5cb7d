// What a run has shown so far: the tokens, noise and certainty of every text after every step.

import { clamp } from "./dom.js";

export class Recording {
  /** `norm` is that of an embedding; `vocabulary` is how many tokens there are. */
  constructor({ norm, vocab_size: vocabulary }) {
    Object.assign(this, { norm, unknown: Math.log(vocabulary), tokens: [], rows: [], steps: [], samples: null, looks: false });
    this.places = new Map();
  }

  /** The last step that there is; -1 before the first. */
  get last() {
    return this.steps.length - 1;
  }

  add({ step, rows }) {
    this.steps.push(step);
    rows.forEach((row, r) => {
      const kept = (this.rows[r] ??= { nfe: [], token: [], sigma: [], certainty: [], candidates: [], nats: [], size: 0 });
      this.looks ||= Boolean(row.candidates);
      kept.nfe.push(row.nfe);
      kept.token.push(row.tokens.map((token) => this.place(token)));
      kept.sigma.push(row.sigma);
      kept.certainty.push(row.certainty);
      kept.candidates.push(row.candidates ?? []);
      kept.size = Math.max(kept.size, row.sigma.length);
      kept.nats.push(this.doubts(kept, kept.nats.length));
    });
  }

  /** No more is to come; `samples` are the finished texts, null if there are none. */
  finish(samples) {
    this.samples = samples;
    for (const row of this.rows) {
      row.size = row.sigma.at(-1).length;
      row.nats = row.nats.map((_, k) => this.doubts(row, k));
    }
  }

  /** Uncertainty in nats of all open positions of a text together. */
  doubts({ certainty, sigma, size }, k) {
    return certainty[k].slice(0, size).reduce((sum, c, i) => sum + (sigma[k][i] === 0 ? 0 : this.doubt(c)), 0);
  }

  /** Uncertainty in nats; of a position that was never looked at, that of any token at all. */
  doubt(certainty) {
    return certainty > 0 ? -Math.log(certainty) : this.unknown;
  }

  /** How much of all there is to know about a position is known: 0 for any token at all, 1 for one token. */
  known(certainty) {
    return clamp(1 - this.doubt(certainty) / this.unknown, 0, 1);
  }

  /** The place of a token in the table; equal tokens share it. */
  place(token) {
    const key = `${token.kind} ${token.text}`;
    if (!this.places.has(key)) this.places.set(key, this.tokens.push({ text: token.text, kind: token.kind }) - 1);
    return this.places.get(key);
  }

  /** How many positions of a text there are to show at a step. */
  shown(r, k) {
    return Math.min(this.rows[r].size, this.rows[r].sigma[k].length);
  }

  /** All that is known of a position after a step; of a finished one, candidates are those it was chosen from. */
  look(r, k, i) {
    const row = this.rows[r];
    const finished = row.sigma[k][i] === 0;
    let at = k;
    while (finished && at > 0 && row.sigma[at - 1][i] === 0) at -= 1;
    return {
      token: this.tokens[row.token[k][i]],
      sigma: row.sigma[k][i],
      certainty: row.certainty[k][i],
      finished,
      given: finished && at === 0,
      candidates: row.candidates[at]?.[i] ?? [],
      step: this.steps[at],
      kept: this.looks,
    };
  }
}
