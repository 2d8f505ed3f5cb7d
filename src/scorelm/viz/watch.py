"""Generation live in the terminal: every row's text on stderr, brighter the surer the model is of it.

Without a terminal nothing is shown, so that a pipe stays clean.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from scorelm.text.tokenizer import PAD, Tokenizer
from scorelm.viz.frames import Frame, Token, following, opening, spell

if TYPE_CHECKING:
    from scorelm.sampling.generate import StepRecord

SURE = 0.5
"""Confidence above which a guess is as bright as plain text."""


class Watch:
    """Shows a generation while it runs; a context manager, and the callback for ``watch``.

    >>> with Watch(lm.tokenizer) as watch:
    ...     lm.generate(n=4, watch=watch)

    Args:
        tokenizer: of the model.
        console: where to show it; stderr by default.
    """

    def __init__(self, tokenizer: Tokenizer, console: Console | None = None) -> None:
        self.tokenizer = tokenizer
        self.console = console or Console(stderr=True)
        self.live = Live(console=self.console, transient=True, redirect_stdout=False)
        self.first: Frame | None = None
        self.frame: Frame | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.stop()

    def __call__(self, record: StepRecord) -> None:
        """Show the state after a step."""
        if not self.live.is_started:
            return
        if self.frame is None or self.first is None or record.step == 1:
            self.first = self.frame = opening(record)
        self.frame = following(self.frame, record)
        self.live.update(view(self.first, self.frame, self.tokenizer))


def view(first: Frame, frame: Frame, tokenizer: Tokenizer) -> Group:
    """All rows as styled text up to the last token that has been judged, with a line of counts above them."""
    nfe = frame.nfe_B.tolist()
    counts = f"{min(nfe)}" if min(nfe) == max(nfe) else f"{min(nfe)} to {max(nfe)}"
    lines = [Text(f"step {frame.step}  NFE {counts}", style="dim")]
    for b, length in enumerate(frame.length_B.tolist()):
        n = 1 + int(np.flatnonzero(frame.ids_BL[b, :length] != PAD).max(initial=0))
        line = Text("• ", style="dim")
        state = (frame.sigma_BL[b, :n] == 0, first.sigma_BL[b, :n] == 0, frame.confidence_BL[b, :n])
        for token, *now in zip(spell(tokenizer, frame.ids_BL[b, :n].tolist()), *state, strict=True):
            line.append(token.text, style(token, *now))
        lines.append(line)
    return Group(*lines)


def style(token: Token, finished: bool, given: bool, confidence: float) -> str:
    """A style that suits light and dark terminals."""
    if token.kind in ("control", "blank"):
        return "not bold dim"
    if given:
        return "not dim underline"
    return "not dim bold" if finished else "not dim" if confidence >= SURE else "dim"
