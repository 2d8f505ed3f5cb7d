"""``scorelm push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from scorelm.cli.model import open_model
from scorelm.cli.printing import show, tell
from scorelm.cli.verb import Verb


class PushVerb(Verb):
    """Options of ``scorelm push``.

    Puts a model on the Hugging Face hub in one commit, in a repository that is made if there is none, and prints the
    address of the commit. The card that goes with it has what held-out text cost the model, the recipe, the fingerprint
    of the text, the licence, and how to use the model. It needs a token: set HF_TOKEN, or run hf auth login. What is
    there can be used by its name, as in scorelm sample user/name, or user/name@revision for a branch, tag or commit.
    """

    model: Annotated[Path, Positional, arg(metavar="MODEL", help="Model directory or run directory.")]
    name: Annotated[str, Positional, arg(metavar="NAME", help="Name on the hub: user/name.")]
    private: bool = False
    """If the repository is made: for its owner only."""
    revision: str | None = None
    """Branch to commit to, made if there is none; by default main."""
    message: str | None = None
    """Message of the commit; by default one that says what it is."""
    licence: Annotated[str | None, arg(aliases=("--license",))] = None
    """Identifier of the model's licence, as the hub has them: mit, cc0-1.0, cc-by-4.0, ...; by default none is said."""

    def run(self) -> int:
        """Push the model."""
        lm = open_model(self.model)
        address = lm.push_to_hub(
            self.name, licence=self.licence, private=self.private or None, branch=self.revision, message=self.message
        )
        show(address)
        tell(f"to use it: scorelm sample {self.name}{f'@{self.revision}' if self.revision else ''}")
        return 0
