"""What transformers runs when it loads this directory with ``trust_remote_code=True``.

The package scorelm does all the work: pip install scorelm.
"""

# mypy: allow-untyped-calls
from scorelm.transformers import model, tokenizer


class ScoreLMConfig(model.ScoreLMConfig):
    """See `scorelm.transformers.model.ScoreLMConfig`."""


class ScoreLMModel(model.ScoreLMModel):
    """See `scorelm.transformers.model.ScoreLMModel`."""

    config_class = ScoreLMConfig


class ScoreLMTokenizer(tokenizer.ScoreLMTokenizer):
    """See `scorelm.transformers.tokenizer.ScoreLMTokenizer`."""
