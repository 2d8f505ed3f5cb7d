"""MODEL and ``--device``: what every verb that uses a model has in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from scorelm.cli.printing import tell
from scorelm.errors import exists

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM

NAMES = (
    "Model directory, run directory, or name on the Hugging Face hub (user/name, or user/name@revision for a branch, "
    "tag or commit); by default the model that comes with scorelm, which writes verses in the manner of the King James "
    "Bible"
)
Model = Annotated[Path | None, Positional, arg(metavar="[MODEL]", help=f"{NAMES}.")]
Device = Annotated[
    str, arg(help="Where to compute: cpu, cuda, cuda:1 or another device of PyTorch; auto takes a GPU if there is one.")
]


def open_model(path: Path | None, device: str = "cpu") -> ScoreLM:
    """The model of that name, on that device.

    Raises:
        InputError: no such model or device, or a damaged model.
    """
    from scorelm.device import pick_device
    from scorelm.lm import ScoreLM
    from scorelm.model.hub import is_hub_name

    place = pick_device(device)
    if path is not None and not exists(path) and is_hub_name(str(path)):
        tell(f"asking the Hugging Face hub for {path}, which is no directory here")
    return ScoreLM.from_pretrained(path).to(place)
