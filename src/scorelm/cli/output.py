"""What ``sample`` and ``infill`` do alike: show a request while it is answered, film it, and print the texts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PositiveInt
from tyro.conf import FlagCreatePairsOff, arg

from scorelm.cli.printing import show, tell
from scorelm.config import Options, named
from scorelm.config.generation import Continuation, Generation, Infilling

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM
    from scorelm.parallel import Ranks
    from scorelm.sampling.sample import Sample
    from scorelm.viz.film import Film

LESS_MEMORY = "lower -n, --best-of or the length of the texts, or use a smaller model"
PART, PART_ON_GPU = 64, 1024
"""Texts that are written together: if Ctrl-C comes, those before them are printed. A film shows texts of one part."""
MOST_SAID = 3
"""Texts that are read otherwise than they were given, of which it is said one by one."""


class Output(Options):
    """How many texts, and where they go."""

    n: Annotated[PositiveInt, named("n", "-n")] = 4
    """Number of texts, for each prompt if there are several."""
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
    lm: ScoreLM,
    ranks: Ranks,
    how: Continuation | Infilling,
    output: Output,
    texts: Sequence[str],
    write: Callable[..., list[Sample]],
    print_samples: Callable[[list[Sample]], object],
) -> None:
    """Answer a request, `output.n` times for each text in order, and print the answers.

    Under torchrun each process writes its share of them; the main one shows and films its own while it writes.

    Args:
        lm: the model.
        ranks: the processes that share the work.
        how: the options of the request.
        output: how many answers, and where the film goes.
        texts: to be continued or filled in.
        write: `lm.generate` or `lm.infill`.
        print_samples: called with all answers, on the main process.
    """
    from scorelm.viz.progress import progress
    from scorelm.viz.watch import Watch

    if ranks.main:
        say_what_is_read(lm, texts, how)
    rows = [text for text in texts for _ in range(output.n)]
    own, title = ranks.part(len(rows)), f"writing {len(rows):,} text{'s' * (len(rows) != 1)}"
    film = None if output.film is None else make_film(lm, how, texts)
    lm.plan(rows[own], 1, how)  # refuses what does not fit before anything is written
    size = len(rows) if film is not None else PART if lm.device.type == "cpu" else PART_ON_GPU
    made: list[Sample] = []
    try:
        with (
            Watch(lm.tokenizer) if output.watch and ranks.main else nullcontext() as live,
            progress(title, ranks.main and not (live and live.console.is_terminal)) as tell_share,
        ):
            watchers: list[Callable[[Any], object]] = [watcher for watcher in (film, live) if watcher is not None]
            for part, fields in in_parts(rows[own], how, own.start, size):
                made += write(
                    part,
                    watch=lambda record: [seen(record) for seen in watchers],
                    progress=lambda share: tell_share((len(made) + share * len(part)) / len(rows[own])),  # noqa: B023
                    **fields,
                )
    except BaseException:  # Ctrl-C, or memory that ran out
        if made and ranks.world == 1:
            print_samples(made)
        raise
    parts = ranks.gather(made)
    if not ranks.main:
        return
    try:
        if film is not None and output.film is not None:
            save_film(film, output.film, len(rows) * how.best_of)
    finally:
        print_samples([sample for part in parts for sample in part])


def in_parts(
    rows: Sequence[str], how: Generation, before: int, size: int
) -> Iterator[tuple[Sequence[str], dict[str, Any]]]:
    """At most `size` texts at a time, with the options of their request; `before` come before the first of them."""
    for first in range(0, len(rows), size):
        yield rows[first : first + size], how.model_dump() | {"seed": how.seed + (before + first) * how.best_of}


def say_what_is_read(lm: ScoreLM, texts: Sequence[str], how: Generation) -> None:
    """Say which texts the model reads otherwise than they were given, but for spaces, and how."""
    from scorelm.text.reading import say_reading

    sign = how.blank if isinstance(how, Infilling) else None
    changed = [said for text in texts if (said := say_reading(text, lm.tokenizer, sign)) is not None]
    for line in changed[:MOST_SAID]:
        tell(line)
    if len(changed) > MOST_SAID:
        tell(f"and so it is with {len(changed) - MOST_SAID:,} more texts")


def make_film(lm: ScoreLM, how: Continuation | Infilling, texts: Sequence[str]) -> Film:
    """A film of how the texts are completed, with nothing in it yet."""
    from scorelm.viz.film import Film

    title = f"{len(texts)} prompts" if len(texts) > 1 else texts[0] or "From nothing"
    subtitle = f"{how.path or lm.default_path(how)}, {how.solver}" + (f", {how.steps} steps" if how.steps else "")
    return Film(lm.tokenizer, norm=lm.norm, title=title, subtitle=subtitle)


def save_film(film: Film, path: Path, rows: int) -> None:
    """Write the film, and say how much of the work it shows, if not all of it."""
    film.save(path)
    if (shown := len(film.frames[-1].length_B)) < rows:
        tell(f"the film shows {shown:,} of {rows:,} texts: those that were written together last")


def print_texts(texts: Sequence[str]) -> None:
    """A text on each line; where one has line feeds, all as they are, with a line of three dashes between them."""
    show(("\n---\n" if any("\n" in text for text in texts) else "\n").join(texts))


def print_json(samples: Sequence[Sample], **more: Sequence[Any]) -> None:
    """All that is known of the samples as a JSON list; `more` has a further value for each of them."""
    facts = [{"text": s.text, "ids": s.ids, "seed": s.seed, "nfe": s.nfe} for s in samples]
    for name, values in more.items():
        facts = [fact | {name: value} for fact, value in zip(facts, values, strict=True)]
    show(json.dumps(facts, ensure_ascii=False, indent=2))
