"""``scorelm data``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from tyro.conf import Positional, Suppress, arg

from scorelm.cli.info import is_text
from scorelm.cli.printing import show
from scorelm.cli.train import value
from scorelm.cli.verb import Verb
from scorelm.config.recipe import Recipe
from scorelm.config.text import DataConfig, TextOptions
from scorelm.errors import InputError, brief

if TYPE_CHECKING:
    from scorelm.text.profile import Statistics
    from scorelm.viz.progress import Telling

CHOSEN = {"vocab_size": "--vocab-size", "max_length": "--max-length"}
"""What is chosen for the text where it is not given, with its flag."""


class DataVerb(DataConfig, Verb):
    """Options of ``scorelm data``.

    Counts examples, blank ones and duplicates, and shows how long examples are, how they fill rows of different widths,
    of which tokens they are made, and which are the longest. Nothing is written but the cache that training reads.
    """

    less_memory: ClassVar[str] = "look at less text"

    source: Annotated[str, Positional, arg(metavar="[SOURCE]")] = "kjv"
    """Text: kjv (embedded), a file (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet; compressed ones too), a directory
    of files, or the name of a Hugging Face dataset."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print JSON; docs/text.md says what it holds."""
    given: Annotated[tuple[str, ...], Suppress] = ()
    """Which of `CHOSEN` the command line gives."""

    @classmethod
    def before(cls, words: Sequence[str]) -> Self:
        """Which options stay as they are."""
        return cls.model_construct(given=tuple(name for name, flag in CHOSEN.items() if value(words, flag) is not None))

    def run(self) -> int:
        """Measure the text and print what was found."""
        from scorelm.viz.progress import progress

        with progress(brief(self.source, 40)) as watch:
            watch(0.0, "reading")
            facts, found = self.look(watch)
        if self.as_json:
            show(json.dumps(facts | asdict(found), indent=2))
        else:
            from scorelm.viz.profile import draw_profile

            show(draw_profile(facts, found, self.next_step()))
        return 0

    def look(self, watch: Telling) -> tuple[dict[str, Any], Statistics]:
        """What was read and how, and what it is like.

        Args:
            watch: told how far the work is.

        Raises:
            InputError: text or tokenizer that cannot be used.
        """
        from scorelm.text.corpus import load_corpus
        from scorelm.text.profile import measure
        from scorelm.text.source import Reading
        from scorelm.training.data import prepare
        from scorelm.training.runlog import drop

        config = self.chosen()
        corpus = load_corpus(config.source, Reading.of(config), holdout=config.holdout)
        watch(0.2, "making tokens of it")
        with TemporaryDirectory() as place:
            data = prepare(config, Path(place), False, drop)
        facts = {
            "name": corpus.name,
            "notes": corpus.notes,
            "max_length": config.max_length,
            "tokenizer": None if config.tokenizer is None else str(config.tokenizer),
        }

        def told(share: float, doing: str) -> None:
            watch(0.4 + 0.6 * share, doing)

        return facts, measure(corpus, data.documents, data.tokenizer, config.max_length, told)

    def chosen(self) -> DataConfig:
        """The options, with what training would choose for the text."""
        from scorelm.training.proposal import propose

        plain = DataConfig(**self.model_dump(include=set(DataConfig.model_fields)))
        if set(self.given) == set(CHOSEN):
            return plain
        try:
            return propose(Recipe(data=plain), self.given).recipe.data
        except InputError:
            return plain

    def next_step(self) -> str:
        """The command that shows what a run on the text would be."""
        words = ["scorelm", "info", self.source]
        for name, field in TextOptions.model_fields.items():
            given = getattr(self, name)
            if name != "source" and isinstance(given, str) and given != field.default:
                words += [f"--{name.replace('_', '-')}", given]
        if not is_text(Path(self.source)) and not self.hub_split:
            words += ["--hub-split", "train"]
        return shlex.join(words)
