"""Templates: what is given and what is to be written, as one list of token ids with holes.

A given token is a position whose diffusion has completed (sigma 0); a hole is a free position. Prompts, infilling,
prefixes, suffixes and several blanks are all templates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from scorelm.text.tokenizer import BOS, EOS, Tokenizer
from scorelm.untrusted import brief

Template = list[int | None]
"""Token ids of a whole document, ``<s>`` first; None is a free position."""

BLANK = re.compile("_{4,}")


def draw_length(lengths: Sequence[int], at_least: int, rng: np.random.Generator) -> int:
    """Draw a document length from its histogram, given that it is `at_least` so much.

    Raises:
        ValueError: `at_least` is beyond the longest length.
    """
    longest = len(lengths) - 1
    if at_least > longest:
        raise ValueError(f"the text takes {at_least} tokens with its ends, the model was trained on at most {longest}")
    weights = np.asarray(lengths, dtype=np.float64)[at_least:]
    if not weights.sum() > 0:
        return at_least
    return at_least + int(rng.choice(len(weights), p=weights / weights.sum()))


def prompt_template(
    prompt: str,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    length: int | None,
    longest: int,
    closed: bool,
    rng: np.random.Generator,
) -> Template:
    """A document that starts with `prompt`.

    Args:
        prompt: may be empty.
        tokenizer: of the model.
        lengths: histogram of document lengths.
        length: length in tokens with both ends; drawn from the histogram when None.
        longest: most tokens with both ends; the length where the prompt is too long to draw one.
        closed: whether the length is fixed, ending in ``</s>``; otherwise all positions after the prompt are free.
        rng: for the length.

    Raises:
        ValueError: the prompt does not fit.
    """
    head: Template = [BOS, *tokenizer.encode(prompt)]
    if length is not None and not len(head) + 1 <= length <= longest:
        raise ValueError(
            f"length {length} does not fit: the prompt takes {len(head) + 1} tokens with its ends, "
            f"and at most {longest} can be written"
        )
    if len(head) >= longest:
        raise ValueError(f"the prompt takes {len(head) + 1} tokens with its ends, and at most {longest} can be written")
    if length is None and closed and len(head) + 2 <= min(longest, len(lengths) - 1):
        length = draw_length(lengths[: longest + 1], len(head) + 2, rng)
    free = (longest if length is None else length) - len(head)
    return head + [None] * (free - 1) + [EOS if closed else None]


def blank_template(
    text: str,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    blank_tokens: int | None,
    rng: np.random.Generator,
    needed: bool = True,
) -> Template:
    """A document with a run of free positions for every blank of four or more underscores.

    Args:
        text: text with blanks.
        tokenizer: of the model.
        lengths: histogram of document lengths.
        blank_tokens: tokens in each blank; when None, the document's length is drawn from the histogram and what is
            left shared out over the blanks at random.
        rng: for the lengths.
        needed: whether a text without a blank is refused.

    Raises:
        ValueError: no blank, or the text does not fit.
    """
    pieces = BLANK.split(text)
    if len(pieces) < 2 and needed:
        raise ValueError(f"no blank in {brief(repr(text))}: write ____ where text is to be filled in")
    if blank_tokens is not None and blank_tokens < 1:
        raise ValueError(f"a blank takes 1 token or more, got {blank_tokens}")
    first, *later = pieces
    given = [tokenizer.encode(first.strip()), *(tokenizer.encode_inside(piece.rstrip()) for piece in later)]
    blanks, fixed = len(pieces) - 1, sum(map(len, given)) + 2
    if not blanks:
        draw_length(lengths, fixed, rng)
        sizes = np.zeros(0, dtype=np.int64)
    elif blank_tokens is None:
        total = draw_length(lengths, fixed + blanks, rng)
        sizes = 1 + rng.multinomial(total - fixed - blanks, [1 / blanks] * blanks)
    else:
        sizes = np.full(blanks, blank_tokens)
        draw_length(lengths, fixed + blanks * blank_tokens, rng)
    template: Template = [BOS, *given[0]]
    for size, piece in zip(sizes, given[1:], strict=True):
        template += [None] * int(size) + list(piece)
    return [*template, EOS]
