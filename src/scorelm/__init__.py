"""Score-based (continuous) diffusion language models.

>>> from scorelm import ScoreLM
>>> lm = ScoreLM.from_pretrained("runs/kjv")
>>> lm.generate(["In the beginning"], n=4)
>>> lm.infill("And God said, ____ there be light")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scorelm.evaluation.price import Price, price
    from scorelm.lm import ScoreLM
    from scorelm.pipeline import Pipeline
    from scorelm.sampling.sample import Sample
    from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer
    from scorelm.training import train

__all__ = ["Pipeline", "Price", "Sample", "ScoreLM", "Tokenizer", "__version__", "price", "train"]
__version__ = "0.1.0"

_HOMES = {
    "Pipeline": ("scorelm.pipeline", "Pipeline"),
    "Price": ("scorelm.evaluation.price", "Price"),
    "Sample": ("scorelm.sampling.sample", "Sample"),
    "ScoreLM": ("scorelm.lm", "ScoreLM"),
    "Tokenizer": ("scorelm.text.sentencepiece", "SentencePieceTokenizer"),
    "price": ("scorelm.evaluation.price", "price"),
    "train": ("scorelm.training", "train"),
}


def __getattr__(name: str) -> Any:
    """Import what users import when it is first used, so that ``scorelm --help`` needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'scorelm' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
