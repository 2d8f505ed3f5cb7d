"""``scorelm export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from scorelm.cli.model import open_model
from scorelm.cli.printing import show, tell
from scorelm.cli.verb import Verb
from scorelm.errors import InputError, exists, writing


class ExportVerb(Verb):
    """Options of ``scorelm export``.

    Writes a directory that Hugging Face's transformers loads with AutoModel and AutoTokenizer, given
    trust_remote_code=True, and prints its name. scorelm must be installed where it is loaded: the code in the directory
    is a few lines that call it. Every verb takes the directory as a MODEL, too, and none of them runs its code.
    """

    model: Annotated[Path, Positional, arg(metavar="MODEL", help="Model directory, run directory or hub name.")]
    directory: Annotated[Path, Positional, arg(metavar="DIR", help="Where to: a directory that is new, or empty.")]
    format: Literal["transformers"] = "transformers"
    """Library that is to load it."""

    def run(self) -> int:
        """Export the model."""
        from scorelm.transformers.export import export

        with writing(self.directory):
            new = not exists(self.directory)
            if not new and (not self.directory.is_dir() or any(self.directory.iterdir())):
                raise InputError(f"{self.directory} is there already: choose a directory that is new, or empty")
        lm = open_model(self.model)
        try:
            export(lm, self.directory)
        except BaseException:
            clear(self.directory, new)
            raise
        show(str(self.directory))
        tell(f"to use it in Python: AutoModel.from_pretrained({str(self.directory)!r}, trust_remote_code=True)")
        return 0


def clear(directory: Path, remove: bool) -> None:
    """Delete what an interrupted export has left in a directory that was empty, or was not there."""
    for path in directory.iterdir() if directory.is_dir() else ():
        path.unlink()
    if remove and directory.is_dir():
        directory.rmdir()
