"""``scorelm eval``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveInt
from tyro.conf import arg

from scorelm.cli.model import Device, Model, open_model
from scorelm.cli.printing import show, tell
from scorelm.cli.texts import Texts, load_texts
from scorelm.cli.verb import Verb
from scorelm.config import named
from scorelm.config.generation import Precision, Seed

COLUMNS = ("perplexity", "mauve", "entropy", "distinct_2", "self_bleu", "repetition_4", "copied")
"""Figures that are printed, of those that were taken."""


class EvalVerb(Verb):
    """Options of ``scorelm eval``.

    Prices held-out text on several paths; writes texts and judges them beside real text and two generators of nonsense;
    and measures quality against temperature and against the number of evaluations of the network.
    """

    less_memory: ClassVar[str] = "use a smaller model or judge, or --device cpu if that was a GPU's"

    model: Model = None
    texts: Annotated[Texts, arg(name="")] = Texts()
    judge: str | None = None
    """Language model that says how likely the written texts are (perplexity, MAUVE): an autoregressive model of
    scorelm, trained with another seed on another share of the text, or any causal language model of Hugging Face
    transformers; a directory, a hub name or a GGUF file. By default there is none, and these figures are left out."""
    n: Annotated[int, named("n", "-n"), Field(ge=2)] = 128
    """Number of texts in each set."""
    steps: PositiveInt = 64
    """Most evaluations of the network for a text, except where effort is what varies."""
    seed: Seed = 0
    """Seed of the first text of each set."""
    device: Device = "auto"
    precision: Precision = "auto"
    """Number format of matrix products while texts are written: float32, bfloat16, or auto (bfloat16 where the hardware
    has it natively). Prices are always taken in float32."""
    report: Path | None = None
    """Write a self-contained page to this .html file, and the figures beside it as .json."""
    as_json: Annotated[bool, arg(name="json")] = False
    """Print all figures as JSON."""

    def run(self) -> int:
        """Measure, write the report and print the tables."""
        from scorelm.evaluation.diversity import check_packages
        from scorelm.evaluation.judge import load_judge
        from scorelm.evaluation.report import evaluate
        from scorelm.text.normalization import normalize
        from scorelm.viz.progress import progress
        from scorelm.viz.report import check_report, save_report

        check_report(self.report)
        check_packages(self.judge is not None)
        lm = open_model(self.model, self.device)
        judge = load_judge(self.judge, self.device) if self.judge is not None else None
        measured = load_texts(lm.provenance, self.texts)
        made, learned = lm.provenance, measured.training
        training = None if learned is None else [normalize(text, made.normalize) for text in learned["text"]]
        tell(f"{measured.what}; {'no judge' if judge is None else 'judge: ' + judge.name}")
        with progress("measuring") as watch:
            found = evaluate(
                lm, measured.texts, training, judge, n=self.n, steps=self.steps, seed=self.seed,
                precision=self.precision, watch=watch,
            )  # fmt: skip
        found |= {"data": measured.what, "held_out": measured.held_out}
        if self.report is not None:
            save_report(found, self.report)
        show(json.dumps(found, indent=1) if self.as_json else tables(found))
        if self.report is not None:
            tell(f"report: {self.report}")
        return 0


def tables(found: dict[str, Any]) -> str:
    """Prices, the written texts beside the others, and what has to be known to read them, as text."""
    lines = []
    for line in found["prices"]:
        steps = f" in {line['steps']} steps" if line["steps"] else ""
        bits = "" if line["bits_per_char"] is None else f"  {line['bits_per_char']:.3f} bits/character"
        lines.append(
            f"{line['path'] + steps:<24} {line['nats_per_token']:.3f} +- {line['stderr_nats_per_token']:.3f} nats/token"
            f"{bits}  {line['kind']}"
        )
    columns = [name for name in COLUMNS if name in found["table"][0]]
    width = max(len(line["name"]) for line in found["table"])
    lines.append("\n" + " " * width + "".join(f"{name:>13}" for name in columns))
    rows = [(line["name"], "".join(f"{line[name]:>13.3f}" for name in columns)) for line in found["table"]]
    lines += [f"{name:<{width}}{figures}" for name, figures in rows]
    return "\n".join([*lines, *(f"note: {note}" for note in found["notes"])])
