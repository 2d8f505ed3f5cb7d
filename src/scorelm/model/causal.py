"""Causal language models as Hugging Face transformers loads them: from safetensors or GGUF, never by their own code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch

from scorelm.errors import InputError


def load_causal(name: str, called: str) -> tuple[Any, Any]:
    """Tokenizer and model in float32 and evaluation mode.

    Args:
        name: a directory, a name on the hub, or a GGUF file, whose weights are dequantized.
        called: what a message says of it.

    Raises:
        InputError: a package is missing, or the model cannot be loaded; transformers raises what it likes.
    """
    auto, path = import_transformers(), Path(name)
    place, file = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})
    missing = not path.is_file() if file else name.startswith(("/", ".")) and not path.is_dir()
    if missing:
        raise InputError(f"cannot load {called}: there is no such {'file' if file else 'directory'}")
    if file and not (find_spec("gguf") and find_spec("accelerate")):
        raise InputError(f"{called} is a GGUF file, which takes two more packages: pip install 'scorelm[gguf]'")
    safe = {"trust_remote_code": False, "use_safetensors": True, "ignore_mismatched_sizes": True}
    try:
        with quiet(), redirect_stderr(StringIO()):  # reading a GGUF file shows a bar whatever transformers is told
            if file:
                check_layers(path)
            tokenizer = auto.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **file)
            model, loaded = auto.AutoModelForCausalLM.from_pretrained(
                place, dtype=torch.float32, output_loading_info=True, **safe, **file
            )
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot load {called}: {reason}") from None
    wrong = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
    if wrong:
        raise InputError(f"cannot load {called}: {len(wrong)} weights, {wrong[0]} first, are missing or misshapen")
    return tokenizer, model.eval()


def check_layers(path: Path) -> None:
    """Refuse a GGUF file that says it has more layers than tensors: transformers would make them all first.

    Raises:
        InputError: it does.
    """
    reader = import_module("gguf").GGUFReader(path)
    for name, field in reader.fields.items():
        if name.endswith(".block_count") and int(field.contents()) > len(reader.tensors):
            raise InputError(f"it has {len(reader.tensors)} tensors, too few for {field.contents()} layers")


def import_transformers() -> Any:
    """The package.

    Raises:
        InputError: it is not installed.
    """
    try:
        return import_module("transformers")
    except ImportError:
        raise InputError("transformers is not installed: pip install 'scorelm[eval]'") from None


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings and no progress bars of transformers; its settings come back after."""
    logging = import_transformers().utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
