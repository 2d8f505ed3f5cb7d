"""The command line: parse, run a verb, and say in one line what a user can cause.

Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 the work failed, 2 bad input, 130 interrupted,
128 + N stopped by signal N after a checkpoint, 141 the reader of stdout has gone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn

from scorelm.cli.printing import show, tell
from scorelm.cli.process import prepare
from scorelm.errors import InputError, brief

VERBS = {
    "demo": "Show verses of the included model, then train one.",
    "train": "Train a model on text of your own.",
    "data": "Show what a text is like before you train on it.",
    "tokenizer": "Train a tokenizer on text of your own.",
    "sample": "Write texts, from nothing or from a prompt.",
    "infill": "Fill in the blanks in a text, or repair one that has mistakes.",
    "score": "Measure how well a model predicts text.",
    "eval": "Measure a model in full, in one report.",
    "play": "Write at a prompt that stays open, and watch.",
    "serve": "Serve a model over HTTP, with a page that shows it at work.",
    "info": "Describe a model, or a text and what to train on it.",
    "plot": "Draw how runs have learned: held-out prices and training loss.",
    "push": "Put a model on the Hugging Face hub.",
    "export": "Write a model in a form that another library loads (transformers).",
}
"""Every verb with its summary; `scorelm.cli.verb.load` finds its options and its action."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``scorelm`` command; exits with the code that the module's docstring gives."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = run(words)
    except InputError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.exit(141)
    except KeyboardInterrupt:
        fail("interrupted", 130)
    sys.exit(code)


def run(words: list[str]) -> int:
    """Answer a command line.

    Returns:
        The exit code.

    Raises:
        InputError: an unknown verb or option, a bad value, or work that came to nothing.
    """
    if not words or words[0] in ("-h", "--help"):
        show(overview())
        return 0
    if words[0] == "--version":
        from scorelm import __version__

        show(__version__)
        return 0
    if words[0] not in VERBS:
        raise InputError(f"no verb '{brief(words[0])}': choose {', '.join(VERBS)}")
    prepare()
    from scorelm.cli.verb import load, parse

    try:
        return parse(words[0], VERBS[words[0]], words[1:]).run()
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        fail(f"not enough memory: {load(words[0]).less_memory}", 1)


def overview() -> str:
    """What ``scorelm --help`` prints."""
    verbs = "\n".join(f"  {name:<10} {summary}" for name, summary in VERBS.items())
    return (
        "usage: scorelm VERB [OPTIONS]\n\n"
        "Score-based diffusion language models: train one on your text, and let it write.\n\n"
        f"{verbs}\n\n"
        "scorelm VERB --help explains a verb and its options. To begin: scorelm demo"
    )


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory of the machine or of its GPU is full."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    return any(words in str(error) for words in ("allocate memory", "not enough memory", "CUDA error: out of memory"))


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr if anyone reads it, then exit."""
    tell("scorelm: " + " ".join(message.split()))
    sys.exit(code)
