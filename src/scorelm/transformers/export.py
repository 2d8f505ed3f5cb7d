"""A directory that transformers loads with ``trust_remote_code``, and `ScoreLM.from_pretrained` as well."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from scorelm.errors import writing
from scorelm.lm import ScoreLM

CODE = Path(__file__).with_name("modeling_scorelm.py")
"""What transformers runs; it is copied into the directory."""
CARD = """
## In transformers

This directory holds a few lines of code that transformers runs, so it is loaded with `trust_remote_code=True`; the
package does the work: `pip install scorelm`.

```python
from transformers import AutoModel, AutoTokenizer

model = AutoModel.from_pretrained("PATH", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("PATH", trust_remote_code=True)
ids = model.generate(**tokenizer("", return_tensors="pt"), num_steps=64, temperature=0.75, seed=0)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
```

`model.lm` is the model itself: `model.lm.infill("... ____ ...")` fills in blanks. There is no `forward`, for the model
is asked about noise levels rather than about tokens.
"""


def export(lm: ScoreLM, directory: Path) -> None:
    """Write the model, its tokenizer, its card, and what transformers reads besides.

    Args:
        lm: the model.
        directory: made if there is none; files of the same names in it are written anew.

    Raises:
        InputError: it cannot be written.
    """
    with writing(directory):
        lm.save_pretrained(directory)
        write_json(directory / "config.json", config_of(lm))
        write_json(directory / "tokenizer_config.json", tokenizer_config_of(lm))
        shutil.copyfile(CODE, directory / CODE.name)
        (directory / "README.md").write_text(lm.card() + CARD, encoding="utf-8")


def config_of(lm: ScoreLM) -> dict[str, Any]:
    """config.json: what transformers wants to know, and under ``scorelm`` what `ScoreLM` wants to know."""
    return {
        "architectures": ["ScoreLMModel"],
        "auto_map": {"AutoConfig": f"{CODE.stem}.ScoreLMConfig", "AutoModel": f"{CODE.stem}.ScoreLMModel"},
        "dtype": "float32",
        "model_type": "scorelm",
        "vocab_size": lm.tokenizer.vocab_size,
        "scorelm": lm.manifest.model_dump(mode="json"),
    }


def tokenizer_config_of(lm: ScoreLM) -> dict[str, Any]:
    """tokenizer_config.json; without added tokens, for transformers adds those of a tokenizer.json otherwise."""
    return {
        "added_tokens_decoder": {},
        "auto_map": {"AutoTokenizer": [f"{CODE.stem}.ScoreLMTokenizer", None]},
        "model_max_length": lm.max_length,
        "normalize": lm.provenance.normalize,
        "tokenizer_class": "ScoreLMTokenizer",
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a file of JSON."""
    path.write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
