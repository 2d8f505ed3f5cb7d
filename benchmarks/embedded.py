"""Put a run's model into the package, where `scorelm sample` finds it if no other is named.

    .venv/bin/scorelm train --recipe kjv --out runs/kjv
    .venv/bin/python benchmarks/embedded.py runs/kjv "one NVIDIA H100"

Writes src/scorelm/assets/model: the weights in bfloat16 (half the size; where they are used they are float32), the
tokenizer, config.json, the run's recipe, and the card, which also says how long the run took on what machine. What the
rounding costs is printed: prices of held-out verses before and after it. Writes docs/samples.md: what the model writes
with seeds from 0, all of it.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from runs import heldout
from scorelm import ScoreLM, price
from scorelm.cli import process
from scorelm.cli.infill import mark

ASSETS = Path(__file__).parents[1] / "src/scorelm/assets/model"
SAMPLES = Path(__file__).parents[1] / "docs/samples.md"
MOST_MEGABYTES, STEPS, TEXTS, BLANKS = 20, 16, 50, 20


def prices(lm: ScoreLM) -> dict[str, float]:
    """Nats per token of all held-out verses by path, and the largest standard error, as the card shows them."""
    found = {
        path: price(lm, heldout(), path, steps=STEPS if path == "bounded" else None) for path in lm.objective.watched
    }
    stderr = max(one.stderr_nats_per_token for one in found.values())
    return {path: one.nats_per_token for path, one in found.items()} | {"stderr": stderr}


def write(lm: ScoreLM, run: Path, machine: str) -> None:
    """The model's directory, its weights in bfloat16."""
    shutil.rmtree(ASSETS, ignore_errors=True)
    lm.save_pretrained(ASSETS)
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(ASSETS / "model.safetensors").items()}
    save_file(weights, ASSETS / "model.safetensors")
    (ASSETS / "model.safetensors").chmod(0o644)
    shutil.copy(run / "recipe.toml", ASSETS / "recipe.toml")
    seconds = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    made = f"Made by `scorelm train --recipe recipe.toml`, in {seconds / 60:.1f} minutes on {machine}.\n"
    card = ASSETS / "README.md"
    card.write_text(card.read_text().replace("Held-out text costs", made + "Held-out text costs", 1))


def blanked(verse: str, start: int) -> str:
    """The verse with two of its words, in the middle, left blank."""
    words = list(re.finditer(r"[A-Za-z]+", verse))
    first, second = words[start], words[start + 1]
    return f"{verse[: first.start()]}____{verse[second.end() :]}"


def write_samples(lm: ScoreLM) -> None:
    """docs/samples.md: fifty texts with no option given, and twenty held-out verses with two words filled in."""
    lines = [
        "# Samples", "", "What the model that comes with scorelm writes, unpicked (`python benchmarks/embedded.py`).",
        "", f"## Fifty texts: `scorelm sample -n {TEXTS}`", "",
        *(f"{k}. {sample.text}" for k, sample in enumerate(lm.generate(n=TEXTS), 1)),
        "", "## Twenty blanks", "",
        "Two words of a held-out verse are left out, and filled in: `scorelm infill VERSE --blank-words 2 --mark`.", "",
    ]  # fmt: skip
    verses = [verse for verse in heldout() if len(verse.split()) >= 8]
    for k, verse in enumerate(verses[:: len(verses) // BLANKS][:BLANKS], 1):
        text = blanked(verse, len(re.findall(r"[A-Za-z]+", verse)) // 2)
        lines.append(f"{k}. {mark(lm.infill(text, blank_words=2, seed=k)[0])}")
    SAMPLES.write_text("\n".join(lines) + "\n")


def main() -> None:
    process.prepare()
    run, machine = Path(sys.argv[1]), sys.argv[2]
    before = ScoreLM.from_pretrained(run)
    write(before, run, machine)
    after = ScoreLM.from_pretrained(ASSETS)
    unrounded, found = prices(before), prices(after)
    after.provenance = before.provenance.model_copy(update={"prices": found})
    write(after, run, machine)
    size = sum(path.stat().st_size for path in ASSETS.iterdir()) / 1e6
    print(f"{ASSETS}: {size:.1f} MB")
    for path, nats in found.items():
        print(f"{path:<8} {unrounded[path]:.4f} nats/token in float32, {nats:.4f} in bfloat16")
    write_samples(ScoreLM.from_pretrained(ASSETS))
    assert size <= MOST_MEGABYTES, f"{size:.1f} MB are too many"


if __name__ == "__main__":
    main()
