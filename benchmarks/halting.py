"""What halting early saves and costs, for one model: evaluations, and how the text is, on `uniform` at 64 steps.

    .venv/bin/python benchmarks/halting.py runs/demo/model    # writes benchmarks/results/halting.json

The columns are those of `sampling.py`; 32 texts for each row of the table.
"""

from __future__ import annotations

import json
import statistics
import sys

from runs import RESULTS
from sampling import quality
from scorelm import ScoreLM
from scorelm.cli import process

RULES = (
    None, "entropy:0.05", "entropy:0.2", "entropy:0.5", "entropy:1", "patience:2", "patience:3", "patience:5",
    "patience:8", "kl:0.001", "kl:0.01", "kl:0.03", "kl:0.1",
)  # fmt: skip


def main() -> None:
    process.prepare()
    lm = ScoreLM.from_pretrained(sys.argv[1])
    table = []
    for solver in ("posterior", "euler"):
        for halt in RULES:
            samples = lm.generate(n=32, path="uniform", solver=solver, steps=64, halt=halt, temperature=1, top_p=1)
            nfe = statistics.mean(sample.nfe for sample in samples)
            table.append({"solver": solver, "halt": halt, "nfe": nfe} | quality(lm, [s.ids for s in samples]))
            line = table[-1]
            print(f"{solver:<10} {halt or 'none':<13} nfe {nfe:5.1f}  nats {line['nats']:.2f} "
                  f"+- {line['nats_stderr']:.2f}  entropy {line['entropy']:.2f}", flush=True)  # fmt: skip
    report = {"command": f"python benchmarks/halting.py {sys.argv[1]}", "table": table}
    (RESULTS / "halting.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
