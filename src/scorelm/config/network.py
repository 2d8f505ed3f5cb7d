"""What a model's config.json says of the published network that it started from; never an option of a run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from scorelm.config import Options


class Network(Options):
    """What a pretrained network has besides sizes; `scorelm.model.pretrained` has the families."""

    family: Literal["bert", "modernbert", "llama"]
    kv_heads: PositiveInt
    """Heads of keys and values, each of which several heads of queries may share."""
    norm_eps: PositiveFloat
    positions: Annotated[int, Field(ge=1, le=100_000_000)]
    """Positions that it was made for."""
    rotary_base: PositiveFloat = 10_000.0
    every: PositiveInt = 1
    """Every so many layers, from the first on, one sees the whole document; 1 where all do."""
    reach: Annotated[int, Field(ge=1, le=100_000_000)] = 1
    """How many positions to each side the other layers see."""
    reach_base: PositiveFloat = 10_000.0
    """Rotary base of those."""
    head: bool = False
    """Whether a layer stands between its last block and its table of outputs."""

    @property
    def causal(self) -> bool:
        """Whether it was trained to tell the next token."""
        return self.family == "llama"
