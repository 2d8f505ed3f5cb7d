"""Templates: what is given and what is to be written, as one list of token ids with holes.

A given token is a position at noise level 0; a hole is a free position. Prompts, infilling, prefixes, suffixes and
several blanks are all templates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from scorelm.config.generation import Infilling
from scorelm.errors import InputError, brief
from scorelm.text.tokenizer import Tokenizer


class Hole(Enum):
    """What may be written at a free position, where not every token may; values are rows of `tokens_for`."""

    SPACE = 1
    """A token that begins with a space."""
    WORD = 2
    """A token that begins with a space, followed by letters or digits only."""
    REST = 3
    """A token of letters or digits only: the rest of a word, or a word that no space stands before."""


Template = list[int | Hole | None]
"""Token ids of a whole document, beginning with ``<s>``; None is a free position, a `Hole` one with a condition."""


@dataclass(frozen=True)
class Draft:
    """A document to be completed."""

    template: Template
    given: Sequence[str] = ()
    """Text before, between and behind the blanks, as it was written; none where the text is what the ids decode to."""
    blanks: Sequence[slice] = ()
    """Where the blanks are in the template."""

    def read(self, ids: Sequence[int], tokenizer: Tokenizer) -> tuple[str, list[tuple[int, int]]]:
        """The completed text, in which what was given is as it was, and the (start, end) of what was filled in.

        Args:
            ids: of the whole document.
            tokenizer: that the template was made with.
        """
        if not self.given:
            return tokenizer.decode(ids), []
        text, spans = self.given[0], []
        for blank, behind in zip(self.blanks, self.given[1:], strict=True):
            before = tokenizer.decode(ids[: blank.start])
            filled = tokenizer.decode(ids[: blank.stop])[len(before) :]
            if text and self.template[blank.start] in (Hole.SPACE, Hole.WORD):
                filled = filled.removeprefix(" ")  # the given text has it, or is to have none
            spans.append((len(text), len(text) + len(filled)))
            text += filled + behind
        return text, spans


def tokens_for(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Which tokens may be written where: rows by the value of `Hole`, row 0 for any token, [4, V]."""
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    allowed = np.ones((1 + len(Hole), len(pieces)), dtype=np.bool_)
    allowed[Hole.SPACE.value] = [piece.startswith("▁") for piece in pieces]
    allowed[Hole.REST.value] = [is_wordlike(piece) for piece in pieces]
    allowed[Hole.WORD.value] = [piece.startswith("▁") and is_wordlike(piece[1:]) for piece in pieces]
    return allowed


def is_wordlike(text: str) -> bool:
    """Whether a text is letters, their marks and digits only, at least one of them."""
    return bool(text) and all(unicodedata.category(c)[0] in "LMN" for c in text)


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


def leaves_space(text: str, tokenizer: Tokenizer) -> bool:
    """Whether a space at the end of a text is left to the word behind it, as the tokenizer has it in a whole text.

    It is not at the end of an indentation that is one token.
    """
    if not text.endswith(" "):
        return False
    pieces = tokenizer.pieces(tokenizer.encode(f"{text}a"))
    last = next((piece for piece in reversed(pieces) if piece.startswith("▁")), "▁▁")
    return not last.startswith("▁▁")


def prompt_text(prompt: str, tokenizer: Tokenizer) -> str:
    """What of a prompt is given as it is: all but a space at its end that is part of the word behind it."""
    return prompt[:-1] if prompt != " " and leaves_space(prompt, tokenizer) else prompt


def prompt_template(
    prompt: str | Sequence[int],
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    length: int | None,
    longest: int,
    closed: bool,
    rng: np.random.Generator,
) -> Template:
    """A document that starts with `prompt`.

    Args:
        prompt: a text, or the ids of its tokens; may be empty. Of a text, `prompt_text` is given; where that leaves a
            space out, the next token begins with one.
        tokenizer: of the model.
        lengths: how many documents have each length, from 0 on.
        length: tokens in the document, ``<s>`` and ``</s>`` included; drawn from `lengths` when None.
        longest: most tokens that can be written, and the length where the prompt is too long for one to be drawn.
        closed: whether the document ends in ``</s>`` at that length; otherwise all positions after the prompt are free.
        rng: draws the length.

    Raises:
        InputError: the prompt does not fit.
    """
    kept = prompt_text(prompt, tokenizer) if isinstance(prompt, str) else prompt
    ids = tokenizer.encode(kept) if isinstance(kept, str) else kept
    head: Template = [tokenizer.special.bos, *ids]
    taken = f"the prompt takes {len(head) + 1} tokens, <s> and </s> included, and at most {longest} can be written"
    if length is not None and not len(head) + 1 <= length <= longest:
        raise InputError(f"length {length} does not fit: {taken}")
    if len(head) >= longest:
        raise InputError(taken)
    if length is None and closed and len(head) + 2 <= min(longest, len(lengths) - 1):
        length = draw_length(lengths[: longest + 1], len(head) + 2, rng)
    free = (longest if length is None else length) - len(head)
    hole: Template = [None if kept == prompt else Hole.SPACE]
    return head + (hole + [None] * (free - 1))[: free - closed] + [tokenizer.special.eos] * closed


def split_blanks(text: str, sign: str) -> list[str]:
    """The text before, between and behind its blanks.

    Four underscores or more are one blank, and so are other signs that touch. A backslash before a sign makes it text.
    """
    blank = "_{4,}" if sign == Infilling().blank else f"(?:{re.escape(sign)})+"
    pieces, end = [""], 0
    for found in re.finditer(rf"(\\?)({blank})", text):
        pieces[-1] += text[end : found.start()] + (found[2] if found[1] else "")
        pieces += [] if found[1] else [""]
        end = found.end()
    pieces[-1] += text[end:]
    return pieces


def blank_draft(
    text: str,
    tokenizer: Tokenizer,
    spaces: bool,
    words: bool,
    lengths: Sequence[int],
    request: Infilling,
    rng: np.random.Generator,
) -> Draft:
    """A document with a run of free positions for every blank.

    Args:
        text: text with blanks; only a repair does without.
        tokenizer: of the model.
        spaces: whether it has tokens that begin with a space; one before a blank is then left to its first token.
        words: whether it has tokens to make words of; a blank then has one to three unless the request says otherwise.
        lengths: how many documents have each length, from 0 on.
        request: says what a blank looks like and how long it is.
        rng: draws the lengths.

    Raises:
        InputError: there is no blank, or the text does not fit.
    """
    given = split_blanks(text, request.blank)
    if len(given) == 1 and request.repair is None:
        raise InputError(f"no blank in {brief(repr(text))}: write {request.blank} where text is to be filled in")
    parts, firsts = encode_given(given, tokenizer, spaces)
    fixed = sum(map(len, parts)) + 2
    counts: list[int] | None = None
    if request.blank_words is not None:
        counts = [request.blank_words] * len(firsts)
    elif words and request.blank_tokens is None and request.repair is None:
        counts = draw_counts(len(firsts), fixed, lengths, rng)
    if counts is None:
        sizes = share_out(len(firsts), fixed, lengths, request.blank_tokens, rng)
        runs: list[Template] = [[first, *[None] * (size - 1)] for first, size in zip(firsts, sizes, strict=True)]
    else:
        runs = draw_words(given, firsts, counts, fixed, tokenizer, lengths, rng)
    template: Template = [tokenizer.special.bos, *parts[0]]
    places = []
    for run, part in zip(runs, parts[1:], strict=True):
        places.append(slice(len(template), len(template) + len(run)))
        template += [*run, *part]
    template.append(tokenizer.special.eos)
    return Draft(template, given, places) if request.repair is None else Draft(template)


def encode_given(given: Sequence[str], tokenizer: Tokenizer, spaces: bool) -> tuple[list[list[int]], list[Hole | None]]:
    """Token ids of the text around blanks, and the condition on the first token of each blank.

    Where a blank begins the text, its first token has the space that every text's first token has and no one sees; and
    so it is behind signs, where the tokenizer puts a space between all words and signs.
    """
    space = tokenizer.encode_inside(" ")
    unseen = not tokenizer.decode(space)
    spaced = [spaces and leaves_space(piece, tokenizer) for piece in given[:-1]]
    kept = [piece[:-1] if space else piece for piece, space in zip(given, [*spaced, False], strict=True)]
    parts = [tokenizer.encode(kept[0]), *map(tokenizer.encode_inside, kept[1:])]
    if spaced and spaces and unseen and kept[0] == "":
        if given[0]:
            parts[0] = space
        spaced[0] = True
    apart = [
        spaces and bool(text) and tokenizer.pieces(tokenizer.encode(f"{text}a"))[-1:] == ["▁a"] for text in kept[:-1]
    ]
    spaced = [space or always for space, always in zip(spaced, apart, strict=True)]
    return parts, [Hole.SPACE if space else None for space in spaced]


def share_out(blanks: int, fixed: int, lengths: Sequence[int], each: int | None, rng: np.random.Generator) -> list[int]:
    """How many tokens each blank has, in a document with `fixed` given ones.

    These are `each`; or else the document's length is drawn from `lengths`, and what is not given is shared out at
    random, at least one token for each blank.

    Raises:
        InputError: they do not fit.
    """
    total = draw_length(lengths, fixed + blanks * (each or 1), rng)
    if each is not None or not blanks:
        return [each or 0] * blanks
    return [1 + int(more) for more in rng.multinomial(total - fixed - blanks, [1 / blanks] * blanks)]


def draw_counts(blanks: int, fixed: int, lengths: Sequence[int], rng: np.random.Generator) -> list[int]:
    """How many words each blank has: one, two or three, but one where more might not fit."""
    most = 3 if fixed + 6 * blanks < len(lengths) else 1
    return [int(count) for count in rng.integers(1, most + 1, blanks)]


def draw_words(
    given: Sequence[str],
    firsts: Sequence[Hole | None],
    words: Sequence[int],
    fixed: int,
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    rng: np.random.Generator,
) -> list[Template]:
    """Holes for so many words in each blank, every word as long in tokens as most of the given words.

    Longer ones, drawn before anything is known of the words, would have the model make up words to fit. Where words of
    that length do not fit, or none are given, every word is one token.

    Raises:
        InputError: not even these fit.
    """
    draw_length(lengths, fixed + sum(words), rng)
    own = [len(tokenizer.encode(word)) for word in re.findall(r"[^\W_]+", " ".join(given))]
    usual = int(np.median(own or [1]))
    size = usual if fixed + usual * sum(words) < len(lengths) else 1
    runs: list[Template] = []
    for first, count in zip(firsts, words, strict=True):
        run = [Hole.WORD, *[Hole.REST] * (size - 1)] * count
        runs.append([Hole.WORD if first else Hole.REST, *run[1:]])
    return runs
