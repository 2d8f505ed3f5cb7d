"""Prompts as transformers passes them, and texts as it expects them back: rows of ids, filled up with ``<pad>``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scorelm.errors import InputError
from scorelm.text.tokenizer import Tokenizer, check_ids


def read_prompts(
    input_ids: Tensor | None, attention_mask: Tensor | None, tokenizer: Tokenizer
) -> tuple[Tensor, list[list[int]]]:
    """The rows, and the ids of each prompt without ``<s>`` and what fills it up.

    Args:
        input_ids: [B, P]; None is one empty prompt.
        attention_mask: [B, P], 0 where a row is filled up; None is 0 where it has ``<pad>``.
        tokenizer: of the model.

    Raises:
        InputError: no such rows, ids outside the vocabulary, or a prompt with an end or a second beginning in it.
    """
    special = tokenizer.special
    if input_ids is None:
        input_ids, attention_mask = torch.tensor([[special.bos]]), None
    if input_ids.ndim != 2 or not len(input_ids) or input_ids.dtype not in (torch.int64, torch.int32):
        raise InputError("input_ids are whole numbers, one row for each prompt: tokenizer(texts, return_tensors='pt')")
    mask = input_ids != special.pad if attention_mask is None else attention_mask.bool()
    if mask.shape != input_ids.shape:
        raise InputError(f"attention_mask has the shape {list(mask.shape)}, but input_ids {list(input_ids.shape)}")
    prompts = []
    for ids_P, mask_P in zip(input_ids, mask, strict=True):
        ids = check_ids(ids_P[mask_P].tolist(), tokenizer.vocab_size)
        ids = ids[1:] if ids[:1] == [special.bos] else ids
        if {special.bos, special.eos, special.pad} & set(ids):
            raise InputError("a prompt has <s> only in front, and neither </s> nor <pad> in it: it is to be continued")
        prompts.append(ids)
    return input_ids, prompts


def continued(input_ids: Tensor, new: Sequence[list[int]], pad: int) -> Tensor:
    """Rows [B, P] with the new ids of each behind them, [B, P + N], filled up behind the shorter ones."""
    longest = max(map(len, new), default=0)
    rows = [ids + [pad] * (longest - len(ids)) for ids in new]
    return torch.cat([input_ids, input_ids.new_tensor(rows).reshape(len(rows), longest)], 1)
