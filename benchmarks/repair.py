"""Self-correction: verses in which some tokens were replaced by random ones, doubted as a whole and written anew.

    .venv/bin/python benchmarks/repair.py runs/kjv runs/masked    # writes benchmarks/results/repair.json, prints tables

The score model puts noise of one level u on every token and denoises (`scorelm infill --repair u`); nothing tells it
which tokens are wrong. A masked model cannot doubt a token a little: it keeps it, or takes it away. So it takes away a
random half, or, `informed` of how many are wrong, those that it finds least likely given the others; the score model
does so too. `repaired` is the share of wrong tokens that came out right, `kept` the share of right tokens that did,
`right` of all. Below: the expected calibration error of the likeliest token's probability on true verses, in 15 equal
bins (arXiv 1706.04599), by noise level or share masked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runs import Kept, heldout, spread
from scorelm import ScoreLM
from scorelm.cli import process
from scorelm.config.generation import Generation, Infilling
from scorelm.evaluation.likelihood import Noisy
from scorelm.evaluation.rows import batches
from scorelm.noise.forward import to_sigma
from scorelm.sampling.request import Settings
from scorelm.text.templates import Template

SHARES = (0.1, 0.2, 0.3, 0.5)
LEVELS = (0.2, 0.35, 0.5, 0.65, 0.8)
TEXTS, STEPS, BINS = 96, 16, 15


def verses(lm: ScoreLM) -> list[list[int]]:
    """Token ids of held-out verses that fit a row."""
    rows = [lm.tokenizer.encode_document(text) for text in heldout(2 * TEXTS)]
    return [row for row in rows if 8 <= len(row) <= lm.max_length][:TEXTS]


def corrupted(rows: list[list[int]], share: float, vocabulary: int, seed: int) -> list[list[int]]:
    """The rows with a share of the tokens between the ends replaced by other ones, all equally likely."""
    rng, made = torch.Generator().manual_seed(seed), []
    for row in rows:
        inner = len(row) - 2
        at = (torch.randperm(inner, generator=rng)[: round(share * inner)] + 1).tolist()
        other = torch.randint(4, vocabulary - 1, (len(at),), generator=rng).tolist()
        new = list(row)
        for i, token in zip(at, other, strict=True):
            new[i] = token + (token >= row[i])
        made.append(new)
    return made


def doubted(row: list[int], free: Tensor) -> Template:
    """A template that is free at some positions."""
    return [None if is_free else token for token, is_free in zip(row, free.tolist(), strict=True)]


def outcome(rows: list[list[int]], wrong: list[list[int]], found: list[list[int]]) -> dict[str, float]:
    """Shares of tokens between the ends that came out as they were before."""
    triples = [
        t for r, w, f in zip(rows, wrong, found, strict=True) for t in zip(r[1:-1], w[1:-1], f[1:-1], strict=True)
    ]
    bad, good = [t for t in triples if t[0] != t[1]], [t for t in triples if t[0] == t[1]]
    return {
        "repaired": sum(r == f for r, _, f in bad) / len(bad),
        "kept": sum(r == f for r, _, f in good) / len(good),
        "right": sum(r == f for r, _, f in triples) / len(triples),
    }


def written(lm: ScoreLM, templates: list[Template], settings: Settings, seed: int) -> list[list[int]]:
    """The rows that come out."""
    seeds, loop = range(seed * len(templates), (seed + 1) * len(templates)), lm.loop()
    job = loop.join(templates, seeds, settings)
    while not job.finished:
        loop.step()
    return [ids for ids, _ in job.rows()]


@torch.inference_mode()
def suspicion(lm: ScoreLM, row: list[int]) -> Tensor:
    """Nats of each token between the ends given all the others, [L], -inf at the ends."""
    length = len(row)
    batch = next(batches([row] * (length - 2), lm.device, lm.tokenizer.special, positions=length * length))
    alone_BL = torch.eye(length, dtype=torch.bool)[1:-1]
    nats_N = Noisy(lm.loop().network, batch, 0, 1, True).nats(torch.where(alone_BL, torch.inf, 0.0))
    return torch.cat([torch.tensor([-torch.inf]), nats_N, torch.tensor([-torch.inf])])


def least_likely(lm: ScoreLM, wrong: list[list[int]], share: float) -> list[Template]:
    """Templates that are free at as many tokens as are wrong, those that the model finds least likely."""
    templates = []
    for row in wrong:
        free = torch.zeros(len(row), dtype=torch.bool)
        free[suspicion(lm, row).topk(round(share * (len(row) - 2))).indices] = True
        templates.append(doubted(row, free))
    return templates


def random_half(wrong: list[list[int]], seed: int) -> list[Template]:
    """Templates that are free at a random half of the tokens between the ends."""
    rng, templates = torch.Generator().manual_seed(seed), []
    for row in wrong:
        free = torch.rand(len(row), generator=rng) < 0.5
        free[[0, -1]] = False
        templates.append(doubted(row, free))
    return templates


def repairs(lm: ScoreLM, masked: ScoreLM, share: float, seed: int) -> Iterator[tuple[str, dict[str, float]]]:
    """Every way to repair, with what it gave."""
    rows = verses(lm)
    wrong = corrupted(rows, share, lm.tokenizer.vocab_size, seed)
    yield "left as it is", outcome(rows, wrong, wrong)
    for level in LEVELS:
        for path in ("uniform", "confidence"):
            doubt = Settings.of(Infilling.of(path=path, steps=STEPS, repair=level))
            repaired = written(lm, [list(row) for row in wrong], doubt, seed)
            yield f"score, {path}, u = {level}", outcome(rows, wrong, repaired)
    jumps = Settings.of(Generation.of(path="bounded", steps=STEPS))
    for name, model in (("score", lm), ("masked", masked)):
        yield f"{name}, a random half", outcome(rows, wrong, written(model, random_half(wrong, seed), jumps, seed))
        yield f"{name}, informed", outcome(rows, wrong, written(model, least_likely(model, wrong, share), jumps, seed))


@torch.inference_mode()
def calibration(lm: ScoreLM, level: float, seed: int = 0) -> dict[str, float]:
    """Expected calibration error of the likeliest token, its mean probability and how often it is right.

    At noise of level u on every token of a score model; with a random share u masked for a masked one.
    """
    sure, right, network, masked = [], [], lm.loop().network, lm.objective.name == "masked"
    for batch in batches(verses(lm), lm.device, lm.tokenizer.special):
        free_BL = batch.free(True)
        sigma_BL = torch.where(free_BL, to_sigma(torch.tensor(level, dtype=torch.float64), lm.schedule), 0.0)
        if masked:
            rank_BL, count_B1 = batch.shuffled(free_BL, seed, 0), free_BL.sum(1, keepdim=True)
            sigma_BL = torch.where(free_BL & (rank_BL < level * count_B1), torch.inf, 0.0)
        eps_BLE = batch.noise(lm.config.embedding_dim, seed, 1)
        seen = Noisy(network, batch, 0, 1 if masked else 2, True).at(sigma_BL, eps_BLE)
        sure.append(seen.top_probability_N.double())
        right.append((seen.ids_N == batch.ids_BL[seen.open_BL]).double())
    sure_N, right_N = torch.cat(sure), torch.cat(right)
    bin_N = (sure_N * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add(0, bin_N, sure_N - right_N)
    return {"ece": float(gaps.abs().sum() / len(sure_N)), "sure": float(sure_N.mean()), "right": float(right_N.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("score", type=Path)
    parser.add_argument("masked", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    process.prepare()
    kept = Kept("repair.json")
    lm, masked = (ScoreLM.from_pretrained(run) for run in (arguments.score, arguments.masked))
    tables: dict[str, Any] = {}
    for share in SHARES:
        for seed in arguments.seeds:
            found = kept.get(f"{share} | {seed}", lambda s=share, k=seed: dict(repairs(lm, masked, s, k)))
        print(f"\n{share:.0%} wrong".ljust(33) + "repaired          kept              right")
        for way in found:
            rows = [kept.values[f"{share} | {seed}"][way] for seed in arguments.seeds]
            tables[f"{share} {way}"] = {c: spread([row[c] for row in rows]) for c in ("repaired", "kept", "right")}
            print(
                f"{way:<32}"
                + "".join(f"{v['mean']:.3f} ± {v['half']:.3f}     " for v in tables[f"{share} {way}"].values())
            )
    print("\ncalibration                     ece      sure     right")
    for name, model in (("score", lm), ("masked", masked)):
        for level in LEVELS:
            row = kept.get(f"calibration {name} {level}", lambda m=model, u=level: calibration(m, u))
            print(f"{name} {level:<25}{row['ece']:.4f}   {row['sure']:.3f}    {row['right']:.3f}")
    kept.values["summary"] = tables
    kept.write()


if __name__ == "__main__":
    main()
