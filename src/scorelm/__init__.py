"""Score-based (continuous) diffusion language models.

>>> from scorelm import ScoreLM
>>> lm = ScoreLM.from_pretrained("runs/kjv/model")
>>> lm.generate(["In the beginning"], n=4)
>>> lm.infill("And God said, ____ there be light")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from scorelm.model.scorelm import ScoreLM
    from scorelm.text.tokenizer import Tokenizer

__all__ = ["ScoreLM", "Tokenizer", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import the public classes when they are first used, so that ``scorelm --help`` needs no torch."""
    if name == "ScoreLM":
        from scorelm.model.scorelm import ScoreLM

        return ScoreLM
    if name == "Tokenizer":
        from scorelm.text.tokenizer import Tokenizer

        return Tokenizer
    raise AttributeError(f"module 'scorelm' has no attribute {name!r}")
