"""Backbones of published families, which take the weights of a pretrained network: BERT, ModernBERT and Llama.

What decides who sees whom is the layout, as in our own network: whole documents see both ways, and under
`Layout.causal` a network of Llama's family computes what it was trained to.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from scorelm.config.network import Network
from scorelm.config.recipe import ModelConfig
from scorelm.model.attention import AttentionInputs, attention_inputs
from scorelm.model.backbone import Backbone
from scorelm.model.kernels import Dropout, rotate
from scorelm.model.layout import Layout


class GroupedAttention(nn.Module):
    """Self-attention in which groups of queries share keys and values (arXiv 2305.13245); rotary where `rotary`."""

    def __init__(self, dim: int, heads: int, kv_heads: int, *, bias: bool, rotary: bool) -> None:
        super().__init__()
        self.heads, self.rotary = (heads, kv_heads, kv_heads), rotary
        self.qkv = nn.Linear(dim, sum(self.heads) * (dim // heads), bias=bias)
        self.out = nn.Linear(dim, dim, bias=bias)
        self.dropout = Dropout()

    def forward(self, h_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        q, k, v = self.qkv(h_BLD).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        if self.rotary:
            q, k = (rotate(t.float().contiguous(), inputs.rotation_BLK2).to(t.dtype) for t in (q, k))
        result: Tensor = self.dropout(self.out(inputs.attend(q, k, v).flatten(2)))
        return result


class BertBlock(nn.Module):
    """Attention and a GELU layer, each followed by a LayerNorm of the sum (arXiv 1810.04805)."""

    def __init__(self, dim: int, heads: int, hidden: int, network: Network) -> None:
        super().__init__()
        self.attention = GroupedAttention(dim, heads, network.kv_heads, bias=True, rotary=False)
        self.attention_norm = nn.LayerNorm(dim, network.norm_eps)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = Dropout()
        self.norm = nn.LayerNorm(dim, network.norm_eps)

    def forward(self, h_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        h_BLD = self.attention_norm(h_BLD + self.attention(h_BLD, inputs))
        result: Tensor = self.norm(h_BLD + self.dropout(self.down(F.gelu(self.up(h_BLD)))))
        return result


class GatedBlock(nn.Module):
    """Attention and a gated layer, each on a normalised input: RMS norm with a gain, and SwiGLU (arXiv 2302.13971)."""

    def __init__(self, dim: int, heads: int, hidden: int, network: Network) -> None:
        super().__init__()
        self.attention_norm = self.make_norm(dim, network)
        self.attention = GroupedAttention(dim, heads, network.kv_heads, bias=False, rotary=True)
        self.norm = self.make_norm(dim, network)
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.dropout = Dropout()

    def forward(self, h_BLD: Tensor, inputs: AttentionInputs) -> Tensor:
        h_BLD = h_BLD + self.attention(self.attention_norm(h_BLD), inputs)
        gate, value = self.up(self.norm(h_BLD)).chunk(2, dim=-1)
        result: Tensor = h_BLD + self.dropout(self.down(self.activate(gate) * value))
        return result

    def make_norm(self, dim: int, network: Network) -> nn.Module:
        """What comes before each of the two."""
        return nn.RMSNorm(dim, network.norm_eps)

    def activate(self, gate_BLH: Tensor) -> Tensor:
        """What a gate opens by."""
        return F.silu(gate_BLH)


class ModernBertBlock(GatedBlock):
    """The same with a LayerNorm that has no bias, and GeGLU (arXiv 2412.13663)."""

    def make_norm(self, dim: int, network: Network) -> nn.Module:
        return nn.LayerNorm(dim, network.norm_eps, bias=False)

    def activate(self, gate_BLH: Tensor) -> Tensor:
        return F.gelu(gate_BLH)


class Pretrained(Backbone):
    """What the families have in common; a subclass reads its input and its output."""

    block: type[BertBlock] | type[GatedBlock]

    def __init__(self, config: ModelConfig, network: Network) -> None:
        super().__init__()
        dim, layers, heads, hidden = config.size
        self.dim, self.head_dim, self.network = dim, dim // heads, network
        self.blocks = nn.ModuleList(self.block(dim, heads, hidden, network) for _ in range(layers))

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Layers, heads of keys, and size of a head."""
        return len(self.blocks), self.network.kv_heads, self.head_dim

    def through(self, h_BLD: Tensor, layout: Layout) -> Tensor:
        """All blocks, one after the other."""
        network = self.network
        for k, block in enumerate(self.blocks):
            kind = (network.reach_base, network.reach) if k % network.every else (network.rotary_base, None)
            h_BLD = block(h_BLD, attention_inputs(layout, self.head_dim, self.training, *kind))
        return h_BLD

    def make_head(self, *, bias: bool) -> nn.Sequential | None:
        """What an encoder's head for masked tokens does before its table, where the network has one."""
        eps = self.network.norm_eps
        parts = nn.Linear(self.dim, self.dim, bias=bias), nn.GELU(), nn.LayerNorm(self.dim, eps, bias=bias)
        return nn.Sequential(*parts) if self.network.head else None


class Bert(Pretrained):
    """BERT's encoder: learned absolute positions, and at the end what its head for masked tokens does before its table.

    Positions beyond the last that it has are read as the last.
    """

    block = BertBlock

    def __init__(self, config: ModelConfig, network: Network) -> None:
        super().__init__(config, network)
        self.position = nn.Embedding(network.positions, self.dim)
        self.norm = nn.LayerNorm(self.dim, network.norm_eps)
        self.head = self.make_head(bias=True)

    def forward(self, h_BLD: Tensor, sigma_BL: Tensor, layout: Layout) -> Tensor:
        position_BL = layout.position_BL.clamp(max=self.network.positions - 1)
        h_BLD = self.through(self.norm(h_BLD + self.position(position_BL)), layout)
        return h_BLD if self.head is None else self.head(h_BLD)


class ModernBert(Pretrained):
    """ModernBERT's encoder: rotary positions, and layers most of which see only what is near (arXiv 2412.13663)."""

    block = ModernBertBlock

    def __init__(self, config: ModelConfig, network: Network) -> None:
        super().__init__(config, network)
        self.first_norm = nn.LayerNorm(self.dim, network.norm_eps, bias=False)
        self.blocks[0].attention_norm = nn.Identity()
        self.norm = nn.LayerNorm(self.dim, network.norm_eps, bias=False)
        self.head = self.make_head(bias=False)

    def forward(self, h_BLD: Tensor, sigma_BL: Tensor, layout: Layout) -> Tensor:
        h_BLD = self.norm(self.through(self.first_norm(h_BLD), layout))
        return h_BLD if self.head is None else self.head(h_BLD)


class Llama(Pretrained):
    """Llama's decoder without its causal mask: rotary positions, and a norm at the end."""

    block = GatedBlock

    def __init__(self, config: ModelConfig, network: Network) -> None:
        super().__init__(config, network)
        self.norm = nn.RMSNorm(self.dim, network.norm_eps)

    def forward(self, h_BLD: Tensor, sigma_BL: Tensor, layout: Layout) -> Tensor:
        result: Tensor = self.norm(self.through(h_BLD, layout))
        return result


FAMILIES: dict[str, type[Pretrained]] = {"bert": Bert, "modernbert": ModernBert, "llama": Llama}
