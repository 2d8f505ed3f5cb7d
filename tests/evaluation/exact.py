"""Laws over short documents whose posterior is known: every text is enumerated and Bayes' rule is summed over all.

`Exact` stands where the denoiser stands. It reads noisy embeddings, levels and layout as a network would, by its own
reading of the visibility rule, and knows what is cached from the keys only, in which it writes its token ids.
"""

import itertools
import math
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from scorelm.evaluation.rows import batches
from scorelm.model.embedding import Embedding
from scorelm.model.prediction import Prediction
from scorelm.noise.schedule import Gumbel

from ..conftest import SPECIAL

F64 = torch.float64
BOS, EOS, PAD, UNK = SPECIAL
REAL = 4  # ids 0 to 3 are special
LOW = -1e6
"""Log-likelihood of what cannot be; finite, so that it may be multiplied by 0."""
EVERYTHING = 10**9
SCHEDULE = Gumbel(0.3, 40.0, mu=0.2, beta=0.8)


class Law:
    """A law over texts: words of tokens from 0 with the chance of each, between ``<s>`` and ``</s>``."""

    def __init__(self, words, chance):
        self.vocab = REAL + 1 + max(map(max, words))
        self.texts = [[BOS, *(REAL + w for w in word), EOS] for word in words]
        self.p_M = torch.tensor(chance, dtype=F64)
        assert abs(float(self.p_M.sum()) - 1) < 1e-12
        self.at_MP = torch.full((len(words), max(map(len, self.texts))), PAD)
        for m, text in enumerate(self.texts):
            self.at_MP[m, : len(text)] = torch.tensor(text)
        self.hot_PVM = nn.functional.one_hot(self.at_MP, self.vocab).permute(1, 2, 0).double()
        self.length_M = torch.tensor([len(text) for text in self.texts])

    @property
    def nats_M(self):
        """-log p of every text, its end included."""
        return -self.p_M.log()

    @property
    def closed_nats_M(self):
        """-log p of every text given its length."""
        of_length_L = torch.zeros(int(self.length_M.max()) + 1, dtype=F64).index_add(0, self.length_M, self.p_M)
        return -(self.p_M / of_length_L[self.length_M]).log()

    def mean(self, value_M):
        """Expectation under the law."""
        return float(self.p_M @ torch.as_tensor(value_M).double())

    def conditional(self, m, place, known):
        """-log p of the token of text m at `place`, given its tokens at the places `known` and its length."""
        same_M = self.length_M == self.length_M[m]
        for k in known:
            same_M = same_M & (self.at_MP[:, k] == self.at_MP[m, k])
        both_M = same_M & (self.at_MP[:, place] == self.at_MP[m, place])
        return -math.log(float(self.p_M[both_M].sum() / self.p_M[same_M].sum()))

    def after(self, prefix):
        """p of the next token after a prefix, [V]."""
        p_V = torch.zeros(self.vocab, dtype=F64)
        for text, p in zip(self.texts, self.p_M, strict=True):
            if text[: len(prefix)] == prefix and len(text) > len(prefix):
                p_V[text[len(prefix)]] += p
        return p_V / p_V.sum()


def make_law(tokens=4, lengths=(4, 4), strength=0.85, seed=0):
    """A Markov chain of `lengths[0]` to `lengths[1]` tokens, every length as likely as the next.

    Each token is followed by one of its own with probability `strength`, or else by any, unequally.
    """
    gen = torch.Generator().manual_seed(seed)
    first = torch.rand(tokens, dtype=F64, generator=gen) + 0.2
    rest = torch.rand(tokens, tokens, dtype=F64, generator=gen) + 0.2
    then = (1 - strength) * rest / rest.sum(1, keepdim=True)
    then += strength * torch.eye(tokens, dtype=F64).roll(1, 1)
    first, then, words, chance = (first / first.sum()).tolist(), then.tolist(), [], []
    for length in range(lengths[0], lengths[1] + 1):
        for word in itertools.product(range(tokens), repeat=length):
            steps = [then[a][b] for a, b in itertools.pairwise(word)]
            words.append(word)
            chance.append(first[word[0]] * math.prod(steps) / (lengths[1] - lengths[0] + 1))
    return Law(words, chance)


class Seen(NamedTuple):
    """An evaluation of a denoiser."""

    x_BLE: torch.Tensor
    sigma_BL: torch.Tensor
    open_BL: torch.Tensor
    logits_NV: torch.Tensor


class Exact(nn.Module):
    """The posterior of a law, by enumeration; `sharpness` other than 1 makes it wrong.

    Args:
        law: whose posterior it is.
        dim: size of the embeddings, which are random unless `table` gives them.
        sharpness: multiplies the logits.
        table: embeddings of all tokens, before they are normalised.
        tells_next_token: whether given tokens tell the next one.
    """

    def __init__(self, law, dim=8, sharpness=1.0, table=None, tells_next_token=False):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = Embedding(law.vocab, dim if table is None else table.shape[1])
        if table is not None:
            self.embedding.weight.data.copy_(table)
        self.law, self.sharpness, self.tells_next_token = law, sharpness, tells_next_token
        self.backbone = SimpleNamespace(kv_shape=(1, 1, 1))
        self.seen = []
        """What every evaluation was asked and answered."""

    def predict(
        self, x_BLE, sigma_BL, layout, self_cond_BLE=None, ids_BL=None, table_VE=None, places=None, asks_next_BL=None
    ):  # fmt: skip
        law, own_VE = self.law, self.embedding.table().detach()
        assert x_BLE.shape[:2] == sigma_BL.shape == layout.segment_BL.shape
        open_BL = (sigma_BL > 0) & (layout.segment_BL > 0)
        dot_BLV = x_BLE.double() @ own_VE.double().T
        if ids_BL is None:
            ids_BL = dot_BLV.argmax(-1)
        known_BLV = torch.where(torch.arange(law.vocab) == ids_BL[..., None], 0.0, LOW).double()
        sigma_BL1 = sigma_BL.double()[..., None]
        evidence_BLV = torch.where(sigma_BL1 > 0, dot_BLV / sigma_BL1.clamp(min=1e-6) ** 2, known_BLV)
        evidence_BLV[sigma_BL.isinf()] = 0.0
        evidence_BLV[..., PAD] = LOW  # there is a token at every position of a row
        key = [layout.segment_BL, layout.block_BL, layout.stream_BL, layout.position_BL]
        query = key[:3]
        if layout.past is not None:
            ids_BL11 = ids_BL.float()[..., None, None]
            ids_BK, _ = layout.past.before(ids_BL11, ids_BL11)
            past = layout.past.layout
            behind = [past.segment_BL, past.block_BL, past.stream_BL, past.position_BL]
            key = [torch.cat(pair, 1) for pair in zip(behind, key, strict=True)]
            held_BC = ids_BK[:, : behind[0].shape[1], 0, 0].long()
            held_BCV = torch.where(torch.arange(law.vocab) == held_BC[..., None], 0.0, LOW).double()
            evidence_BLV = torch.cat([held_BCV, evidence_BLV], 1)
        (q_segment, q_block, q_stream), (k_segment, k_block, k_stream) = (
            [t[:, :, None] for t in query],
            [t[:, None, :] for t in key[:3]],
        )
        within = (q_block == k_block) & (q_stream == k_stream)
        sees_BLK = (q_segment == k_segment) & (within | ((k_stream == 0) & (k_block < q_block)))
        evidence_BKM = torch.zeros(*key[3].shape, len(law.texts), dtype=F64)
        for place, hot_VM in enumerate(law.hot_PVM):
            evidence_BKM[key[3] == place] = evidence_BLV[key[3] == place] @ hot_VM
        weight_BLM = (law.p_M.log() + sees_BLK.double() @ evidence_BKM).softmax(-1)
        p_BLV = torch.zeros(*sigma_BL.shape, law.vocab, dtype=F64)
        asked_BL = torch.zeros_like(open_BL) if asks_next_BL is None else asks_next_BL
        open_BL, place_BL = open_BL | asked_BL, layout.position_BL + asked_BL
        for place, hot_VM in enumerate(law.hot_PVM):
            p_BLV[place_BL == place] = weight_BLM[place_BL == place] @ hot_VM.T
        logits_NV = (self.sharpness * p_BLV[open_BL].log()).float()
        self.seen.append(Seen(x_BLE.clone(), sigma_BL.clone(), open_BL, logits_NV.clone()))
        return Prediction.of(logits_NV, open_BL, own_VE if table_VE is None else table_VE)


def fast(*chosen, of):
    """The cases `of` a parametrisation, of which all but those chosen are for the thorough tier."""
    cases = [case if isinstance(case, tuple) else (case,) for case in of]
    keep = [case if isinstance(case, tuple) else (case,) for case in chosen]
    assert all(case in cases for case in keep)
    return [pytest.param(*case, marks=() if case in keep else pytest.mark.thorough) for case in cases]


def one_batch(rows):
    """Rows in one batch, and for each of its lines which row it is."""
    (batch,) = batches(rows, torch.device("cpu"), SPECIAL, EVERYTHING)
    return batch, torch.tensor(batch.index)


def rows_of(law, count):
    """`count` texts of the law at equal distances of its distribution function, so that frequencies are right."""
    edge_M = law.p_M.cumsum(0) / law.p_M.sum()
    which_N = torch.searchsorted(edge_M, (torch.arange(count, dtype=F64) + 0.5) / count)
    return [law.texts[m] for m in which_N.tolist()], which_N


def total(priced):
    """Nats of each line of a batch."""
    return torch.stack(list(priced.terms.values())).sum(0)


def excess(priced, nats_B):
    """How much more than `nats_B` the rows cost: the mean, and its standard error."""
    more_B = total(priced) - nats_B
    return float(more_B.mean()), float(more_B.std() / len(more_B) ** 0.5)
