"""``scorelm demo``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveFloat

from scorelm.cli.model import Device, open_model
from scorelm.cli.printing import show
from scorelm.cli.train import Overwrite, TrainVerb
from scorelm.cli.verb import Verb
from scorelm.config.recipe import Recipe
from scorelm.config.toml import load_recipe
from scorelm.errors import InputError, exists

VERSES: dict[str, Any] = {"n": 3}
SUREST: dict[str, Any] = {"path": "bounded"}
BLANK = "And God said, Let there be ____: and there was light."


class DemoVerb(Verb):
    """Options of ``scorelm demo``.

    First the model that comes with scorelm writes verses and fills in a blank, with a film of each for a browser. Then
    a model of your own is trained, and what it writes is shown as it gets better.
    """

    less_memory: ClassVar[str] = TrainVerb.less_memory.replace("lower", "use scorelm train --recipe demo with lower")

    out: Path = Path("runs/demo")
    """Run directory to make."""
    overwrite: Overwrite = False
    minutes: PositiveFloat = 4.0
    """Training time."""
    device: Device = "auto"

    def run(self) -> int:
        """Show what the embedded model can do, then train one on the embedded corpus.

        Raises:
            InputError: there is a run already, or a film of one.
        """
        from scorelm.training.run import check_free

        check_free(self.out, self.overwrite)
        verses, blank = (self.out.with_name(f"{self.out.name}-{name}.html") for name in ("verses", "blank"))
        for film in (verses, blank):
            if exists(film) and not self.overwrite:
                raise InputError(f"{film} exists: add --overwrite to replace it, or choose another --out")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        show_what_comes_along(verses, blank, self.device)
        show(f"\nNow a small model learns the same text from the beginning, for {self.minutes:g} minutes.\n")
        recipe = demo_recipe(self.minutes, self.device)
        code = TrainVerb(out=self.out, options=recipe, overwrite=self.overwrite).run()
        if code == 0:
            show_what_was_learned(self.out, self.device)
        return code


def demo_recipe(minutes: float, device: str) -> Recipe:
    """The recipe of the demo."""
    recipe = load_recipe("demo")
    changes = {"minutes": minutes, "device": device}
    return recipe.model_copy(update={"training": recipe.training.model_copy(update=changes)})


def show_what_comes_along(verses: Path, blank: Path, device: str) -> None:
    """Verses and a filled blank of the embedded model, with films of what is not written from left to right."""
    from scorelm.viz.film import Film

    lm = open_model(None, device)
    show(f"The model that comes with scorelm writes verses, from left to right:\n  scorelm sample {flags(VERSES)}")
    for sample in lm.generate(**VERSES):
        show(f"    {sample.text}")
    command = f"scorelm sample {flags(VERSES | SUREST)}"
    film = Film(lm.tokenizer, norm=lm.norm, title="Verses, the surest words first", subtitle=command)
    show(f"The same model, the surest words first:\n  {command}")
    for sample in lm.generate(**VERSES, **SUREST, watch=film):
        show(f"    {sample.text}")
    film.save(verses)
    command = f"scorelm infill {shlex.quote(BLANK)} -n 3"
    film = Film(lm.tokenizer, norm=lm.norm, title="A blank filled in", subtitle=command)
    show(f"It fills in blanks:\n  {command}")
    for sample in lm.infill(BLANK, n=3, watch=film):
        show(f"    {sample.text}")
    film.save(blank)
    show(f"Films of these two, for a browser: {verses} and {blank}")


def show_what_was_learned(out: Path, device: str) -> None:
    """Verses of the model that was trained, and what to do next."""
    model = out / "model"
    show(f"\nYour own model, after all of that:\n  scorelm sample {shlex.quote(str(model))} {flags(VERSES)}")
    for sample in open_model(model, device).generate(**VERSES):
        show(f"    {sample.text}")
    show(
        f"\nTo let it learn for an hour more:\n  scorelm train --out {shlex.quote(str(out))} --resume --minutes 60"
        "\nTo see what a model of a text of your own would be, and to train it:"
        "\n  scorelm info my.txt\n  scorelm train --data my.txt --out runs/mine"
    )


def flags(settings: dict[str, Any]) -> str:
    """Settings as they are typed on the command line."""
    return " ".join(f"-{name} {value}" if len(name) == 1 else f"--{name} {value}" for name, value in settings.items())
