"""A model as transformers knows models: `ScoreLM` behind ``from_pretrained``, ``generate`` and ``save_pretrained``."""

# mypy: allow-untyped-calls
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from scorelm.config.generation import Continuation, takes
from scorelm.errors import InputError
from scorelm.lm import ScoreLM
from scorelm.pipeline import pick_seed
from scorelm.sampling.loop import generate_in_batches
from scorelm.sampling.plan import Plan
from scorelm.transformers.export import export
from scorelm.transformers.prompts import continued, read_prompts
from scorelm.transformers.streaming import following

HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
"""What transformers is told of the hub, and the hub's own client knows by the same name."""
ABOUT_CODE = ("trust_remote_code", "code_revision", "adapter_kwargs", "_from_auto")
"""What transformers passes on of the way by which it came here."""


class ScoreLMConfig(PreTrainedConfig):
    """What config.json says; under ``scorelm`` stands what `ScoreLM` reads of it."""

    model_type = "scorelm"


class ScoreLMModel(PreTrainedModel):
    """A model of scorelm in transformers; ``model.lm`` is the `ScoreLM` itself, also for ``model.lm.infill``.

    Args:
        config: as it was read.
        lm: the model.

    Raises:
        InputError: there is no model; says how to load one.
    """

    config_class = ScoreLMConfig

    def __init__(self, config: PreTrainedConfig, lm: ScoreLM | None = None) -> None:
        if lm is None:
            raise InputError("a model of scorelm is loaded with from_pretrained, and trained with scorelm train")
        super().__init__(config)
        self.lm = lm

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: PreTrainedConfig | None = None,
        device_map: str | int | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        torch_dtype: str | torch.dtype | None = None,
        **options: Any,
    ) -> Self:
        """Load a model from a directory or the hub, as `ScoreLM.from_pretrained` does.

        Args:
            pretrained_model_name_or_path: the directory, or a name on the hub.
            config: what was read of its config.json.
            device_map: one device for the whole model; "auto" takes a GPU if there is one.
            dtype: float32 or "auto", which is the same here.
            torch_dtype: the older name of dtype.
            **options: of the hub: cache_dir, force_download, local_files_only, revision, token.

        Raises:
            InputError: no such model, a damaged one, or an option that cannot be followed.
        """
        for kind in (dtype, torch_dtype):
            if kind not in (None, "auto", "float32", torch.float32):
                raise InputError("the weights stay in float32: pass precision='bfloat16' to generate instead")
        hub = {name: options[name] for name in HUB if options.get(name) is not None}
        refuse({name: value for name, value in options.items() if name not in (*HUB, *ABOUT_CODE)}, "from_pretrained")
        lm = ScoreLM.from_pretrained(pretrained_model_name_or_path, **hub)
        if device_map is not None:
            lm.to(f"cuda:{device_map}" if isinstance(device_map, int) else device_map)
        if config is None:
            config = ScoreLMConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        model = cls(config, lm)
        model.eval()
        return model

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, max_shard_size: Any = None, **options: Any
    ) -> None:
        """Write a directory like the one that the model was loaded from; see `scorelm.transformers.export.export`.

        Args:
            save_directory: where to; made if there is none.
            max_shard_size: says nothing, for the weights are one file.
            **options: none.

        Raises:
            InputError: another option, or a directory that cannot be written.
        """
        refuse(options, "save_pretrained")
        export(self.lm, Path(save_directory))

    @takes(Continuation)
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int | None = None,
        do_sample: bool | None = None,
        num_return_sequences: int = 1,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        streamer: Any = None,
        **options: Any,
    ) -> Tensor:
        """Continue each prompt `num_return_sequences` times, as `ScoreLM.generate` does.

        Args:
            input_ids: ids of the prompts, [B, P]; by default one empty prompt.
            attention_mask: [B, P], 0 where a row is filled up; by default where it has ``<pad>``.
            max_new_tokens: most tokens to write, ``</s>`` among them.
            do_sample: False takes the likeliest token always.
            num_return_sequences: texts for each prompt.
            num_steps: most evaluations of the network for a text, which other calls know as steps.
            generator: draws the seed of the first text, if none is given; by default PyTorch's global one does.
            streamer: is given the prompt, then tokens in their order as soon as they are written. One with a method
                put_draft is shown after every step what the rest looks like. It follows one text only.
            **options: as listed below; None stands for the default.

        Returns:
            Ids of prompts and texts, [B * num_return_sequences, P + N] on the device of the prompts, with ``<pad>``
            behind the shorter ones.

        Raises:
            InputError: a prompt that does not fit, or an option that cannot be followed.
        """
        given = {name: value for name, value in options.items() if value is not None}
        given |= renamed(given, max_new_tokens, do_sample, num_steps)
        seed = pick_seed(given.pop("seed", None), generator)
        special = self.lm.tokenizer.special
        input_ids, prompts = read_prompts(input_ids, attention_mask, self.lm.tokenizer)
        plan = self._plan(prompts, num_return_sequences, given, seed, max_new_tokens)
        input_ids = input_ids.repeat_interleave(num_return_sequences, 0)
        watch, end = following(streamer, input_ids, prompts, plan.settings) if streamer is not None else (None, None)
        loop = self.lm.loop(plan.settings.options.precision)
        samples = plan.read(generate_in_batches(loop, plan.templates, plan.seeds, plan.settings, watch))
        begins = [1 + len(prompt) for prompt in prompts for _ in range(num_return_sequences)]
        new = [sample.ids[begin:] for sample, begin in zip(samples, begins, strict=True)]
        if end is not None:
            end(new[0])
        return continued(input_ids, new, special.pad)

    def _plan(self, prompts: Sequence[list[int]], n: int, options: dict[str, Any], seed: int, most: int | None) -> Plan:
        """All prompts in one plan, each with as many new tokens as it may have; seeds as `ScoreLM.plan` has them."""
        plans: list[Plan] = []
        for prompt in prompts:
            own = {} if most is None else {"max_length": 1 + len(prompt) + most}
            rows = sum(len(plan.seeds) for plan in plans)
            plans.append(self.lm.plan([prompt], n, Continuation.of(seed=seed + rows, **options, **own)))
        widest = max(plans, key=lambda plan: plan.settings.window)
        drafts = [draft for plan in plans for draft in plan.drafts]
        return Plan(drafts, [seed for plan in plans for seed in plan.seeds], widest.settings, widest.tokenizer)

    def forward(self, *inputs: Any, **options: Any) -> NoReturn:
        """See `ScoreLM.forward`, which says what to call instead."""
        self.lm.forward(*inputs, **options)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Whatever moves or converts the weights comes here; they stay in float32."""
        self.lm.type(fn(torch.zeros(())).dtype)
        super()._apply(fn, recurse)
        return self


def renamed(given: dict[str, Any], new: int | None, sample: bool | None, steps: int | None) -> dict[str, Any]:
    """Options of transformers by the names that they have here.

    Raises:
        InputError: two of them contradict each other, or the number of new tokens is not above 0.
    """
    if new is not None and "max_length" in given:
        raise InputError("give either max_new_tokens or max_length, not both")
    if new is not None and new < 1:
        raise InputError(f"max_new_tokens is 1 or more, got {new}")
    if steps is not None and "steps" in given:
        raise InputError("give either num_steps or steps, which are the same")
    if sample is False and "temperature" in given:
        raise InputError("do_sample=False takes the likeliest token always: leave temperature out")
    found = {"steps": steps, "temperature": 0.0 if sample is False else None}
    return {name: value for name, value in found.items() if value is not None}


def refuse(options: dict[str, Any], where: str) -> None:
    """Raise an InputError for options of transformers that cannot be followed; unset ones are none."""
    named = sorted(name for name, value in options.items() if value not in (None, False))
    if named:
        raise InputError(f"{where} of a model of scorelm does not know {', '.join(named)}: leave it out")
