"""Generation live in the terminal: every row's text on stderr, brighter where the model is surer of it.

Where stderr is not a terminal nothing is shown, so that a log stays clean.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from scorelm.text.tokenizer import Tokenizer
from scorelm.viz.frames import Frame, Token, first_frame, next_frame, spell

if TYPE_CHECKING:
    from scorelm.sampling.denoise import StepRecord

SURE = 0.5
"""Certainty above which a guess is as bright as plain text."""


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
            self.first = self.frame = first_frame(record, self.tokenizer)
        self.frame = next_frame(self.frame, record)
        self.live.update(render(self.first, self.frame, self.tokenizer))


def render(first: Frame, frame: Frame, tokenizer: Tokenizer) -> Group:
    """All rows as styled text up to the last token that the model has looked at, below a line of counts."""
    nfe = frame.nfe_B.tolist()
    counts = f"{min(nfe)}" if min(nfe) == max(nfe) else f"{min(nfe)} to {max(nfe)}"
    lines = [Text(f"step {frame.step}, {counts} evaluation{'s' * (counts != '1')} of the network", style="dim")]
    for b, length in enumerate(frame.length_B.tolist()):
        n = 1 + int(np.flatnonzero(frame.ids_BL[b, :length] != tokenizer.special.pad).max(initial=0))
        line = Text("• ", style="dim")
        state = (frame.sigma_BL[b, :n] == 0, first.sigma_BL[b, :n] == 0, frame.certainty_BL[b, :n])
        for token, *now in zip(spell(tokenizer, frame.ids_BL[b, :n].tolist()), *state, strict=True):
            line.append(token.text, choose_style(token, *now))
        lines.append(line)
    return Group(*lines)


def choose_style(token: Token, finished: bool, given: bool, certainty: float) -> str:
    """The style of a token, legible in light and dark terminals."""
    if token.kind in ("control", "blank"):
        return "not bold dim"
    if given:
        return "not dim underline"
    return "not dim bold" if finished else "not dim" if certainty >= SURE else "dim"
