"""Templates: what is given and what is to be written, as one list of token ids with holes.

A given token is a position at noise level 0; a hole is a free position. Prompts, infilling, prefixes, suffixes and
several blanks are all templates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from scorelm.errors import InputError, brief
from scorelm.text.tokenizer import Tokenizer

Template = list[int | None]
"""Token ids of a whole document, beginning with ``<s>``; None is a free position."""

BLANK = re.compile("_{4,}")
"""What stands for a blank in a text to be filled in."""


def draw_length(lengths: Sequence[int], at_least: int, rng: np.random.Generator) -> int:
    """Draw the length of a document in tokens, from the lengths that are not shorter than `at_least`.

    Args:
        lengths: how many documents have each length, from 0 on.
        at_least: the shortest length to draw, and the result where no document is that long.
        rng: draws it.

    Raises:
        InputError: `at_least` is beyond the longest length.
    """
    longest = len(lengths) - 1
    if at_least > longest:
        raise InputError(
            f"the text takes {at_least} tokens, <s> and </s> included, but the model was trained on at most {longest}"
        )
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
        lengths: how many documents have each length, from 0 on.
        length: tokens in the document, ``<s>`` and ``</s>`` included; drawn from `lengths` when None.
        longest: most tokens that can be written, and the length where the prompt is too long for one to be drawn.
        closed: whether the document ends in ``</s>`` at that length; otherwise all positions after the prompt are free.
        rng: draws the length.

    Raises:
        InputError: the prompt does not fit.
    """
    head: Template = [tokenizer.special.bos, *tokenizer.encode(prompt)]
    taken = f"the prompt takes {len(head) + 1} tokens, <s> and </s> included, and at most {longest} can be written"
    if length is not None and not len(head) + 1 <= length <= longest:
        raise InputError(f"length {length} does not fit: {taken}")
    if len(head) >= longest:
        raise InputError(taken)
    if length is None and closed and len(head) + 2 <= min(longest, len(lengths) - 1):
        length = draw_length(lengths[: longest + 1], len(head) + 2, rng)
    free = (longest if length is None else length) - len(head)
    return head + [None] * (free - 1) + [tokenizer.special.eos if closed else None]


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
        lengths: how many documents have each length, from 0 on.
        blank_tokens: tokens in each blank; when None, the document's length is drawn from `lengths`, and the tokens
            that are not given are shared out among the blanks at random, at least one to each.
        rng: draws the lengths.
        needed: whether a text without a blank is refused.

    Raises:
        InputError: there is no blank, or the text does not fit.
    """
    pieces = BLANK.split(text)
    if len(pieces) < 2 and needed:
        raise InputError(f"no blank in {brief(repr(text))}: write ____ where text is to be filled in")
    if blank_tokens is not None and blank_tokens < 1:
        raise InputError(f"a blank takes at least 1 token, not {blank_tokens}")
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
    template: Template = [tokenizer.special.bos, *given[0]]
    for size, piece in zip(sizes, given[1:], strict=True):
        template += [None] * int(size) + list(piece)
    return [*template, tokenizer.special.eos]
