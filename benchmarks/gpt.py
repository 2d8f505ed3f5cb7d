"""An autoregressive training loop in the manner of nanoGPT on PyTorch's own layers: the peer in the benchmarks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.device import pick_dtype
from scorelm.training.data import TrainingData

CPU = torch.device("cpu")


class GPT:
    """A GPT: learned positions, pre-norm layers with GELU, a loop of autocast, AdamW and clipping.

    Its text is on its device from the start, and nothing in a step waits for the device.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        length: int,
        rows: int,
        data: TrainingData,
        device: torch.device = CPU,
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.dtype, vocabulary = device, pick_dtype("auto", device), data.tokenizer.vocab_size
        norm = nn.LayerNorm(dim, bias=False)
        layer = nn.TransformerEncoderLayer(
            dim, max(1, dim // 64), 4 * dim, 0.0, "gelu", batch_first=True, norm_first=True, bias=False
        )
        self.parts = nn.ModuleDict({
            "token": nn.Embedding(vocabulary, dim), "position": nn.Embedding(length, dim),
            "trunk": nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False),
            "head": nn.Linear(dim, vocabulary, bias=False),
        }).to(device)  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.parts.parameters(), lr=1e-3, fused=True)
        self.mask = nn.Transformer.generate_square_subsequent_mask(length, device)
        stream = np.concatenate([np.asarray(ids) for ids in data.documents.train[:20_000]["ids"]])
        self.text, self.shape, self.at = torch.from_numpy(stream).to(device), (rows, length), 0
        matrices = sum(p.numel() for p in self.parts["trunk"].parameters() if p.ndim == 2) + vocabulary * dim
        pairs = layers * (length + 1) / 2
        self.flops_per_token = 6 * matrices + 12 * dim * pairs
        self.tokens = 0
        self.compute_loss = torch.compile(self.loss, dynamic=False) if compiled else self.loss
        self.newest: tuple[Tensor, Tensor]
        """Loss and norm of the gradient of the newest step."""

    def loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of the next tokens."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            position = torch.arange(self.shape[1], device=self.device)
            h = self.parts["token"](ids) + self.parts["position"](position)
            logits: Tensor = self.parts["head"](self.parts["trunk"](h, self.mask, is_causal=True))
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def step(self) -> None:
        """One step on the next rows of the text."""
        rows, length = self.shape
        if self.at + rows * length >= len(self.text):
            self.at = 0
        window = self.text[self.at : self.at + rows * length + 1]
        self.at += rows * length
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.compute_loss(window[:-1].view(rows, length), window[1:].view(rows, length))
        loss.backward()  # type: ignore[no-untyped-call]
        self.newest = loss.detach(), nn.utils.clip_grad_norm_(self.parts.parameters(), 1.0)
        self.optimizer.step()
        self.tokens += rows * length
