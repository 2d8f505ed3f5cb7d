"""Where embeddings start: tokens that stand beside the same others near to each other."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.model.embedding import ALIKE, Embedding, context_vectors
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
    """Of neighbours in two places, of all but the last token, which has none."""
    generator = torch.Generator().manual_seed(seed)
    shape = 2, size, size
    found = torch.randint(0, 9, shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.6)
    found[:, -1] = found[:, :, -1] = 0
    return found.float()


def information(count_VC: np.ndarray) -> np.ndarray:
    """Positive pointwise mutual information by its definition, a pair at a time."""
    found, total = np.zeros_like(count_VC), count_VC.sum()
    smooth = count_VC.sum(0) ** 0.75
    for i, j in np.argwhere(count_VC):
        joint, alone = count_VC[i, j] / total, count_VC[i].sum() / total
        found[i, j] = max(0.0, math.log(joint / (alone * smooth[j] / smooth.sum())))
    return found


def test_neighbours_are_counted_inside_documents(data: TrainingData) -> None:
    expected = torch.zeros(4, VOCAB, VOCAB)
    for ids in data.documents.train["ids"]:
        for distance in (1, 2):
            for one, other in zip(ids, ids[distance:], strict=False):
                expected[2 * distance - 2, one, other] += 1
                expected[2 * distance - 1, other, one] += 1
    order = data.token_counts().argsort(descending=True, stable=True)
    assert torch.equal(data.neighbour_counts(), expected[:, :, order])


def test_of_a_large_vocabulary_only_frequent_neighbours_are_counted(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = data.neighbour_counts()
    monkeypatch.setattr("scorelm.training.data.CELLS", VOCAB * 7)
    assert torch.equal(data.neighbour_counts(), whole[:, :, :7])


def test_a_long_text_is_counted_in_part(data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beginning of each chunk, however long the documents in it are."""
    whole = float(data.neighbour_counts().sum())
    assert data.documents.train.data.column("ids").num_chunks > 1
    for part in (2, 50):
        monkeypatch.setattr("scorelm.training.data.COUNTED", data.tokens // part)
        assert float(data.neighbour_counts().sum()) * part == pytest.approx(whole, rel=0.05)


def test_vectors_are_those_of_a_decomposition_by_hand() -> None:
    """But for a rotation: products of vectors are compared, of as many as there are and of a few."""
    given_SVC = counts(0, 24)
    u, s, _ = np.linalg.svd(np.concatenate([information(count.double().numpy()) for count in given_SVC], 1))
    for size, off in ((4, 0.03), (23, 1e-3)):  # of fewer than all they are close to, by a random projection
        vectors_VE = context_vectors(given_SVC, size).double().numpy()
        expected = u[:, 1 : size + 1] * s[1 : size + 1] @ u[:, 1 : size + 1].T
        np.testing.assert_allclose(vectors_VE @ vectors_VE.T, expected, atol=off)
    assert not context_vectors(given_SVC, 4)[-1].any()  # a token without neighbours
    wide = context_vectors(given_SVC, 40)
    assert wide.shape == (24, 40) and torch.equal(wide[:, 23:], torch.zeros(24, 17))


def test_random_numbers_of_a_run_are_not_touched() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    context_vectors(counts(0, 24), 4)
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
    assert float(cosine_VV[:300, :300].fill_diagonal_(ALIKE).mean()) == pytest.approx(ALIKE, abs=0.05)
    torch.testing.assert_close(table_VE[300:], before_VE[300:])


def test_axes_and_signs_of_vectors_mean_nothing() -> None:
    """Nor does what has no vectors: fewer tokens than axes."""
    for vocab in (50, 5):
        vectors_VE = F.pad(torch.randn(vocab, min(16, vocab - 1), generator=torch.Generator().manual_seed(1)), (0, 16))
        vectors_VE = vectors_VE[:, :16]
        turn_EE, _ = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2)))
        tables = []
        for given_VE in (vectors_VE, vectors_VE @ turn_EE):
            torch.manual_seed(0)
            embedding = Embedding(vocab, 16)
            embedding.bring_together(given_VE)
            tables.append(embedding.table().detach())
        torch.testing.assert_close(*tables, rtol=0, atol=1e-4)


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
