"""Pipeline: generation called as the pipelines of diffusers are, a thin layer over `ScoreLM`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from scorelm.config.generation import Continuation, takes
from scorelm.errors import InputError
from scorelm.lm import ScoreLM
from scorelm.noise.schedule import Schedule
from scorelm.sampling.denoise import StepRecord
from scorelm.sampling.loop import noise_left
from scorelm.sampling.plan import Plan
from scorelm.sampling.sample import Sample

StepEnd = Callable[["Pipeline", int, float, dict[str, Tensor]], dict[str, Tensor]]
"""``callback(pipe, step_index, level, tensors)``, which returns the tensors."""


@dataclass(frozen=True)
class PipelineOutput:
    """What a call of a pipeline comes to."""

    samples: list[Sample]
    """Each text with its ids, seed and evaluations."""

    @property
    def texts(self) -> list[str]:
        """The texts only."""
        return [sample.text for sample in self.samples]


class Pipeline:
    """A model that is called as the pipelines of diffusers are.

    >>> pipe = Pipeline.from_pretrained("runs/kjv")
    >>> pipe("In the beginning", generator=torch.Generator().manual_seed(5)).texts[0]

    A callback that sets ``pipe._interrupt = True`` stops the call after that step, as in diffusers.

    Args:
        lm: the model, also for what a pipeline does not do, such as ``pipe.lm.infill``.
    """

    def __init__(self, lm: ScoreLM) -> None:
        self.lm = lm
        self._interrupt = False

    @classmethod
    def from_pretrained(cls, model: str | Path | None = None, **hub_options: Any) -> Self:
        """Load a model; see `ScoreLM.from_pretrained`."""
        return cls(ScoreLM.from_pretrained(model, **hub_options))

    def to(self, device: str | torch.device) -> Self:
        """Move the model to a device; see `ScoreLM.to`."""
        self.lm.to(device)
        return self

    @takes(Continuation)
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        num_inference_steps: int | None = None,
        generator: torch.Generator | None = None,
        num_texts_per_prompt: int = 1,
        callback_on_step_end: StepEnd | None = None,
        **options: Any,
    ) -> PipelineOutput:
        """Continue each prompt `num_texts_per_prompt` times.

        Args:
            prompt: a text to begin with, or several; "" for none.
            num_inference_steps: most evaluations of the network for a text, which other calls know as steps.
            generator: draws the seed of the first text; by default PyTorch's global one does. A seed among the options
                takes its place.
            num_texts_per_prompt: texts for each prompt.
            callback_on_step_end: called after every step with this pipeline, the index of the step from 0, the share
                of the noise that is left, from 1 to 0 (left to right, it falls at the end, with the positions that
                stay empty), and the tensors ids, sigma and entropy of all texts, [B, L] on the CPU, as `StepRecord`
                describes them. It returns the tensors; it may look at them only.
            **options: as listed below.

        Returns:
            The texts and all that is known of them, in the order of the prompts. Of an interrupted call, what is
            written and, except left to right, the likeliest tokens elsewhere.

        Raises:
            InputError: a prompt that does not fit, a bad option, or a callback that returns other tensors.
        """
        self._interrupt = False
        if "steps" in options:
            raise InputError("a pipeline calls steps num_inference_steps")
        seed = pick_seed(options.pop("seed", None), generator)
        request = Continuation.of(steps=num_inference_steps, seed=seed, **options)
        plan = self.lm.plan(prompt, num_texts_per_prompt, request)
        loop = self.lm.loop(request.precision)
        watch = None if callback_on_step_end is None else self._telling(callback_on_step_end, plan, loop.schedule)
        job = loop.join(plan.templates, plan.seeds, plan.settings, watch=watch)
        try:
            while not job.finished:
                loop.step()
            rows = job.rows()
        except _InterruptedError as interrupted:
            rows = interrupted.rows
        return PipelineOutput(plan.read(rows))

    def _telling(self, callback: StepEnd, plan: Plan, schedule: Schedule) -> Callable[[StepRecord], None]:
        """What tells a callback of the record of each step."""
        free = sum(not isinstance(token, int) for template in plan.templates for token in template)

        def tell(record: StepRecord) -> None:
            tensors = {"ids": record.ids_BL, "sigma": record.sigma_BL, "entropy": record.entropy_BL}
            level = noise_left(record.sigma_BL, schedule) / free
            check_same(callback(self, record.step - 1, level, dict(tensors)), tensors)
            if self._interrupt:
                raise _InterruptedError(record)

        return tell


class _InterruptedError(Exception):
    """A callback has asked to stop after a step; `rows` are as `Job.rows` has them."""

    def __init__(self, record: StepRecord) -> None:
        state = zip(record.ids_BL.tolist(), record.length_B.tolist(), record.nfe_B.tolist(), strict=True)
        self.rows = [(ids[:length], nfe) for ids, length, nfe in state]


def pick_seed(seed: int | None, generator: torch.Generator | None) -> int:
    """The seed of a call: the one that is given, or one that a generator draws, by default PyTorch's global one.

    Raises:
        InputError: both are given, or something that is no generator.
    """
    if seed is not None and generator is not None:
        raise InputError("give either a seed or a generator, not both")
    if seed is not None:
        return seed
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a torch.Generator, one for all texts, not {type(generator).__name__}")
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=device))


def check_same(returned: object, tensors: dict[str, Tensor]) -> None:
    """See that a callback has not tried to change what is written.

    Raises:
        InputError: it returns something else than the tensors it was given, or a part of them.
    """
    if not isinstance(returned, dict) or any(tensors.get(name) is not tensor for name, tensor in returned.items()):
        raise InputError("a callback returns the tensors that it was given: what is written cannot be changed in it")
