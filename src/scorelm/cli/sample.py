"""``scorelm sample``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import UseAppendAction, arg

from scorelm.cli.listing import generation_help
from scorelm.cli.model import Device, Model, open_model
from scorelm.cli.output import LESS_MEMORY, Output, answer, check, print_json, print_texts
from scorelm.cli.verb import Verb
from scorelm.config.generation import Continuation
from scorelm.errors import InputError, read_bounded

if TYPE_CHECKING:
    from scorelm.sampling.sample import Sample

MOST_BYTES = 1 << 26
"""Of a file of prompts."""


class SampleVerb(Verb):
    """Options of ``scorelm sample``.

    Prints each text on a line, or where texts have line feeds, as they are, with a line of three dashes between them.
    With --json and several prompts each text also has its prompt. A text is written by taking noise away from
    its tokens, in the order that --path names, by the rule that --solver names.
    """

    less_memory: ClassVar[str] = LESS_MEMORY

    model: Model = None
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """Words that a text begins with; give it again for further prompts. By default texts begin from nothing."""
    prompt_file: Path | None = None
    """File with a prompt on each line, by default none; those of --prompt come before them."""
    output: Annotated[Output, arg(name="")] = Output()
    device: Device = "auto"
    how: Annotated[Continuation, arg(name="")] = Continuation()

    def run(self) -> int:
        """Write texts and print them."""
        check(self.how, self.output)
        prompts = [*self.prompt, *([] if self.prompt_file is None else read_prompts(self.prompt_file))] or [""]
        from scorelm.parallel import launched

        with launched() as ranks:
            lm = open_model(self.model, self.device)
            answer(lm, ranks, self.how, self.output, prompts, lm.generate, partial(self.print_samples, prompts))
        return 0

    def print_samples(self, prompts: list[str], samples: list[Sample]) -> None:
        """The texts, or JSON, with the prompts where there are several."""
        if self.output.as_json:
            each = [prompt for prompt in prompts for _ in range(self.output.n)][: len(samples)]
            print_json(samples, **({"prompt": each} if len(prompts) > 1 else {}))
        else:
            print_texts([sample.text for sample in samples])

    @classmethod
    def more_help(cls) -> str:
        """The paths, solvers and halting criteria that there are."""
        return generation_help()


def read_prompts(path: Path) -> list[str]:
    """The lines of a file; an empty line is an empty prompt.

    Raises:
        InputError: the file cannot be read, is empty, too large, or not UTF-8; names it.
    """
    try:
        text = read_bounded(path, MOST_BYTES).decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte offset {error.start}): convert it, for example with iconv"
        ) from None
    except InputError as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if not text:
        raise InputError(f"{path} is empty: write a prompt on each line")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
