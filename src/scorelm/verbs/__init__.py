"""The verbs of the command line: the options of each, and what it does with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scorelm.verbs.evaluate import Eval, Score, evaluate, score
from scorelm.verbs.generate import Infill, Info, Sample, infill, info, sample
from scorelm.verbs.train import Demo, Train, TrainTokenizer, demo, train, train_tokenizer

VERBS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "demo": (Demo, demo),
    "train": (Train, train),
    "tokenizer": (TrainTokenizer, train_tokenizer),
    "sample": (Sample, sample),
    "infill": (Infill, infill),
    "score": (Score, score),
    "eval": (Eval, evaluate),
    "info": (Info, info),
}
"""The options and the action of every verb; an action returns the exit code."""
