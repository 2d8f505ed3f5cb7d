"""A law over short documents whose posterior is known: every text is enumerated and Bayes' rule is summed over all.

`Exact` stands where the denoiser stands. It reads noisy embeddings, levels and layout as a network would, by its own
reading of the visibility rule, and knows what is cached from the keys alone, in which it writes its token ids.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import nn

from scorelm.config.recipe import Size
from scorelm.evaluation.rows import batches
from scorelm.model.denoiser import Posterior
from scorelm.model.embedding import Embedding
from scorelm.text.sentencepiece import BOS, EOS, PAD

F64 = torch.float64
REAL = 4  # ids 0 to 3 are special
LOW = -1e6
"""Log-likelihood of what cannot be; finite, so that it may be multiplied by 0."""
EVERYTHING = 10**9


class Law:
    """A Markov chain over K tokens from `lengths[0]` to `lengths[1]` of them, then ``</s>``.

    Every length is as likely as the next; `first` and `then` are rows of transition probabilities.
    """

    def __init__(self, first, then, lengths):
        self.vocab, self.lengths = REAL + len(first), lengths
        texts, chance = [], []
        for length in range(lengths[0], lengths[1] + 1):
            for word in itertools.product(range(len(first)), repeat=length):
                p = first[word[0]] / (lengths[1] - lengths[0] + 1)
                for a, b in itertools.pairwise(word):
                    p *= then[a][b]
                texts.append([BOS, *(REAL + w for w in word), EOS])
                chance.append(p)
        self.texts = texts
        self.p_M = torch.tensor(chance, dtype=F64)
        assert abs(float(self.p_M.sum()) - 1) < 1e-12
        self.at_MP = torch.full((len(texts), lengths[1] + 2), PAD)
        for m, text in enumerate(texts):
            self.at_MP[m, : len(text)] = torch.tensor(text)
        self.hot_PVM = nn.functional.one_hot(self.at_MP, self.vocab).permute(1, 2, 0).double()
        self.length_M = torch.tensor([len(text) for text in texts])

    @property
    def nats_M(self):
        """-log p of every text, its end included."""
        return -self.p_M.log()

    @property
    def closed_nats_M(self):
        """-log p of every text given its length."""
        return -(self.p_M * (self.lengths[1] - self.lengths[0] + 1)).log()

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


def make_law(tokens=4, lengths=(4, 4), strength=0.85, seed=0):
    """Each token is followed by one of its own with probability `strength`, or else by any, unequally."""
    gen = torch.Generator().manual_seed(seed)
    first = torch.rand(tokens, dtype=F64, generator=gen) + 0.2
    rest = torch.rand(tokens, tokens, dtype=F64, generator=gen) + 0.2
    then = (1 - strength) * rest / rest.sum(1, keepdim=True)
    then += strength * torch.eye(tokens, dtype=F64).roll(1, 1)
    return Law((first / first.sum()).tolist(), then.tolist(), lengths)


class Seen(NamedTuple):
    """An evaluation of a denoiser."""

    x_BLE: torch.Tensor
    sigma_BL: torch.Tensor
    live_BL: torch.Tensor
    logits_NV: torch.Tensor


class Exact(nn.Module):
    """The posterior of a law, by enumeration; `sharpness` other than 1 makes it wrong."""

    def __init__(self, law, dim=8, seed=0, sharpness=1.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = Embedding(law.vocab, dim)
        self.law, self.sharpness = law, sharpness
        self.size = Size(dim=1, layers=1, heads=1, hidden=1)
        self.seen = []
        """What every evaluation was asked and answered."""

    def live(self, x_BLE, sigma_BL, layout, self_cond_BLE=None, ids_BL=None, table_VE=None):
        law, table_VE = self.law, self.embedding.table().detach().double()
        assert x_BLE.shape[:2] == sigma_BL.shape == layout.segment_BL.shape
        live_BL = (sigma_BL > 0) & (layout.segment_BL > 0)
        dot_BLV = x_BLE.double() @ table_VE.T
        known_BLV = torch.where(torch.arange(law.vocab) == dot_BLV.argmax(-1, keepdim=True), 0.0, LOW).double()
        sigma_BL1 = sigma_BL.double()[..., None]
        evidence_BLV = torch.where(sigma_BL1 > 0, dot_BLV / sigma_BL1.clamp(min=1e-6) ** 2, known_BLV)
        evidence_BLV[sigma_BL.isinf()] = 0.0
        evidence_BLV[..., PAD] = LOW  # there is a token at every position of a row
        key = [layout.segment_BL, layout.block_BL, layout.stream_BL, layout.position_BL]
        query = key[:3]
        if layout.past is not None:
            ids_BL11 = dot_BLV.argmax(-1).float()[..., None, None]
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
        for place, hot_VM in enumerate(law.hot_PVM):
            p_BLV[layout.position_BL == place] = weight_BLM[layout.position_BL == place] @ hot_VM.T
        logits_NV = (self.sharpness * p_BLV[live_BL].log()).float()
        self.seen.append(Seen(x_BLE.clone(), sigma_BL.clone(), live_BL, logits_NV))
        return Posterior(logits_NV, logits_NV, live_BL)

    def estimate(self, logits_NV):
        return logits_NV.softmax(-1) @ self.embedding.table()


def one_batch(rows):
    """Rows in one batch, and for each of its lines which row it is."""
    (batch,) = batches(rows, torch.device("cpu"), EVERYTHING)
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
