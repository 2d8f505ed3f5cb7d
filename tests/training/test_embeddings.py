"""Where embeddings start: tokens that stand beside the same others near to each other."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.model.embedding import ALIKE, Embedding, context_vectors, information
from scorelm.training.data import TrainingData, prepare
from scorelm.training.trainer import Trainer

NOUNS = ["cat", "dog", "hen"], ["mat", "rug", "bed"]
VOCAB = 330
LINES = [f"the {a} sat on the {b} and the {c} on a {b}" for a in NOUNS[0] for b in NOUNS[1] for c in NOUNS[0]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    text = tmp_path_factory.mktemp("text") / "lines.txt"
    text.write_text("\n".join(f"{line} {k}" for k in range(80) for line in LINES))
    data = DataConfig(source=str(text), vocab_size=VOCAB, max_length=64)
    return Recipe(data=data, model=ModelConfig(dim=32, layers=1), training=TrainingConfig(rows=4, steps=1))


@pytest.fixture(scope="module")
def data(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return prepare(recipe.data, tmp_path_factory.mktemp("data"), False, lambda text: None)


def counts(seed: int, size: int) -> torch.Tensor:
    """Some pairs of all but the last token, which stands beside none."""
    generator = torch.Generator().manual_seed(seed)
    full = torch.randint(0, 9, (size, size), generator=generator) * (torch.rand(size, size, generator=generator) < 0.6)
    full[-1] = full[:, -1] = 0
    return full.float()


def ratios(count_VV: np.ndarray) -> np.ndarray:
    """Positive pointwise mutual information by its definition, a pair at a time."""
    found, total = np.zeros_like(count_VV), count_VV.sum()
    smooth = count_VV.sum(0) ** 0.75
    for i, j in np.argwhere(count_VV):
        joint, alone = count_VV[i, j] / total, count_VV[i].sum() / total
        found[i, j] = max(0.0, math.log(joint / (alone * smooth[j] / smooth.sum())))
    return found


def test_pairs_are_counted_inside_documents(data: TrainingData) -> None:
    documents = data.documents.train["ids"]
    for distance, found in enumerate(data.pair_counts(), 1):
        expected = torch.zeros(VOCAB, VOCAB)
        for ids in documents:
            for one, other in zip(ids, ids[distance:], strict=False):
                expected[one, other] += 1
        assert torch.equal(found.to_dense(), expected)


def test_a_long_text_is_counted_in_part(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = float(data.pair_counts()[0].to_dense().sum())
    assert data.documents.train.data.column("ids").num_chunks > 1
    monkeypatch.setattr("scorelm.training.data.PAIRS", data.tokens // 2)
    assert 0 < float(data.pair_counts()[0].to_dense().sum()) < 0.7 * whole


def test_vectors_are_those_of_a_dense_decomposition() -> None:
    """But for a rotation: products of vectors are compared, of as many as there are and of a few."""
    given = [counts(0, 24), counts(1, 24)]
    sides = [ratios(side) for count in given for side in (count.double().numpy(), count.double().numpy().T)]
    u, s, _ = np.linalg.svd(np.concatenate(sides, 1), full_matrices=False)
    np.testing.assert_allclose(information(given[0].to_sparse()).to_dense(), sides[0], rtol=1e-4, atol=1e-5)
    sparse = [count.to_sparse() for count in given]
    for size, off in ((4, 0.03), (23, 1e-3)):  # of fewer than all they are close to, by a random projection
        vectors_VE = context_vectors(sparse, size).double().numpy()
        expected = u[:, 1 : size + 1] * s[1 : size + 1] @ u[:, 1 : size + 1].T
        np.testing.assert_allclose(vectors_VE @ vectors_VE.T, expected, atol=off)
    assert float(context_vectors(sparse, 23)[-1].abs().max()) < 1e-4  # a token without neighbours
    wide = context_vectors(sparse, 40)
    assert wide.shape == (24, 40) and torch.equal(wide[:, 23:], torch.zeros(24, 17))


def test_random_numbers_of_a_run_are_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    context_vectors([counts(0, 24).to_sparse()], 4)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_of_an_embedding_is_shared_by_tokens_that_are_alike() -> None:
    torch.manual_seed(0)
    embedding = Embedding(400, 256)
    before_VE = embedding.table().detach()
    vectors_VE = torch.randn(1, 256).repeat(400, 1)
    vectors_VE[300:] = 0.0
    embedding.bring_together(vectors_VE)
    table_VE = embedding.table().detach()
    torch.testing.assert_close(table_VE.norm(dim=1), torch.full((400,), 16.0))
    cosine_VV = F.cosine_similarity(table_VE[:, None], table_VE[None], dim=-1)
    assert float(cosine_VV[:300, :300].fill_diagonal_(ALIKE).mean()) == pytest.approx(ALIKE, abs=0.02)
    torch.testing.assert_close(table_VE[300:], before_VE[300:])


def test_a_run_starts_with_words_of_one_kind_together(recipe: Recipe, data: TrainingData) -> None:
    trainer = Trainer(recipe, data)
    table_VE = F.normalize(trainer.learner.denoiser.embedding.table().detach(), dim=-1)
    first, second = ([data.tokenizer.encode(f"the {noun}")[-1] for noun in nouns] for nouns in NOUNS)
    assert len({*first, *second}) == 6

    def cosine(ones: list[int], others: list[int]) -> float:
        return float(np.mean([float(table_VE[a] @ table_VE[b]) for a in ones for b in others if a != b]))

    assert min(cosine(first, first), cosine(second, second)) > cosine(first, second) + 0.2
    for average in trainer.learner.averages.values():
        assert torch.equal(average.embedding.weight, trainer.learner.denoiser.embedding.weight)
