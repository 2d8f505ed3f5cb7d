"""What ``sample`` and ``infill`` do alike: watch a request while it is answered, then print and film the texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PositiveInt
from tyro.conf import FlagCreatePairsOff, arg

from scorelm.cli.printing import show
from scorelm.config import Options, named
from scorelm.config.generation import Generation

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM
    from scorelm.parallel import Ranks
    from scorelm.sampling.sample import Sample

LESS_MEMORY = "lower -n, --best-of or the length of the texts, or use a smaller model"


class Output(Options):
    """How many texts, and where they go."""

    n: Annotated[PositiveInt, named("n", "-n")] = 4
    """Number of texts."""
    film: Path | None = None
    """Write a film of how the texts came about: .html (plays in a browser), .gif or .png."""
    watch: Annotated[bool, FlagCreatePairsOff] = False
    """Show in the terminal how the texts come about."""
    as_json: Annotated[bool, arg(name="json"), FlagCreatePairsOff] = False
    """Print a JSON list with the text, ids, seed and nfe (number of evaluations of the network) of each text."""


def check(how: Generation, output: Output) -> None:
    """Refuse, before a model is loaded, options that no model takes.

    Raises:
        InputError: an unknown path, solver or criterion, numbers that do not fit them, or no place for the film.
    """
    from scorelm.sampling.request import Settings
    from scorelm.viz.film import check_suffix

    Settings.of(how)
    if output.film is not None:
        check_suffix(output.film)


def answer(
    lm: ScoreLM, ranks: Ranks, how: Generation, output: Output, title: str, request: Callable[..., list[Sample]]
) -> None:
    """Answer a request `n` times, and print a line for each text, or JSON.

    Under torchrun each process writes its share of the texts; the main one shows its own while it writes, and prints
    them all.

    Args:
        lm: the model.
        ranks: the processes that share the work.
        how: the options of the request.
        output: how many texts, and where they go.
        title: of the film.
        request: called with n, the fields of `how` and `watch`.
    """
    from scorelm.viz.film import Film
    from scorelm.viz.watch import Watch

    film = None
    if output.film is not None:
        subtitle = f"{how.path or lm.objective.default_path}, {how.solver}, {how.steps} steps"
        film = Film(lm.tokenizer, norm=lm.norm, title=title, subtitle=subtitle)
    own = ranks.part(output.n)
    fields = how.model_dump() | {"seed": how.seed + own.start * how.best_of}
    with Watch(lm.tokenizer) if output.watch and ranks.main else nullcontext() as live:
        watchers: list[Callable[[Any], object]] = [watcher for watcher in (film, live) if watcher is not None]
        parts = ranks.gather(
            request(n=own.stop - own.start, watch=lambda record: [seen(record) for seen in watchers], **fields)
        )
    if not ranks.main:
        return
    try:
        if film is not None and output.film is not None:
            film.save(output.film)
    finally:
        print_samples([sample for part in parts for sample in part], output.as_json)


def print_samples(samples: list[Sample], as_json: bool) -> None:
    """A line for each text, or all that is known of them as a JSON list."""
    if as_json:
        facts = [{"text": s.text, "ids": s.ids, "seed": s.seed, "nfe": s.nfe} for s in samples]
        show(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        show("\n".join(sample.text for sample in samples))
