"""LoRA (arXiv 2106.09685), by the package ``peft``: beside every matrix of the layers two narrow ones are trained.

The layers' own weights stay as they are, and the rest of the model is trained as ever: what is read, what is said, and
the norms around the layers. A model that is written has the narrow matrices added to the others, and none of this.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

from torch import Tensor, nn

from scorelm.errors import InputError
from scorelm.model.denoiser import Denoiser

SCALE = 2.0
"""What the product of two narrow matrices counts when it is added."""


def check_lora(rank: int) -> None:
    """Refuse a rank where the package is missing.

    Raises:
        InputError: it is.
    """
    if rank and find_spec("peft") is None:
        raise InputError("--lora takes one more package: pip install 'scorelm[lora]'")


def add_adapters(denoiser: Denoiser, rank: int) -> None:
    """Give every matrix of the layers adapters of this rank, which add nothing at first, and freeze the layers."""
    peft, layers = import_module("peft"), denoiser.backbone.layers
    names = [name for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=names), layers)


def merge_adapters(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a denoiser whose adapters, if it has any, are added to its matrices."""
    merged = {}
    for name, weight in weights.items():
        before, inside, after = name.partition(".base_layer.")
        if inside and after == "weight":
            narrow, wide = (weights[f"{before}.lora_{side}.default.weight"] for side in "AB")
            weight = weight + SCALE * wide @ narrow
        if ".lora_" not in name:
            merged[name.replace(".base_layer.", ".")] = weight
    return merged
