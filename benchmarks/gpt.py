"""An autoregressive training loop in the manner of nanoGPT on PyTorch's own layers: the peer in ``training.py``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.device import pick_dtype
from scorelm.training.data import TrainingData


class GPT:
    """A GPT: learned positions, pre-norm layers with GELU, a loop of autocast, AdamW and clipping."""

    def __init__(self, dim: int, layers: int, length: int, rows: int, data: TrainingData) -> None:
        torch.manual_seed(0)
        self.dtype, vocabulary = pick_dtype("auto", torch.device("cpu")), data.tokenizer.vocab_size
        norm = nn.LayerNorm(dim, bias=False)
        layer = nn.TransformerEncoderLayer(
            dim, max(1, dim // 64), 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
        )
        self.parts = nn.ModuleDict({
            "token": nn.Embedding(vocabulary, dim), "position": nn.Embedding(length, dim),
            "trunk": nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False),
            "head": nn.Linear(dim, vocabulary, bias=False),
        })  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.parts.parameters(), lr=1e-3, fused=True)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length)
        stream = np.concatenate([np.asarray(ids) for ids in data.documents.train[:20_000]["ids"]])
        self.text, self.shape, self.at = torch.from_numpy(stream), (rows, length), 0
        matrices = sum(p.numel() for p in self.parts["trunk"].parameters() if p.ndim == 2) + vocabulary * dim
        pairs = layers * (length + 1) / 2
        self.flops_per_token = 6 * matrices + 12 * dim * pairs
        self.tokens = 0

    def step(self) -> None:
        """One step on the next rows of the text."""
        rows, length = self.shape
        if self.at + rows * length >= len(self.text):
            self.at = 0
        window = self.text[self.at : self.at + rows * length + 1]
        self.at += rows * length
        ids, targets = window[:-1].view(rows, length), window[1:].view(rows, length)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            h = self.parts["token"](ids) + self.parts["position"](torch.arange(length))
            logits: Tensor = self.parts["head"](self.parts["trunk"](h, self.mask, is_causal=True))
        F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        self.optimizer.step()
        self.tokens += rows * length
