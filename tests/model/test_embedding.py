import math

import pytest
import torch

from scorelm.model.embedding import Embedding, evidence, nearest_token

INF = math.inf


def make(vocab=50, dim=16, seed=0):
    torch.manual_seed(seed)
    embedding = Embedding(vocab, dim)
    with torch.no_grad():
        embedding.weight.mul_(torch.rand(vocab, 1) * 10 + 0.01)  # norms that training may lead to
    return embedding


def bayes(x_NE, sigma_N, table_VE, prior_V):
    """Posterior from the densities themselves, in float64."""
    noisy = torch.distributions.Normal(table_VE.double()[None], sigma_N.double()[:, None, None])
    joint = noisy.log_prob(x_NE.double()[:, None]).sum(-1) + prior_V.double().log()
    return joint.softmax(-1)


def noisy(embedding, sigma_N, seed=1):
    gen = torch.Generator().manual_seed(seed)
    ids_N = torch.randint(embedding.weight.shape[0], sigma_N.shape, generator=gen)
    e_NE = embedding(ids_N).detach()
    return ids_N, e_NE + sigma_N[:, None] * torch.randn(e_NE.shape, generator=gen)


@pytest.mark.parametrize("dim", [2, 16, 128])
def test_every_embedding_has_norm_sqrt_e(dim):
    embedding = make(dim=dim)
    assert embedding.norm == pytest.approx(math.sqrt(dim))
    table_VE = embedding.table()
    torch.testing.assert_close(table_VE.norm(dim=-1), torch.full((50,), math.sqrt(dim)))
    torch.testing.assert_close((table_VE**2).mean(), torch.tensor(1.0))  # variance 1 in each dimension
    cosine = torch.nn.functional.cosine_similarity(table_VE, embedding.weight, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(50))


def test_lookup_is_a_row_of_the_table():
    embedding, ids = make(), torch.tensor([[3, 0, 49], [7, 7, 1]])
    assert torch.equal(embedding(ids), embedding.table()[ids])


def test_gradient_is_tangential():
    """Scaling a weight changes nothing, so the gradient has no component along it."""
    embedding = make()
    (embedding.table() * torch.randn(50, 16, generator=torch.Generator().manual_seed(9))).sum().backward()
    along = (embedding.weight.grad * embedding.weight).sum(-1)
    assert embedding.weight.grad.abs().max() > 0.01 and along.abs().max() < 1e-4


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0, 20.0, 500.0])
def test_evidence_and_prior_are_the_bayes_posterior(sigma):
    embedding = make()
    prior_V = torch.rand(50, generator=torch.Generator().manual_seed(2)).add(0.01)
    prior_V /= prior_V.sum()
    sigma_N = torch.full((200,), sigma)
    _, x_NE = noisy(embedding, sigma_N)
    table_VE = embedding.table().detach()
    found = (evidence(x_NE, sigma_N, table_VE).double() + prior_V.double().log()).softmax(-1)
    torch.testing.assert_close(found, bayes(x_NE, sigma_N, table_VE, prior_V), rtol=0, atol=3e-5)


def test_evidence_is_the_log_likelihood_up_to_a_constant():
    embedding = make()
    sigma_N = torch.logspace(-0.3, 2, 64)
    _, x_NE = noisy(embedding, sigma_N)
    table_VE = embedding.table().detach().double()
    square = (x_NE.double()[:, None] - table_VE).pow(2).sum(-1)
    rest = evidence(x_NE, sigma_N, table_VE.float()).double() + square / (2 * sigma_N.double()[:, None] ** 2)
    spread = rest.max(1).values - rest.min(1).values
    assert (spread < 1e-5 * (1 + square.max(1).values / sigma_N.double() ** 2)).all()


def test_rows_are_judged_by_their_own_level():
    embedding = make()
    sigma_N = torch.tensor([0.0, 0.2, 1.0, 8.0, INF])
    _, x_NE = noisy(embedding, torch.tensor([0.0, 0.2, 1.0, 8.0, 5.0]))
    together = evidence(x_NE, sigma_N, embedding.table())
    for k in range(5):
        alone = evidence(x_NE[k : k + 1], sigma_N[k : k + 1], embedding.table())[0]
        torch.testing.assert_close(together[k], alone, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30])
def test_no_evidence_at_infinity(scale):
    embedding = make()
    x_NE = scale * torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    assert (evidence(x_NE, torch.full((7,), INF), embedding.table()) == 0).all()


@pytest.mark.parametrize("sigma", [0.0, 1e-30, 1e-3])
def test_evidence_saturates_at_zero(sigma):
    embedding = make()
    ids_N, x_NE = noisy(embedding, torch.full((300,), sigma))
    logits_NV = evidence(x_NE, torch.full((300,), sigma), embedding.table())
    assert torch.isfinite(logits_NV).all()
    expected = torch.nn.functional.one_hot(ids_N, 50).float()
    torch.testing.assert_close(logits_NV.softmax(-1), expected, rtol=0, atol=1e-4)
    assert torch.isfinite(torch.autograd.grad(evidence(x_NE, torch.full((300,), sigma), embedding.table()).sum(),
                                              embedding.weight)[0]).all()  # fmt: skip


def test_evidence_is_fp32_under_autocast():
    embedding = make()
    sigma_N = torch.full((64,), 0.6)
    _, x_NE = noisy(embedding, sigma_N)
    with torch.autocast("cpu", torch.bfloat16):
        cast = evidence(x_NE, sigma_N, embedding.table())
    assert cast.dtype == torch.float32 and torch.equal(cast, evidence(x_NE, sigma_N, embedding.table()))


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 50])
def test_nearest_token_is_exact_on_embeddings(count):
    embedding = make(vocab=300, dim=4)
    ids_N = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:count]
    assert torch.equal(nearest_token(embedding(ids_N), embedding.table(), chunk=10), ids_N)


def test_nearest_token_is_the_nearest():
    embedding = make()
    x_NE = 3 * torch.randn(100, 16, generator=torch.Generator().manual_seed(0))
    nearest = torch.cdist(x_NE.double(), embedding.table().detach().double()).argmin(-1)
    assert torch.equal(nearest_token(x_NE, embedding.table()), nearest)
    assert not nearest_token(x_NE.requires_grad_(), embedding.table()).requires_grad
