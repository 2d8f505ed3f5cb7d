"""``scorelm infill``."""

from __future__ import annotations

from os.path import isdir
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import FlagCreatePairsOff, Positional, arg

from scorelm.cli.listing import generation_help
from scorelm.cli.model import Device, open_model
from scorelm.cli.output import LESS_MEMORY, Output, answer, check, print_json, print_texts
from scorelm.cli.printing import tell
from scorelm.cli.verb import Verb
from scorelm.config.generation import Infilling
from scorelm.errors import InputError

if TYPE_CHECKING:
    from scorelm.sampling.sample import Sample


class InfillVerb(Verb):
    """Options of ``scorelm infill``.

    Each blank is written as four underscores: scorelm infill "Let there be ____: and there was ____." All else comes
    back as it was given. With --repair every word is doubted and written anew, and the text needs no blank. Prints each
    text on a line, or where it has line feeds, as it is, with a line of three dashes between texts. With --json each
    text also has its spans: where its blanks were, as first character and the one after the last, counted from 0.
    """

    less_memory: ClassVar[str] = LESS_MEMORY

    words: Annotated[tuple[str, ...], Positional, arg(metavar="[MODEL] TEXT")]
    """Model directory, run directory, or name on the Hugging Face hub (if left out, the model that comes with scorelm);
    then the text with its blanks, in quotes."""
    mark: Annotated[bool, FlagCreatePairsOff] = False
    """Put what was filled in between [ and ] in what is printed; with --json the text stays as it is."""
    output: Annotated[Output, arg(name="")] = Output()
    device: Device = "auto"
    how: Annotated[Infilling, arg(name="")] = Infilling()

    def run(self) -> int:
        """Fill in the blanks and print the texts."""
        if len(self.words) not in (1, 2):
            raise InputError(f"give [MODEL] and one text in quotes, not {len(self.words)} words")
        if len(self.words) == 1 and isdir(self.words[0]):
            raise InputError(f"{self.words[0]} is a directory: give a text too, in quotes")
        if self.mark and self.how.repair is not None:
            raise InputError(
                "a repair writes everything anew, so there is nothing to mark: leave out --mark or --repair"
            )
        check(self.how, self.output)
        from scorelm.parallel import launched

        with launched() as ranks:
            lm = open_model(Path(self.words[0]) if len(self.words) == 2 else None, self.device)
            answer(lm, ranks, self.how, self.output, [self.words[-1]], lm.infill, self.print_samples)
            if ranks.main and (self.how.blank_words, self.how.blank_tokens, self.how.repair) == (None, None, None):
                tell("for longer or shorter blanks: --blank-words N or --blank-tokens N")
        return 0

    def print_samples(self, samples: list[Sample]) -> None:
        """The texts, marked if asked for, or JSON."""
        if self.output.as_json:
            print_json(samples, spans=[sample.spans for sample in samples])
        else:
            print_texts([mark(sample) if self.mark else sample.text for sample in samples])

    @classmethod
    def more_help(cls) -> str:
        """The paths, solvers and halting criteria that there are."""
        return generation_help()


def mark(sample: Sample) -> str:
    """The text with what was filled in between brackets."""
    text = sample.text
    for start, end in reversed(sample.spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return text
