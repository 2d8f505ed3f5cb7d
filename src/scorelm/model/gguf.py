"""GGUF files, the format of llama.cpp: dequantized into a directory like that of any published network."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp

from huggingface_hub import constants
from safetensors.torch import save_file

from scorelm.errors import InputError, exists, writing
from scorelm.model.causal import load_causal


def find_gguf(name: Path) -> Path | None:
    """The GGUF file that is meant, if one is: that of the name, or the only one in a directory without config.json.

    Raises:
        InputError: a directory has several.
    """
    if name.suffix == ".gguf" and not (exists(name) and name.is_dir()):
        return name
    if not exists(name) or any(exists(name / config) for config in ("config.json", "model/config.json")):
        return None
    found = sorted(name.glob("*.gguf"))
    if len(found) > 1:
        raise InputError(f"{name} has {len(found)} GGUF files: name the one that is meant, such as {found[0]}")
    return found[0] if found else None


def unpack(file: Path) -> Path:
    """A directory with the ``config.json``, ``model.safetensors`` and ``tokenizer.json`` of a GGUF file.

    It is in the cache of Hugging Face, with 4 bytes for each weight, and another is made when the file has changed.

    Raises:
        InputError: a package is missing, or the file cannot be read or has what is not computed here.
        DiskError: the directory cannot be written.
    """
    if not (exists(file) and file.is_file()):
        raise InputError(f"cannot load {file}: there is no such file")
    now = file.resolve().stat()
    digest = sha256(repr((str(file.resolve()), now.st_size, now.st_mtime_ns)).encode()).hexdigest()[:16]
    home = Path(constants.HF_HOME) / "scorelm" / f"gguf-{digest}"
    if exists(home):
        return home
    tokenizer, model = load_causal(str(file), str(file))
    reader = import_module("gguf").GGUFReader(file)
    if any(tensor.name.startswith("rope_freqs") for tensor in reader.tensors):  # which transformers leaves out
        raise InputError(f"{file}: rotary positions are scaled, which is not computed here")
    config, weights = model.config.to_dict(), model.state_dict()
    config.pop("quantization_config", None)
    if config.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    with writing(home):
        home.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(mkdtemp(dir=home.parent))
        try:
            (draft / "config.json").write_text(json.dumps(config), encoding="utf-8")
            (draft / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, draft / "model.safetensors")
            draft.rename(home)
        except OSError:
            if not exists(home):  # which another process may have made meanwhile
                raise
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return home
