"""What a model reads where its tokenizer changes a text, in a sentence for whoever typed it."""

from __future__ import annotations

from scorelm.errors import brief
from scorelm.text.normalization import NormalizingTokenizer, in_words
from scorelm.text.templates import split_blanks
from scorelm.text.tokenizer import Tokenizer


def say_reading(text: str, tokenizer: Tokenizer, sign: str | None = None) -> str | None:
    """What is read for a text, and why; None where that is the text itself, but for spaces.

    Args:
        text: a prompt, or a text with blanks.
        tokenizer: of the model.
        sign: how a blank is written; None where there are none.
    """
    parts = [text] if sign is None else split_blanks(text, sign)
    ids = [tokenizer.encode(parts[0]), *map(tokenizer.encode_inside, parts[1:])]
    found = [tokenizer.decode(part) for part in ids]
    if all(read.split() == part.split() for read, part in zip(found, parts, strict=True)):
        return None
    read, typed = " ____ ".join(part.strip() for part in found).strip(), text.replace(sign or "____", "____")
    said = f"the model reads {brief(repr(read))} for {brief(repr(typed))}"
    steps = tokenizer.steps if isinstance(tokenizer, NormalizingTokenizer) else ()
    return f"{said}: its text was put {in_words(steps)}" if steps else said
