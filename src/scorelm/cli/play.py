"""``scorelm play``."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from scorelm.cli.infill import mark
from scorelm.cli.model import Device, Model, open_model
from scorelm.cli.output import LESS_MEMORY, say_what_is_read
from scorelm.cli.printing import show, tell
from scorelm.cli.verb import Verb
from scorelm.config.generation import Continuation, Generation, Infilling
from scorelm.errors import InputError, brief

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM

HELP = """\
Type the beginning of a text, or nothing at all, and press return: it is continued. Type a text with blanks, each four
underscores, and they are filled in. Every further text has the next seed.
  /path uniform       sets an option, here the order in which noise goes; /path alone shows it
  /steps 16  /temperature 0.7  /seed 3  /solver heun  and so on for every option of sample and infill
  /default steps      takes an option back; /default takes all of them back
  /options            shows what is set
  /again              the same once more, with the next seed
  /help  /quit        Ctrl-D ends it too; Ctrl-C ends a text that is being written"""
HISTORY = Path("~/.cache/scorelm/play-history")
OPTIONS = sorted(set(Continuation.model_fields) | set(Infilling.model_fields))


class PlayVerb(Verb):
    """Options of ``scorelm play``.

    A prompt that stays open with the model loaded: every text is shown while it is written. /help at the
    prompt says what can be set.
    """

    less_memory: ClassVar[str] = LESS_MEMORY

    model: Model = None
    device: Device = "auto"

    def run(self) -> int:
        """Read lines until there are no more."""
        game = Game(open_model(self.model, self.device))
        with_history = sys.stdin.isatty() and remember()
        tell(f"{HELP}\n")
        while True:
            try:
                line = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                break
            except KeyboardInterrupt:
                tell("")
                continue
            if line.strip() in ("/quit", "/exit"):
                break
            try:
                game.answer(line)
            except InputError as error:
                tell(str(error))
            except KeyboardInterrupt:
                tell("stopped")
        if with_history:
            keep()
        return 0


class Game:
    """What has been set, and what is written with it.

    Args:
        lm: the model.
    """

    def __init__(self, lm: ScoreLM) -> None:
        self.lm = lm
        self.options: dict[str, Any] = {}
        self.seed = 0
        self.last = ""

    def answer(self, line: str) -> None:
        """Do what a line says.

        Raises:
            InputError: it cannot be done; says why.
        """
        if not line.startswith("/"):
            self.write(line)
            return
        name, _, value = line[1:].strip().partition(" ")
        value = value.strip()
        match name.replace("-", "_"):
            case "help" | "":
                tell(HELP)
            case "again":
                self.write(self.last)
            case "options":
                shown = {"seed": self.seed, **self.options}
                tell("  ".join(f"/{option} {shlex.quote(str(one))}" for option, one in shown.items()))
            case "default":
                self.reset(value)
            case option if option in OPTIONS:
                self.set(option, value)
            case _:
                raise InputError(f"no command or option {brief(name)!r}: /help lists them")

    def set(self, option: str, value: str) -> None:
        """Set an option for all texts to come, or show it where no value is given."""
        kind = next(kind for kind in KINDS if option in kind.model_fields)
        if not value:
            default = kind.model_fields[option].default
            now = self.seed if option == "seed" else self.options.get(option, default)
            tell(f"{option} is {'not set' if now is None else now}")
            return
        read = getattr(kind.of(**{option: value}), option)
        if option == "seed":
            self.seed = read
            return
        from scorelm.sampling.request import Settings

        trial = {**self.options, option: read}
        Settings.of(Generation.of(**{name: one for name, one in trial.items() if name in Generation.model_fields}))
        self.options = trial

    def reset(self, option: str) -> None:
        """Take an option back, or all of them."""
        if option and option not in self.options:
            raise InputError(f"{brief(option)!r} is not set")
        self.options = {name: one for name, one in self.options.items() if option and name != option}

    def write(self, text: str) -> None:
        """Continue a text, or fill its blanks in, and show how."""
        from scorelm.text.templates import split_blanks
        from scorelm.viz.watch import Watch

        self.last = text
        blanks = len(split_blanks(text, self.options.get("blank", Infilling().blank))) - 1
        fills = blanks > 0 or "repair" in self.options
        kind, act = (Infilling, self.lm.infill) if fills else (Continuation, self.lm.generate)
        options = {name: one for name, one in self.options.items() if name in kind.model_fields}
        say_what_is_read(self.lm, [text], kind.of(**options))
        with Watch(self.lm.tokenizer) as watch:
            (sample,) = act(text, watch=watch, seed=self.seed, **options)
        show(mark(sample))
        tell(f"  {sample.nfe} evaluations of the network, seed {sample.seed}")
        self.seed += 1


KINDS: tuple[type[Generation], ...] = (Continuation, Infilling)


def remember() -> bool:
    """Read the lines of former times, and complete commands; whether this Python can."""
    try:
        import readline
    except ImportError:
        return False

    def complete(begun: str, state: int) -> str | None:
        names = [f"/{name} " for name in (*OPTIONS, "again", "default", "help", "options", "quit")]
        return next((name for k, name in enumerate(n for n in names if n.startswith(begun)) if k == state), None)

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("tab: complete")
    readline.set_history_length(1000)
    with suppress(OSError):
        readline.read_history_file(HISTORY.expanduser())
    return True


def keep() -> None:
    """Keep the lines for the next time."""
    import readline

    path = HISTORY.expanduser()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        readline.write_history_file(path)
