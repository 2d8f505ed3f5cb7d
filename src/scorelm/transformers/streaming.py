"""What a streamer of transformers is told while a text is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from scorelm.errors import InputError
from scorelm.sampling.denoise import StepRecord
from scorelm.sampling.request import Settings

Watch = Callable[[StepRecord], None]
End = Callable[[list[int]], None]


def following(streamer: Any, input_ids: Tensor, prompts: Sequence[list[int]], settings: Settings) -> tuple[Watch, End]:
    """Tell a streamer the prompt, and make what tells it the rest, as ids [1, N] on the CPU.

    Args:
        streamer: with ``put`` and ``end``; with ``put_draft`` it is shown drafts too, as transformers'
            ``TextDiffusionStreamer`` is: all that is not yet final, with ``<pad>`` where the model has not looked.
        input_ids: of the prompt, [1, P].
        prompts: the same without ``<s>`` and what fills it up.
        settings: of the request.

    Returns:
        What is called with the record of each step, and what is called with all new ids in the end.

    Raises:
        InputError: more than one text, or a streamer that asks for logits.
    """
    if len(input_ids) != 1 or settings.options.best_of != 1:
        raise InputError("a streamer follows one text only: one prompt, one sequence, and no best_of")
    if getattr(streamer, "_takes_logits", False):
        raise InputError("this streamer asks for logits, and there are only tokens for it")
    begin, told = 1 + len(prompts[0]), 0
    streamer.put(input_ids.cpu())

    def watch(record: StepRecord) -> None:
        nonlocal told
        new = slice(begin, int(record.length_B[0]))
        ids_N, open_N = record.ids_BL[0, new], record.sigma_BL[0, new] > 0
        final = 0 if settings.path.forgets else int((~open_N).long().cumprod(0).sum())
        if final > told:
            streamer.put(ids_N[None, told:final])
            told = final
        if hasattr(streamer, "put_draft") and told < len(ids_N):
            streamer.put_draft(ids_N[None, told:])

    def end(new: list[int]) -> None:
        if told < len(new):
            streamer.put(torch.tensor([new[told:]]))
        streamer.end()

    return watch, end
