"""``scorelm sample``."""

from __future__ import annotations

from typing import Annotated, ClassVar

from tyro.conf import arg

from scorelm.cli.listing import generation_help
from scorelm.cli.model import DEFAULT_MODEL, Device, Model, open_model
from scorelm.cli.output import LESS_MEMORY, Output, answer, check
from scorelm.cli.verb import Verb
from scorelm.config.generation import Continuation


class SampleVerb(Verb):
    """Options of ``scorelm sample``.

    Prints each text on a line. A text is written by taking noise away from all of its tokens, in the order that --path
    names, by the rule that --solver names.
    """

    less_memory: ClassVar[str] = LESS_MEMORY

    model: Model = DEFAULT_MODEL
    prompt: str = ""
    """Words that every text begins with."""
    output: Annotated[Output, arg(name="")] = Output()
    device: Device = "auto"
    how: Annotated[Continuation, arg(name="")] = Continuation()

    def run(self) -> int:
        """Write texts and print them."""
        check(self.how, self.output)
        from scorelm.parallel import launched

        with launched() as ranks:
            lm = open_model(self.model, self.device)
            title = self.prompt or "From nothing"
            answer(lm, ranks, self.how, self.output, title, lambda **options: lm.generate([self.prompt], **options))
        return 0

    @classmethod
    def more_help(cls) -> str:
        """The paths, solvers and halting criteria that there are."""
        return generation_help()
