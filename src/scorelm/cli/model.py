"""MODEL and ``--device``: what every verb that uses a model has in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from scorelm.errors import InputError

if TYPE_CHECKING:
    from scorelm.lm import ScoreLM

DEFAULT_MODEL = Path("runs/demo/model")

Model = Annotated[
    Path, Positional, arg(metavar="[MODEL]", help="Model directory, run directory, or name on the Hugging Face hub.")
]
Device = Annotated[
    str, arg(help="Where to compute: cpu, cuda, cuda:1 or another device of PyTorch; auto takes a GPU if there is one.")
]


def open_model(path: Path, device: str = "cpu") -> ScoreLM:
    """The model of that name, on that device.

    Raises:
        InputError: no such model or device, or a damaged model.
    """
    from scorelm.device import pick_device
    from scorelm.lm import ScoreLM

    if path == DEFAULT_MODEL and not path.is_dir():
        raise InputError(f"there is no model in {path} yet: name a model, or run scorelm demo to make this one")
    place = pick_device(device)
    return ScoreLM.from_pretrained(path).to(place)
