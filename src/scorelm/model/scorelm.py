"""ScoreLM: a denoiser with the tokenizer, schedule and lengths that it was trained with, in one model directory.

A model directory holds ``config.json``, ``model.safetensors``, ``tokenizer.model`` and ``README.md``. It is untrusted
input: nothing in it is unpickled, and sizes are checked before anything is allocated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from pydantic import ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from scorelm.config import MOST_TOKENS, ModelConfig, ObjectiveName, Options, explain
from scorelm.model.denoiser import Denoiser
from scorelm.noise.schedule import Schedule, schedule_from_dict, schedule_to_dict
from scorelm.text.tokenizer import Tokenizer
from scorelm.untrusted import brief, exists, read_bounded

if TYPE_CHECKING:
    from scorelm.sampling.sample import Sample

REAL = ("F16", "BF16", "F32", "F64")
KINDS = {"score": "A score-based diffusion", "masked": "A masked diffusion", "autoregressive": "An autoregressive"}
FILES = ("config.json", "model.safetensors", "tokenizer.model")
MOST_MANIFEST_BYTES = 1 << 22
MOST_HEADER_BYTES = 1 << 23
LARGEST_WEIGHT = 1e6  # products of larger ones may not be finite in float32


class Provenance(Options):
    """How a model came about."""

    model_config = ConfigDict(allow_inf_nan=True)

    data: str = ""
    steps: int = 0
    tokens: int = 0
    heldout_loss: float | None = None


class Manifest(Options):
    """The contents of config.json."""

    format: Literal[1] = 1
    objective: ObjectiveName = "score"
    model: ModelConfig
    vocab_size: int = Field(ge=4, le=10_000_000)
    lengths: list[Annotated[int, Field(ge=0, le=2**53)]] = Field(min_length=4, max_length=MOST_TOKENS + 1)
    schedule: dict[str, Any]
    provenance: Provenance = Provenance()


class ScoreLM(nn.Module, ModelHubMixin, library_name="scorelm", tags=["diffusion", "text-generation"]):
    """A trained score-based diffusion language model.

    >>> lm = ScoreLM.from_pretrained("runs/kjv/model")
    >>> lm.generate(["In the beginning"], n=4)
    >>> lm.infill("And God said, ____ there be light")

    Args:
        config: sizes of the denoiser.
        tokenizer: the tokenizer it was trained with.
        schedule: noise schedule, for sampling grids.
        lengths: histogram of document lengths in tokens, ``<s>`` and ``</s>`` included; its last index is the
            longest length that the model was trained on.
        provenance: how the model came about.
        objective: what it was trained for; ``autoregressive`` models write left to right, ``masked`` ones in random
            order.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        schedule: Schedule,
        lengths: Sequence[int],
        provenance: Provenance | None = None,
        objective: ObjectiveName = "score",
    ) -> None:
        super().__init__()
        self.objective = objective
        self.config = config
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.lengths = list(lengths)
        self.provenance = provenance or Provenance()
        self.denoiser = Denoiser(config, tokenizer.vocab_size)

    @property
    def max_length(self) -> int:
        """Longest document, in tokens, that the model was trained on."""
        return len(self.lengths) - 1

    @property
    def parameters_count(self) -> int:
        """Number of learned parameters."""
        return sum(p.numel() for p in self.parameters())

    def _save_pretrained(self, save_directory: Path) -> None:
        manifest = Manifest(
            objective=self.objective,
            model=self.config,
            vocab_size=self.tokenizer.vocab_size,
            lengths=self.lengths,
            schedule=schedule_to_dict(self.schedule),
            provenance=self.provenance,
        )
        (save_directory / "config.json").write_text(manifest.model_dump_json(indent=2) + "\n")
        weights = {name: t.detach().cpu().contiguous() for name, t in self.denoiser.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors")
        self.tokenizer.save(save_directory / "tokenizer.model")
        (save_directory / "README.md").write_text(self.card())

    def card(self) -> str:
        """The model card, in Markdown."""
        size, made = self.config.size, self.provenance
        heldout = "" if made.heldout_loss is None else f", held-out loss {made.heldout_loss:.3f} nats"
        return (
            "---\nlibrary_name: scorelm\npipeline_tag: text-generation\ntags: [diffusion, score-based]\n---\n"
            f"# {KINDS[self.objective]} language model\n\n"
            f"Trained with scorelm on `{made.data}`: {made.steps:,} steps, {made.tokens:,} tokens{heldout}.\n"
            f"{self.parameters_count:,} parameters: width {size.dim}, {size.layers} layers, {size.heads} heads, "
            f"embeddings of size {self.config.embedding_dim}, vocabulary {self.tokenizer.vocab_size:,}, "
            f"length up to {self.max_length}.\n\n"
            '```python\nfrom scorelm import ScoreLM\n\nlm = ScoreLM.from_pretrained("PATH")\n'
            "for sample in lm.generate(n=4):\n    print(sample.text)\n```\n"
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, **hub_options: Any) -> Self:  # type: ignore[override]
        """Load a model directory, or download one by its name on the Hugging Face hub.

        Args:
            path: directory or hub name.
            hub_options: passed to `huggingface_hub.snapshot_download` for a hub name (revision, token, ...).

        Raises:
            ValueError: no such model, or files that are missing, damaged or of another shape; names the file.
        """
        directory = Path(path)
        if not (exists(directory) and directory.is_dir()):
            directory = download(str(path), hub_options)
        for name in FILES:
            if not (directory / name).is_file():
                raise ValueError(f"{directory} is not a model directory: it has no {name}")
        manifest = read_manifest(directory / "config.json")
        try:
            schedule = schedule_from_dict(manifest.schedule)
        except ValueError as error:
            raise ValueError(f"{directory / 'config.json'}: {error}") from None
        tokenizer = Tokenizer.load(directory / "tokenizer.model")
        if tokenizer.vocab_size != manifest.vocab_size:
            raise ValueError(
                f"{directory / 'tokenizer.model'} has {tokenizer.vocab_size} tokens, "
                f"config.json says {manifest.vocab_size}"
            )
        weights = read_weights(directory / "model.safetensors", manifest)
        model = cls(manifest.model, tokenizer, schedule, manifest.lengths, manifest.provenance, manifest.objective)
        model.denoiser.load_state_dict(weights)
        return model.eval()

    def generate(self, prompts: str | Sequence[str] = ("",), n: int = 1, **options: Any) -> list[Sample]:
        """Continue each prompt `n` times; see `scorelm.sampling.sample.sample` for the options.

        Returns:
            A list of `Sample` (text, ids, seed, nfe), n for each prompt in order.
        """
        from scorelm.sampling.sample import sample

        return sample(self, prompts, n, **options)

    def infill(self, texts: str | Sequence[str], n: int = 1, **options: Any) -> list[Sample]:
        """Fill the ``____`` blanks in a text, or in several, in `n` ways; see `scorelm.sampling.sample.infill`."""
        from scorelm.sampling.sample import infill

        return infill(self, texts, n, **options)


def download(name: str, options: dict[str, Any]) -> Path:
    """Fetch the files of a model from the hub."""
    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, "README.md"], **options))
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no model at {name!r}: it is no directory, and the hub says: {reason}") from None


def read_manifest(path: Path) -> Manifest:
    """Read and validate config.json."""
    try:
        return Manifest.model_validate(json.loads(read_bounded(path, MOST_MANIFEST_BYTES).decode("utf-8")))
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {brief(str(error))}") from None


def read_weights(path: Path, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Read model.safetensors after checking every name and shape against the manifest."""
    with torch.device("meta"):
        expected = {k: list(v.shape) for k, v in Denoiser(manifest.model, manifest.vocab_size).state_dict().items()}
    try:
        with path.open("rb") as header:
            if int.from_bytes(header.read(8), "little") > MOST_HEADER_BYTES:
                raise ValueError(f"{path} is damaged: its header is larger than {MOST_HEADER_BYTES:,} bytes")
        with safe_open(path, framework="pt") as file:
            check_header({name: file.get_slice(name) for name in file.keys()}, expected, path)  # noqa: SIM118
            weights = {name: file.get_tensor(name) for name in expected}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {brief(str(error))}") from None
    for name, weight in weights.items():
        if not weight.abs().max() <= LARGEST_WEIGHT:  # nor is a NaN
            raise ValueError(f"{path} is damaged: {name} holds numbers that are not finite or above {LARGEST_WEIGHT:g}")
    return weights


def check_header(parts: dict[str, Any], expected: dict[str, list[int]], path: Path) -> None:
    """Refuse tensors of other names, shapes or kinds of number than are expected, before any is read."""
    for name in sorted(expected.keys() | parts.keys()):
        found, wanted = parts[name].get_shape() if name in parts else "none", expected.get(name, "none")
        if found != wanted:
            raise ValueError(
                f"{path} does not fit config.json: {brief(name)} has shape {brief(found)}, expected {wanted}"
            )
        if (kind := parts[name].get_dtype()) not in REAL:
            raise ValueError(f"{path} is damaged: {name} holds {kind}, not real numbers")
