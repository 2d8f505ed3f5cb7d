"""The command line: parse, call, print.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 bad input, 130 or 143
interrupted after a checkpoint.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import tyro
from pydantic import ValidationError

from scorelm.config import explain, load_recipe
from scorelm.memory import bound_kernel_caches, keep_freed_memory
from scorelm.verbs import VERBS
from scorelm.verbs.train import Train


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``scorelm`` command; exits with the code that the module's docstring gives."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0)
    if words[0] == "--version":
        from scorelm import __version__

        print(__version__)
        sys.exit(0)
    if words[0] not in VERBS:
        fail(f"no verb {words[0]!r}: choose {', '.join(VERBS)}", 2)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    bound_kernel_caches()
    keep_freed_memory()
    try:
        code = VERBS[words[0]][1](parse(words[0], words[1:]))
        sys.stdout.flush()
    except ValidationError as error:
        fail(explain(error), 2)
    except (ValueError, FloatingPointError) as error:
        fail(str(error), 1 if isinstance(error, FloatingPointError) else 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        fail("not enough memory: ask for fewer or shorter texts, or train a smaller model", 1)
    except BrokenPipeError:  # the reader of stdout has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        fail(str(error), 2 if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) else 1)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    sys.exit(code)


def fail(message: str, code: int) -> None:
    """One line on stderr if anyone reads it, then exit."""
    with suppress(OSError):
        print("scorelm: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)


def overview() -> str:
    """What ``scorelm --help`` prints."""
    verbs = "\n".join(f"  {name:<10} {(options.__doc__ or '').splitlines()[0]}" for name, (options, _) in VERBS.items())
    return (
        "usage: scorelm VERB [OPTIONS]\n\nScore-based diffusion language models: train, sample, fill in blanks.\n\n"
        f"{verbs}\n\nscorelm VERB --help lists a verb's options. Start with: scorelm demo"
    )


def parse(verb: str, words: list[str]) -> Any:
    """The verb's options; for ``train`` on top of the recipe or the run to be resumed."""
    default: Any = tyro.MISSING_NONPROP
    if verb == "train":
        base = option(words, "--recipe")
        out = option(words, "--out", "-mdir")
        if "--resume" in words and out is not None:
            base = str(Path(out) / "recipe.toml")
            if not Path(base).is_file():
                raise ValueError(f"nothing to resume: {out} has no recipe.toml")
        if base is not None:
            default = Train(out=tyro.MISSING, options=load_recipe(base))
    return tyro.cli(VERBS[verb][0], args=words, default=default, prog=f"scorelm {verb}")


def option(words: list[str], *names: str) -> str | None:
    """The value of an option, read ahead of the parser."""
    for k, word in enumerate(words):
        for name in names:
            if word == name and k + 1 < len(words):
                return words[k + 1]
            if word.startswith(f"{name}="):
                return word.removeprefix(f"{name}=")
    return None
