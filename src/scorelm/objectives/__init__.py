"""What can be learned: score diffusion and its two peers in the same trunk, everything that tells them apart."""

from __future__ import annotations

from scorelm.objectives.autoregressive import Autoregressive
from scorelm.objectives.masked import Masked
from scorelm.objectives.objective import Objective
from scorelm.objectives.score import Score

OBJECTIVES: dict[str, Objective] = {one.name: one for one in (Score(), Masked(), Autoregressive())}
"""Every objective by name."""
