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

SAMPLES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("Word by word, left to right", {"n": 4, "path": "blocks:1", "temperature": 0.7}),
    ("The surest words first, several at once (the default)", {"n": 3, "path": "bounded", "temperature": 0.7}),
    ("All words together", {"n": 3, "path": "uniform", "temperature": 0.7}),
)
BLANKS = ("And God said, Let there be ____: and there was light.", "And ____ went up to Jerusalem ____.")


class DemoVerb(Verb):
    """Options of ``scorelm demo``.

    Prints verses written in three orders and texts with their blanks filled in, and makes a film of the last verses for
    a browser.
    """

    less_memory: ClassVar[str] = TrainVerb.less_memory.replace("lower", "use scorelm train --recipe demo with lower")

    out: Path = Path("runs/demo")
    """Run directory to make."""
    overwrite: Overwrite = False
    minutes: PositiveFloat = 4.0
    """Training time."""
    device: Device = "auto"

    def run(self) -> int:
        """Train on the embedded corpus, then show what the model can do."""
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


def show_what_was_learned(out: Path, device: str) -> None:
    """Verses in three orders, texts with their blanks filled in, and a film."""
    from scorelm.viz.film import Film

    model, film_file = out / "model", out / "film.html"
    lm = open_model(model, device)
    film = Film(lm.tokenizer, norm=lm.norm, title=SAMPLES[-1][0])
    for title, settings in SAMPLES:
        show(f"\n{title}\n  scorelm sample {shlex.quote(str(model))} {flags(settings)}")
        for sample in lm.generate(**settings, watch=film):  # each starts the film over: the last one stays
            show(f"    {sample.text}")
    film.save(film_file)
    show(f"\nFilling in blanks\n  scorelm infill {shlex.quote(str(model))} 'TEXT WITH ____ BLANKS'")
    for text in BLANKS:
        show(f"    {text}\n    {lm.infill(text, temperature=0.8)[0].text}")
    show(
        f"\nA film of the last {SAMPLES[-1][1]['n']} verses, for a browser: {film_file}\n"
        f"The model is in {model}. Try:\n  scorelm sample {shlex.quote(str(model))} --prompt 'And God said'\n"
        f"  scorelm train --out {shlex.quote(str(out))} --resume --minutes 60   # go on training"
    )


def flags(settings: dict[str, Any]) -> str:
    """Settings as they are typed on the command line."""
    return " ".join(f"-{name} {value}" if len(name) == 1 else f"--{name} {value}" for name, value in settings.items())
