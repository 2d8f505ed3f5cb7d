"""``scorelm infill``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar

from tyro.conf import Positional, arg

from scorelm.cli.listing import generation_help
from scorelm.cli.model import DEFAULT_MODEL, Device, open_model
from scorelm.cli.output import LESS_MEMORY, Output, answer, check
from scorelm.cli.verb import Verb
from scorelm.config.generation import Infilling
from scorelm.errors import InputError


class InfillVerb(Verb):
    """Options of ``scorelm infill``.

    Each blank is written as four underscores: scorelm infill "Let there be ____: and there was ____." With --repair
    every word is doubted and written anew, and the text needs no blank.
    """

    less_memory: ClassVar[str] = LESS_MEMORY

    words: Annotated[tuple[str, ...], Positional, arg(metavar="[MODEL] TEXT")]
    """Model directory, run directory, or name on the Hugging Face hub (runs/demo/model if left out); then the text with
    its blanks, in quotes."""
    output: Annotated[Output, arg(name="")] = Output()
    device: Device = "auto"
    how: Annotated[Infilling, arg(name="")] = Infilling()

    def run(self) -> int:
        """Fill in the blanks and print the texts."""
        if len(self.words) not in (1, 2):
            raise InputError(f"give [MODEL] and one text in quotes, not {len(self.words)} words")
        check(self.how, self.output)
        from scorelm.parallel import launched

        text = self.words[-1]
        with launched() as ranks:
            lm = open_model(Path(self.words[0]) if len(self.words) == 2 else DEFAULT_MODEL, self.device)
            answer(lm, ranks, self.how, self.output, text, lambda **options: lm.infill(text, **options))
        return 0

    @classmethod
    def more_help(cls) -> str:
        """The paths, solvers and halting criteria that there are."""
        return generation_help()
