"""ScoreLM: a denoiser with the tokenizer, schedule and lengths that it was trained with, as users hold it."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from huggingface_hub import ModelHubMixin
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import nn

from scorelm.config.generation import Continuation, Infilling, takes
from scorelm.config.recipe import ModelConfig, ObjectiveName
from scorelm.device import pick_device
from scorelm.errors import InputError
from scorelm.model.card import model_card
from scorelm.model.denoiser import Denoiser
from scorelm.model.directory import Manifest, Provenance, find_directory, read_manifest, read_recipe, read_weights
from scorelm.model.hub import push
from scorelm.noise.schedule import Schedule, schedule_from_dict, schedule_to_dict
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.denoise import StepRecord
from scorelm.sampling.evaluator import Network
from scorelm.sampling.loop import Loop, generate_in_batches
from scorelm.sampling.plan import Plan
from scorelm.sampling.request import Settings
from scorelm.sampling.sample import Sample
from scorelm.text.normalization import normalizing
from scorelm.text.templates import Draft, Hole, blank_draft, prompt_template, tokens_for
from scorelm.text.tokenizer import FILES, Tokenizer, find_tokenizer, load_tokenizer

STEPWISE = ("steps", "length", "solver", "nats_per_step", "halt", "self_guidance", "score_temperature")
"""Options that have no effect, or an ill one, where each token is written in one step and the model ends the text."""
Drafter = Callable[[Any, np.random.Generator], Draft]
"""Drafts a text, or a prompt that is given as token ids; the generator draws lengths."""


class ScoreLM(nn.Module, ModelHubMixin, library_name="scorelm", tags=["diffusion", "text-generation"]):
    """A trained score-based diffusion language model.

    >>> lm = ScoreLM.from_pretrained("runs/kjv")
    >>> lm.generate(["In the beginning"], n=4)
    >>> lm.infill("And God said, ____ there be light")

    The same request, seed, model, batch and machine give the same text, bit for bit. In another batch or on another
    machine the text is the same up to floating-point rounding, which can change a token now and then.

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
        self.objective = OBJECTIVES[objective]
        self.config = config
        self.tokenizer = tokenizer
        self.schedule = schedule
        self.lengths = list(lengths)
        self.provenance = provenance or Provenance()
        self.recipe = ""
        """The options of the run that it comes from, as TOML; "" where they are not known."""
        self.denoiser = Denoiser(config, tokenizer.vocab_size)
        self.denoiser.tells_next_token = self.provenance.tells_next_token

    @property
    def max_length(self) -> int:
        """Longest document, in tokens, that the model was trained on."""
        return len(self.lengths) - 1

    @property
    def parameters_count(self) -> int:
        """Number of learned parameters."""
        return sum(p.numel() for p in self.parameters())

    @property
    def norm(self) -> float:
        """Length of an embedding, sqrt(E): what noise levels are compared with."""
        return self.denoiser.embedding.norm

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.denoiser.embedding.weight.device

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, **hub_options: Any) -> Self:  # type: ignore[override]
        """Load a model.

        Args:
            path: a model directory, the directory of a run, or a name on the Hugging Face hub, with a branch, tag or
                commit behind an @ if need be; by default the model that comes with the library, which writes verses in
                the manner of the King James Bible.
            hub_options: passed to `huggingface_hub.snapshot_download` for a hub name (revision, token, ...).

        Raises:
            InputError: no such model, or files that are missing, damaged or of another shape; names the file.
        """
        directory = find_directory(path, hub_options)
        manifest = read_manifest(directory / "config.json")
        try:
            schedule = schedule_from_dict(manifest.schedule)
        except ValueError as error:
            raise InputError(f"{directory / 'config.json'}: {error}") from None
        place = find_tokenizer(directory)
        tokenizer = normalizing(load_tokenizer(place), manifest.provenance.normalize)
        if tokenizer.vocab_size != manifest.vocab_size:
            raise InputError(f"{place} has {tokenizer.vocab_size} tokens, config.json says {manifest.vocab_size}")
        weights = read_weights(directory / "model.safetensors", manifest)
        model = cls(manifest.model, tokenizer, schedule, manifest.lengths, manifest.provenance, manifest.objective)
        model.denoiser.load_state_dict(weights)
        model.recipe = read_recipe(directory)
        return model.eval()

    @takes(Continuation)
    def generate(
        self,
        prompts: str | Sequence[str] = ("",),
        n: int = 1,
        *,
        watch: Callable[[StepRecord], object] | None = None,
        progress: Callable[[float], object] | None = None,
        **options: Any,
    ) -> list[Sample]:
        """Continue each prompt `n` times.

        Args:
            prompts: a text to begin with, or several; "" for none.
            n: texts for each prompt.
            watch: called with every `StepRecord`; many texts are written in batches, whose steps count from 1.
            progress: called with the share of the work that is done, from 0 to 1.
            **options: as listed below.

        Returns:
            A list of `Sample` (text, ids, seed, nfe), n for each prompt in order; row i has the seed ``seed + i``.

        Raises:
            InputError: a prompt that does not fit, or a bad option.
        """
        return self._write(self.plan(prompts, n, Continuation.of(**options)), watch, progress)

    @takes(Infilling)
    def infill(
        self,
        texts: str | Sequence[str],
        n: int = 1,
        *,
        watch: Callable[[StepRecord], object] | None = None,
        progress: Callable[[float], object] | None = None,
        **options: Any,
    ) -> list[Sample]:
        """Fill every blank, written as four underscores or more, in each text in `n` ways.

        What is given comes back as it is, every space and line feed included. On paths of blocks a blank does not see
        what is given in later blocks.

        Args:
            texts: one text with blanks, or several.
            n: number of ways.
            watch: called with every `StepRecord`; many texts are written in batches, whose steps count from 1.
            progress: called with the share of the work that is done, from 0 to 1.
            **options: as listed below.

        Returns:
            A list of `Sample` (text, ids, seed, nfe, spans), n for each text in order; row i has the seed ``seed + i``.

        Raises:
            InputError: no blank, a text that does not fit, a bad option, or a model that cannot fill in blanks.
        """
        return self._write(self.plan(texts, n, Infilling.of(**options)), watch, progress)

    def plan(
        self, texts: str | Sequence[str] | Sequence[Sequence[int]], n: int, request: Continuation | Infilling
    ) -> Plan:
        """A request made ready for `loop`, all of it checked; `generate` and `infill` say what is raised.

        A prompt may also be the ids of its tokens, without ``<s>``; they stay as they are.
        """
        draft, settings = self._fills(request) if isinstance(request, Infilling) else self._continues(request)
        return Plan.of([texts] if isinstance(texts, str) else texts, n, draft, settings, self.tokenizer)

    def default_path(self, request: Continuation | Infilling) -> str:
        """The path that a request takes if it names none.

        Texts are continued from left to right, unless an option asks for what has no effect there (`STEPWISE`), or
        held-out text has cost the model more in that order than in any.
        """
        if isinstance(request, Infilling):
            return self.objective.default_path if request.repair is None else self.objective.repair_path
        prices, usual = self.provenance.prices, Continuation()
        asked = any(getattr(request, name) != getattr(usual, name) for name in STEPWISE)
        good = prices.get("ordered", -math.inf) <= prices.get("random", math.inf)
        in_order = "ordered" in self.objective.watched and good and not asked
        return "blocks:1" if in_order else self.objective.default_path

    def _continues(self, request: Continuation) -> tuple[Drafter, Settings]:
        """What drafts the continuation of a prompt, and its settings."""
        settings = self.objective.allows(Settings.of(request, self.default_path(request)))
        closed = settings.path.block != 1 or request.length is not None
        longest = self.max_length if request.max_length is None else request.max_length
        if longest > self.max_length:
            if not settings.path.block or not settings.one_pass:
                raise InputError(
                    f"the model was trained on at most {self.max_length} tokens: only paths of blocks, without "
                    "guidance, can write longer texts"
                )
            settings = replace(settings, window=self.max_length).checked()

        def draft(prompt: str | Sequence[int], rng: np.random.Generator) -> Draft:
            sizes = self.lengths, request.length, longest
            return Draft(prompt_template(prompt, self.tokenizer, *sizes, closed, rng))

        return draft, settings

    def _fills(self, request: Infilling) -> tuple[Drafter, Settings]:
        """What drafts a text with blanks, and its settings."""
        settings = Settings.of(request, self.default_path(request))
        self.objective.allows_infilling(settings)
        words = bool(self._allowed_KV[Hole.WORD.value].any() and self._allowed_KV[Hole.REST.value].any())
        if request.blank_words is not None and not words:
            raise InputError("this model's tokenizer has no tokens to make words of: give blank tokens instead")

        def draft(text: str, rng: np.random.Generator) -> Draft:
            apart = words and (" " in text or not any(c.isalpha() for c in text))  # not so in Chinese, say
            return blank_draft(text, self.tokenizer, self._has_spaces, apart, self.lengths, request, rng)

        return draft, self.objective.allows(settings)

    def loop(self, precision: str = "float32") -> Loop:
        """A loop that requests to this model can join; see `scorelm.sampling.loop.Loop`."""
        network = Network(self.denoiser, self.tokenizer.special, precision, torch.from_numpy(self._allowed_KV))
        return Loop(network, self.schedule, self.objective.evaluator)

    @cached_property
    def _allowed_KV(self) -> NDArray[np.bool_]:
        return tokens_for(self.tokenizer)

    @property
    def _has_spaces(self) -> bool:
        return bool(self._allowed_KV[Hole.SPACE.value].any())

    def _write(
        self,
        plan: Plan,
        watch: Callable[[StepRecord], object] | None,
        progress: Callable[[float], object] | None,
    ) -> list[Sample]:
        """Carry a plan out, in as many batches as it takes."""
        loop = self.loop(plan.settings.options.precision)
        return plan.read(generate_in_batches(loop, plan.templates, plan.seeds, plan.settings, watch, progress))

    def forward(self, *inputs: Any, **options: Any) -> NoReturn:
        """A language model of this kind has no single forward pass.

        Raises:
            InputError: always; says what to call.
        """
        raise InputError(
            "call lm.generate(...), lm.infill(...) or scorelm.price(lm, ...); the network itself is lm.denoiser.predict"
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the model to a device; its weights stay in float32.

        Raises:
            InputError: no such device, or another number format; says what to do.
        """
        if args and isinstance(args[0], str):
            args = (pick_device(args[0]), *args[1:])
        dtype = torch._C._nn._parse_to(*args, **kwargs)[1]
        if dtype is not None:
            self.type(dtype)
        return super().to(*args, **kwargs)

    def type(self, dst_type: torch.dtype | str) -> Self:
        """The weights stay in float32.

        Raises:
            InputError: another number format; says what to do.
        """
        if dst_type != torch.float32:
            raise InputError(
                "the weights stay in float32: pass precision='bfloat16' to generate, infill or price for faster "
                "matrix products"
            )
        return self

    def half(self) -> Self:
        """See `type`."""
        return self.type(torch.float16)

    def bfloat16(self) -> Self:
        """See `type`."""
        return self.type(torch.bfloat16)

    def double(self) -> Self:
        """See `type`."""
        return self.type(torch.float64)

    def push_to_hub(  # type: ignore[override]
        self,
        name: str,
        *,
        licence: str | None = None,
        private: bool | None = None,
        branch: str | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Put the model on the Hugging Face hub, with its card; see `scorelm.model.hub.push`.

        Args:
            name: ``user/name``.
            licence: identifier of the model's licence, as the hub has them: mit, cc0-1.0, ...
            private: whether a new repository is for its owner only.
            branch: to commit to, made if there is none; main by default.
            message: of the commit.
            token: that allows it; by default HF_TOKEN, or what ``hf auth login`` has kept.

        Returns:
            The address of the commit.

        Raises:
            InputError: no name for a repository, no token or one that does not allow it, or no network.
        """

        def save(directory: Path) -> None:
            self.save_pretrained(directory)
            (directory / "README.md").write_text(self.card(name, licence), encoding="utf-8")

        return push(save, name, private=private, branch=branch, message=message, token=token)

    def _save_pretrained(self, save_directory: Path) -> None:
        (save_directory / "config.json").write_text(self.manifest.model_dump_json(indent=2) + "\n")
        weights = {name: t.detach().cpu().contiguous() for name, t in self.denoiser.state_dict().items()}
        save_file(weights, save_directory / "model.safetensors")
        shutil.copymode(save_directory / "config.json", save_directory / "model.safetensors")  # not the owner's only
        for name in FILES:  # that of an older model there may be of another kind
            (save_directory / name).unlink(missing_ok=True)
        self.tokenizer.save(save_directory / self.tokenizer.file_name)
        (save_directory / "README.md").write_text(self.card(), encoding="utf-8")
        if self.recipe:
            (save_directory / "recipe.toml").write_text(self.recipe, encoding="utf-8")

    @property
    def manifest(self) -> Manifest:
        """What config.json says."""
        return Manifest(
            objective=self.objective.name,
            model=self.config,
            vocab_size=self.tokenizer.vocab_size,
            lengths=self.lengths,
            schedule=schedule_to_dict(self.schedule),
            provenance=self.provenance,
        )

    def card(self, name: str = "PATH", licence: str | None = None) -> str:
        """The model card, in Markdown; see `scorelm.model.card`."""
        return model_card(self.manifest, self.objective.title, self.parameters_count, self.recipe, name, licence)
