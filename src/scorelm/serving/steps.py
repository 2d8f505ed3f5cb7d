"""The records of a generation as JSON values, for a page that shows it while it happens."""

from __future__ import annotations

from typing import Any

from scorelm.sampling.denoise import StepRecord
from scorelm.text.tokenizer import Tokenizer
from scorelm.viz.film import round_values
from scorelm.viz.frames import Frame, first_frame, next_frame, spell


class Steps:
    """Turns the records of one request, in their order, into the states that a client is sent.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.spelled: dict[int, str] = {}
        """Tokens that were candidates, as they are shown."""
        self.frame: Frame | None = None

    def read(self, record: StepRecord) -> list[dict[str, Any]]:
        """The state after the step, and before the first one the state that it began from."""
        first = [] if self.frame else [self._state(first_frame(record, self.tokenizer))]
        self.frame = next_frame(self.frame or first_frame(record, self.tokenizer), record)
        return [*first, self._state(self.frame, record)]

    def _state(self, frame: Frame, record: StepRecord | None = None) -> dict[str, Any]:
        rows = []
        for b, length in enumerate(frame.length_B.tolist()):
            tokens = spell(self.tokenizer, frame.ids_BL[b, :length].tolist())
            row = {
                "nfe": int(frame.nfe_B[b]),
                "tokens": [{"text": token.text, "kind": token.kind} for token in tokens],
                "sigma": round_values(frame.sigma_BL[b, :length]),
                "certainty": round_values(frame.certainty_BL[b, :length]),
            }
            if record is not None and record.candidates is not None:
                row["candidates"] = self._candidates(record, b, length)
            rows.append(row)
        return {"step": frame.step, "rows": rows}

    def _candidates(self, record: StepRecord, b: int, length: int) -> list[list[tuple[str, float]]]:
        """The likeliest tokens and their probabilities where the step looked, nothing elsewhere."""
        found = record.candidates
        assert found is not None
        judged, ids, probability = (
            t[b, :length].tolist() for t in (found.judged_BL, found.ids_BLK, found.probability_BLK)
        )
        return [
            [(self._spell(token), float(f"{p:.3g}")) for token, p in zip(ids[k], probability[k], strict=True) if p > 0]
            if judged[k]
            else []
            for k in range(length)
        ]

    def _spell(self, token: int) -> str:
        """A token by itself."""
        if token not in self.spelled:
            self.spelled[token] = spell(self.tokenizer, [token])[0].text
        return self.spelled[token]
