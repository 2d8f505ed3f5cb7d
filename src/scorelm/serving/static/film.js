// A run as a film: one page that plays anywhere, in the format of scorelm's own films.

import { getFilmPage } from "./api.js";
import { download } from "./dom.js";

const PLACE = "{{data}}";

export async function saveFilm(recording, title, subtitle) {
  const [before, after] = (await getFilmPage()).split(PLACE);
  const data = JSON.stringify(filmData(recording, title, subtitle));
  const escaped = data.replace(/[<>&]/g, (sign) => `\\u${sign.charCodeAt(0).toString(16).padStart(4, "0")}`);
  download("scorelm-film.html", before + escaped + after);
}

function filmData({ norm, steps, tokens, rows }, title, subtitle) {
  const cut = (row, name) => row[name].map((values) => values.slice(0, row.size));
  return {
    title, subtitle, norm, steps, tokens,
    rows: rows.map((row) => ({
      given: row.sigma[0].slice(0, row.size).map((sigma) => sigma === 0),
      nfe: row.nfe,
      token: cut(row, "token"), sigma: cut(row, "sigma"), certainty: cut(row, "certainty"),
    })),
  };
}
