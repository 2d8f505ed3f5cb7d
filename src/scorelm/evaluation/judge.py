"""Judges: a language model that others have trained says how likely generated text is (generative perplexity).

Perplexity alone rewards repetition, so read it beside the entropy and MAUVE of ``diversity`` (arXiv 2409.02908).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from scorelm.device import pick_device
from scorelm.errors import InputError
from scorelm.evaluation.rows import RowBatch, batches, cut, most_positions
from scorelm.lm import ScoreLM
from scorelm.model.causal import load_causal, quiet
from scorelm.model.prediction import Prediction
from scorelm.text.batching import by_length, pad

POSITIONS = 2048
"""Most positions in a batch, padding included; a longer text is a batch of its own."""

CHUNK = 128
"""Positions whose log-probabilities are held at a time, in float64."""


class Scores(NamedTuple):
    """What a judge makes of n texts."""

    nats: NDArray[np.float64]
    """Negative log-likelihood of each text, in nats: [n]."""
    tokens: NDArray[np.int64]
    """Number of the judge's tokens that these nats are for: [n]."""
    cut: int = 0
    """How many of the texts were longer than the judge's context, so that their ends do not count."""
    unspelled: int = 0
    """How many of the texts have characters that the judge cannot spell, which make them look too likely."""


class Judge(Protocol):
    """Whatever can price texts and describe them by vectors."""

    name: str
    context: int | None
    """Most tokens in a text; what is longer is cut. None where texts of any length are judged whole."""

    def score(self, texts: Sequence[str]) -> Scores:
        """Negative log-likelihood of each text."""

    def features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The last hidden state at each text's last token, for MAUVE: [n, D]."""


class HuggingFaceJudge:
    """Any causal language model of Hugging Face transformers, in fp32.

    A row is the tokenizer's BOS token (or else its EOS token), the text, and its EOS token if it has one: the first
    token and the end are priced too, BOS is not. Rows are cut at the model's longest context. Names of special tokens
    in a text are plain text. Only safetensors and GGUF are read, and no code of the model's repository is run.

    Args:
        name: a directory, a name on the Hugging Face hub, or a GGUF file, whose weights are dequantized.
        device: where to compute; CUDA if there is one by default.

    Raises:
        InputError: transformers is not installed, or the model cannot be loaded or used.
    """

    def __init__(self, name: str, device: str | None = None) -> None:
        self.name = name
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._tokenizer, self._model = load_causal(name, f"judge {name}")
        self._model.to(self.device)
        if len(self._tokenizer) <= len(self._tokenizer.all_special_ids):
            raise InputError(f"judge {name} has a tokenizer without a vocabulary")
        bos, self._eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self._bos = self._eos if bos is None else bos
        if self._bos is None:
            raise InputError(f"judge {name} has neither a BOS nor an EOS token, so that nothing can start a text")
        rows = self._model.get_input_embeddings().num_embeddings
        if len(self._tokenizer) > rows:
            raise InputError(f"judge {name} has {len(self._tokenizer)} tokens but only {rows} embeddings")
        context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self.context: int | None = min(int(limit) for limit in (context, self._tokenizer.model_max_length) if limit)

    def score(self, texts: Sequence[str]) -> Scores:
        """Negative log-likelihood of each text in nats, and the number of tokens that it is for, EOS included."""
        end = [] if self._eos is None else [self._eos]
        encoded = [self._encode(text) for text in texts]
        rows = [[*ids, *end][: self.context] for ids in encoded]
        nats = np.zeros(len(rows))
        for chosen, ids_BL, mask_BL in self._batches(rows):
            with torch.inference_mode(), quiet():
                logits_BLV = self._model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False).logits
                nats[chosen] = (_nll(logits_BLV, ids_BL) * mask_BL[:, 1:]).sum(1).cpu().numpy()
        cut = sum(len(row) < len(ids) + len(end) for row, ids in zip(rows, encoded, strict=True))
        unspelled = sum(self._tokenizer.unk_token_id in ids[1:] for ids in encoded)
        return Scores(nats, np.array([len(row) - 1 for row in rows], dtype=np.int64), cut, unspelled)

    def features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The last hidden state, after the final norm, at each text's last token (an empty text's BOS): [n, D].

        Raises:
            InputError: no texts.
        """
        if not len(texts):
            raise InputError("there are no texts to take features of")
        rows = [self._encode(text)[: self.context] for text in texts]
        found: dict[int, NDArray[np.float32]] = {}
        for chosen, ids_BL, mask_BL in self._batches(rows):
            with torch.inference_mode(), quiet():
                trunk = self._model.base_model(input_ids=ids_BL, attention_mask=mask_BL, use_cache=False)
                last_BD = trunk.last_hidden_state[torch.arange(len(chosen)), mask_BL.sum(1) - 1]
            found |= zip(chosen, last_BD.cpu().numpy(), strict=True)
        return np.stack([found[i] for i in range(len(rows))])

    def _encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [self._bos, *ids]

    def _batches(self, rows: list[list[int]]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Numbers of rows of about one length, their ids and which of these are not padding: both [B, L] int64."""
        for chosen in by_length([len(row) for row in rows], POSITIONS):
            ids_BL, length_B = map(torch.from_numpy, pad([rows[i] for i in chosen], self._bos))
            mask_BL = (torch.arange(ids_BL.shape[1]) < length_B[:, None]).long()
            yield chosen, ids_BL.to(self.device), mask_BL.to(self.device)


class AutoregressiveJudge:
    """An autoregressive model of this library, exact on every token but ``<s>``.

    Args:
        lm: the model.
        name: how it is called.

    Raises:
        InputError: a model with another objective.
    """

    def __init__(self, lm: ScoreLM, name: str) -> None:
        if not lm.objective.judges:
            raise InputError(f"judge {name} is a {lm.objective.name} model: only autoregressive ones judge")
        self.lm, self.name, self._positions = lm, name, most_positions(lm.tokenizer.vocab_size, lm.device)
        self.context: int | None = None

    @torch.inference_mode()
    def score(self, texts: Sequence[str]) -> Scores:
        """Exact NLL of each text, ``</s>`` included; what the judge cannot spell is ``<unk>`` to it."""
        rows = cut(texts, self.lm.tokenizer, self.lm.max_length)
        nats = torch.zeros(len(rows.ids), dtype=torch.float64)
        for batch in batches(rows.ids, self.lm.device, self.lm.tokenizer.special, self._positions):
            free_BL = batch.free(closed=False)
            logits_NV = self._next(batch, free_BL).logits_NV
            nats_N = cross_entropy(logits_NV, batch.ids_BL[free_BL], reduction="none")
            nats[batch.index] = batch.totals(nats_N, free_BL).cpu()
        unspelled = len(rows.holding(self.lm.tokenizer.special.unk))
        return Scores(rows.by_text(nats).numpy(), (rows.tokens - 1).long().numpy(), 0, unspelled)

    @torch.inference_mode()
    def features(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """The trunk's output where ``</s>`` is predicted, from all of the text (of a long one, its first row)."""
        rows = cut(texts, self.lm.tokenizer, self.lm.max_length)
        found = torch.zeros(len(texts), self.lm.config.dim)
        for batch in batches(rows.ids, self.lm.device, self.lm.tokenizer.special, self._positions):
            last_BL = batch.position_BL == batch.real_BL.sum(1, keepdim=True) - 1
            hidden_BD = self._next(batch, last_BL).hidden_ND.float().cpu()
            for place, row in enumerate(batch.index):
                if row == 0 or rows.text[row - 1] != rows.text[row]:
                    found[rows.text[row]] = hidden_BD[place]
        return found.numpy()

    def _next(self, batch: RowBatch, open_BL: Tensor) -> Prediction:
        lm = self.lm
        return lm.objective.next_tokens(
            lm.denoiser, batch.ids_BL, batch.real_BL, batch.position_BL, open_BL, lm.tokenizer.special
        )


def load_judge(name: str, device: str = "auto") -> Judge:
    """The judge of that name: a model of this library, or a causal language model of transformers.

    Args:
        name: a directory, a name on the hub, or a GGUF file.
        device: where it computes; auto takes a GPU if there is one.

    Raises:
        InputError: it is not autoregressive, or it cannot be loaded.
    """
    where = pick_device(device)
    if any(_is_scorelm(directory) for directory in (Path(name), Path(name) / "model")):
        return AutoregressiveJudge(ScoreLM.from_pretrained(name).to(where), name)
    return HuggingFaceJudge(name, str(where))


def perplexity(scores: Scores) -> float:
    """exp(nats / tokens) over all texts: the perplexity of a token of the judge.

    Raises:
        InputError: the texts have no tokens.
    """
    tokens = int(scores.tokens.sum())
    if not tokens:
        raise InputError("the texts have no tokens to take a perplexity over")
    return math.exp(scores.nats.sum() / tokens)


def perplexity_interval(scores: Scores, seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """95% percentile bootstrap interval of the perplexity, texts drawn with replacement (Efron 1979).

    Raises:
        InputError: the texts have no tokens, or `resamples` is below 1.
    """
    if resamples < 1:
        raise InputError(f"the bootstrap takes at least 1 resample, not {resamples}")
    perplexity(scores)
    nats, tokens = scores.nats[scores.tokens > 0], scores.tokens[scores.tokens > 0]
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(len(nats), size=len(nats)) for _ in range(resamples))
    means = np.array([nats[texts].sum() / tokens[texts].sum() for texts in drawn])
    low, high = np.exp(np.quantile(means, [0.025, 0.975]))
    return float(low), float(high)


def _nll(logits_BLV: Tensor, ids_BL: Tensor) -> Tensor:
    """Negative log-likelihood in nats of each token but the first, [B, L - 1] float64; a few positions at a time."""
    logits_NV, next_N = logits_BLV.flatten(0, 1), ids_BL.roll(-1, 1).flatten()
    parts = [
        cross_entropy(logits_NV[start : start + CHUNK].double(), next_N[start : start + CHUNK], reduction="none")
        for start in range(0, ids_BL.numel(), CHUNK)
    ]
    return torch.cat(parts).view_as(ids_BL)[:, :-1]


def _is_scorelm(directory: Path) -> bool:
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "format" in config
