"""Frames of a film: the token at every position after a step, how noisy it is, and how sure the model is of it.

Films, stills and the live view in the terminal are all drawn from these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scorelm.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from scorelm.sampling.denoise import StepRecord

Array = NDArray[Any]
Kind = Literal["word", "control", "byte", "blank"]

BYTE = re.compile("<0x([0-9A-F]{2})>")
"""How `Tokenizer.pieces` writes a byte that is only part of a character."""
PICTURES = {
    **{code: chr(0x2400 + code) for code in range(32)},
    **dict.fromkeys(range(0x7F, 0xA0), "\ufffd"),
    ord("\t"): "⇥",
    ord("\n"): "↵",
    ord("▁"): " ",
}
"""What is shown for characters that would move the cursor of a terminal or break a line."""


class Token(NamedTuple):
    """A token as it is shown."""

    text: str
    """Empty for the later bytes of a character that is spelled in bytes."""
    kind: Kind
    """``control`` is ``<s>``, ``</s>`` or ``<unk>``; ``byte`` is part of a character; ``blank`` is not written yet."""


@dataclass(frozen=True)
class Frame:
    """The state after a step; arrays are [B, L], or [B] where a row has one number."""

    step: int
    ids_BL: Array
    """``<pad>`` where the model has not looked yet."""
    sigma_BL: Array
    """Noise level: 0 where given or finished, inf where nothing is known yet."""
    certainty_BL: Array
    """exp(-entropy): 1 where given or finished, 0 where the model has not looked yet, at a blank or a doubted token."""
    length_B: Array
    nfe_B: Array
    """Evaluations of the network that each row has taken part in."""


def first_frame(record: StepRecord, tokenizer: Tokenizer) -> Frame:
    """The state before the first step, from the record of that step: what was given or doubted, and blanks."""
    sigma_BL, ids_BL = (t.numpy() for t in record.before)
    return Frame(
        record.step - 1,
        np.where(np.isfinite(sigma_BL), ids_BL, tokenizer.special.pad).astype(np.int32),
        sigma_BL.astype(np.float32),
        (sigma_BL == 0).astype(np.float16),
        record.length_B.numpy().astype(np.int32),
        np.zeros(len(sigma_BL), np.int32),
    )


def next_frame(previous: Frame, record: StepRecord) -> Frame:
    """The state after a step; positions that it made no posterior for keep their certainty."""
    sigma_BL, entropy_BL = record.sigma_BL.numpy(), record.entropy_BL.numpy()
    certainty_BL = np.where(find_unjudged(record), previous.certainty_BL, np.exp(-entropy_BL))
    return Frame(
        record.step,
        record.ids_BL.numpy().astype(np.int32),
        sigma_BL.astype(np.float32),
        np.where(sigma_BL == 0, 1, certainty_BL).astype(np.float16),
        record.length_B.numpy().astype(np.int32),
        record.nfe_B.numpy().astype(np.int32),
    )


def find_unjudged(record: StepRecord) -> Array:
    """Positions that the step made no posterior for, [B, L]: a new posterior has entropy, or moves x0 by its norm."""
    unjudged_BL: Array = (record.entropy_BL.numpy() == 0) & (record.change_BL.numpy() == 0)
    return unjudged_BL


@dataclass(frozen=True)
class Row:
    """One row from the first frame to the last: K frames of the N positions that it ended with."""

    tokens: list[list[Token]]
    ids_KN: Array
    sigma_KN: Array
    certainty_KN: Array
    nfe_K: Array

    @property
    def given_N(self) -> Array:
        """Positions that were given."""
        given_N: Array = self.sigma_KN[0] == 0
        return given_N

    def signal_KN(self, norm: float) -> Array:
        """How much of an embedding of this norm stands out: 0 at sigma inf, 1/2 at sigma = norm, 1 at sigma 0."""
        signal_KN: Array = norm / (norm + self.sigma_KN)
        return signal_KN


def split_rows(frames: Sequence[Frame], tokenizer: Tokenizer) -> list[Row]:
    """The frames of every row by itself, cut to its final length; no rows without frames."""
    rows = []
    for b, n in enumerate(frames[-1].length_B.tolist() if frames else []):
        ids, sigma, certainty = (
            np.stack([getattr(frame, name)[b, :n] for frame in frames])
            for name in ("ids_BL", "sigma_BL", "certainty_BL")
        )
        nfe_K = np.stack([frame.nfe_B[b] for frame in frames])
        rows.append(Row([spell(tokenizer, ids_N.tolist()) for ids_N in ids], ids, sigma, certainty, nfe_K))
    return rows


def spell(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Token]:
    """Every token as it is shown; a character that several tokens spell is shown at the first of them."""
    special = tokenizer.special
    pieces = tokenizer.pieces(ids)
    tokens: list[Token] = []
    while (at := len(tokens)) < len(pieces):
        if ids[at] == special.pad:
            tokens.append(Token(" ·", "blank"))
        elif ids[at] in (special.bos, special.eos, special.unk):
            tokens.append(Token(" ⁇ " if ids[at] == special.unk else pieces[at], "control"))
        elif BYTE.search(pieces[at]):
            tokens += spell_bytes(pieces[at : at + 4])
        else:
            tokens.append(Token(pieces[at].translate(PICTURES), "word"))
    return tokens


def spell_bytes(pieces: Sequence[str]) -> list[Token]:
    """The text of as many pieces as make up whole characters, with an empty token for each but the first of them.

    Or, where no number of them does, the first piece with its bytes in hexadecimal.
    """
    spelled = b""
    for count, piece in enumerate(pieces):
        parts = BYTE.split(piece)  # text and bytes, in turn
        spelled += b"".join(bytes.fromhex(part) if k % 2 else part.encode() for k, part in enumerate(parts))
        with suppress(UnicodeDecodeError):
            return [Token(spelled.decode().translate(PICTURES), "word"), *[Token("", "word")] * count]
    return [Token(BYTE.sub(r"⟨\1⟩", pieces[0]).translate(PICTURES), "byte")]
