"""A small network of random weights, and what it says of one row alone, every pass written out."""

import math
from functools import cache

import torch
from torch import nn

from scorelm.config.recipe import ModelConfig
from scorelm.evaluation.rows import cut
from scorelm.lm import ScoreLM
from scorelm.model.directory import Provenance
from scorelm.model.layout import CLEAN, NOISY, Layout
from scorelm.noise.schedule import Log
from scorelm.sampling.evaluator import Network
from scorelm.text.sentencepiece import SentencePieceTokenizer

from ..conftest import LINES, SPECIAL
from .exact import BOS, EOS, PAD, UNK

TEXTS = ["god said", "let there be light", "void", "and the earth was without form and void", "day 2", "", "light"]
VOCAB = 60


@cache
def tokenizer():
    return SentencePieceTokenizer.train(LINES, VOCAB, byte_fallback=False)


@cache
def make_model(objective="score", tells_next_token=False):
    """A small model with nothing at zero, for rows of up to 20 tokens; what is never written is likely to it."""
    torch.manual_seed(0)
    config = ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=8)
    lm = ScoreLM(
        config,
        tokenizer(),
        Log(0.5, 20.0),
        [0, 0, *range(1, 20)],
        Provenance(tells_next_token=tells_next_token),
        objective,
    )
    for parameter in lm.denoiser.parameters():
        nn.init.normal_(parameter, std=0.25)
    nn.init.normal_(lm.denoiser.context.weight, std=0.4)
    nn.init.normal_(lm.denoiser.embedding.weight)
    with torch.no_grad():
        lm.denoiser.prior[[BOS, EOS, UNK]] = 3.0
    return lm.eval()


def network(objective="score"):
    return Network(make_model(objective).denoiser, SPECIAL)


@cache
def some_rows():
    """Rows of several lengths; the last two are one text that was cut, so that ``<s>`` or ``</s>`` is missing."""
    rows = cut([TEXTS[0], TEXTS[4], TEXTS[3]], tokenizer(), 20).ids
    assert len(rows) == 4 and rows[3][0] != BOS and rows[2][-1] != EOS
    return rows


def evaluate(lm, ids, sigma, eps_LE=None, block=None, stream=None, passes=1, closed=True, raw=False):
    """Logits [L, V] of one row alone, every pass written out, 0 where sigma is.

    Args:
        lm: the model.
        ids: tokens of the row.
        sigma: a level for each.
        eps_LE: noise for those between 0 and inf.
        block: number of each one's block; all in one after ``<s>`` unless given.
        stream: of each one.
        passes: evaluations, each fed the estimate of the one before.
        closed: whether ``</s>`` is ruled out, since it is known where the row ends and whether it does.
        raw: rule out nothing.
    """
    sigma_1L = torch.tensor([sigma], dtype=torch.float32)
    table_VE = lm.denoiser.embedding.table()
    x_1LE = table_VE[torch.tensor([ids])].clone()
    for i, level in enumerate(sigma):
        if math.isinf(level):
            x_1LE[0, i] = 0
        elif level:
            x_1LE[0, i] += level * eps_LE[i]
    start = [i == 0 and ids[0] == BOS for i in range(len(ids))]
    block = block or [int(not s) for s in start]
    stream = stream or [CLEAN if s else NOISY for s in start]
    layout = Layout(*(torch.tensor([t]) for t in ([1] * len(ids), list(range(len(ids))), block, stream)))
    self_cond_1LE = None
    for _ in range(passes):
        seen = lm.denoiser.predict(x_1LE, sigma_1L, layout, self_cond_1LE)
        self_cond_1LE = seen.spread(seen.logits_NV.softmax(-1) @ table_VE)
    logits_LV = seen.spread(seen.logits_NV)[0].double()
    if raw:
        return logits_LV
    logits_LV[:, [BOS, PAD, UNK]] = -math.inf
    if closed:
        logits_LV[:, EOS] = -math.inf
    return logits_LV


def next_logits(lm, ids):
    """Logits of the token after `ids` by an autoregressive model, on that prefix alone: no padding, no cache."""
    read = [BOS, *ids]
    layout = Layout.causal(torch.ones(1, len(read), dtype=torch.long), torch.arange(len(read))[None])
    h_1LD = lm.denoiser.backbone(lm.denoiser.token_in[torch.tensor([read])], torch.zeros(1, len(read)), layout)
    return (lm.denoiser.context.weight.double() @ h_1LD[0, -1].double()) + lm.denoiser.prior.double()


def writable(logits_V):
    """Logits without what is never written."""
    logits_V = logits_V.clone()
    logits_V[[BOS, PAD, UNK]] = -torch.inf
    return logits_V


def cross_entropy(logits_V, token):
    return float((logits_V.logsumexp(-1) - logits_V[token]).detach())


def free_places(ids, closed):
    """All but ``<s>`` at the front and, where the length is known, ``</s>``."""
    return [i for i, t in enumerate(ids) if not (i == 0 and t == BOS) and not (closed and t == EOS)]
