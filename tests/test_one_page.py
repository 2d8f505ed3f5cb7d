"""The method on one page (docs/in-one-page.md): it is short, it learns, and it is the library's method."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from scorelm.config.recipe import ModelConfig, TrainingConfig
from scorelm.model.denoiser import Denoiser
from scorelm.model.embedding import evidence
from scorelm.model.layout import Layout
from scorelm.noise.schedule import make_schedule
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Draw
from scorelm.sampling.solvers import Step, euler_step
from scorelm.text.tokenizer import Special

PAGE = (Path(__file__).parents[1] / "docs" / "in-one-page.md").read_text(encoding="utf-8")
(SOURCE,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
E, D = 16, 128

# --- the library, as this file knows it -------------------------------------------------------------------------------


class OwnTrunk(nn.Module):
    """The page's positions and trunk, as the denoiser calls its own."""

    def __init__(self, page):
        super().__init__()
        self.trunk, self.position = page["trunk"], page["position"]

    def forward(self, h_BLD, *_):
        return self.trunk(h_BLD + self.position)


def library_denoiser(page):
    """The library's denoiser with the page's weights."""
    denoiser = Denoiser(ModelConfig(dim=D, embedding_dim=E), len(page["WORDS"]))
    denoiser.trunk = OwnTrunk(page)
    copies = (
        (denoiser.embedding.weight, page["embedding"]),
        (denoiser.token_in, page["token_in"]),
        (denoiser.context.weight, page["context"].T),
        (denoiser.prior, page["prior"]),
    )
    with torch.no_grad():
        for weight, value in copies:
            weight.copy_(value)
    return denoiser


def library_loss(denoiser, ids_BL, sigma_BL, eps_BLE):
    """The library's loss of rows that hold one document each."""
    one_BL = torch.ones_like(ids_BL)
    layout = Layout(one_BL, one_BL.cumsum(1) - 1, one_BL, one_BL)
    draw = Draw(ids_BL, sigma_BL, one_BL.bool(), layout, eps_BSE=eps_BLE)
    schedule = make_schedule("log", E, len(denoiser.prior))
    special = Special(bos=-1, eos=-1, pad=-1, unk=-1)
    score = OBJECTIVES["score"]
    return score.loss(denoiser, draw, schedule, TrainingConfig(), live=draw.live, special=special).loss


def library_euler(x_NE, sigma_N, target_N, logits_NV, table_VE, eps_NE):
    """The library's Euler step; what begins at sigma inf begins with the noise `eps_NE`."""

    class Draws:
        def normal(self):
            return eps_NE

    return euler_step(Step(x_NE, sigma_N, target_N, logits_NV, table_VE, Draws()))


# --- the page ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    """(names, losses, lines): what is left and what is printed by the page after 100 steps."""
    source, cut = re.subn(r"\(1000, 32\)", "(100, 32)", SOURCE)
    assert cut == 1
    printed = []
    names = {"print": lambda text, end: printed.append(text)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exec(compile(source, "docs/in-one-page.md", "exec"), names)
    losses = [float(text.split()[0]) for text in printed if text.endswith("nats a word")]
    lines = [text.strip() for text in printed if "->" in text]
    return names, losses, lines


@pytest.fixture
def page(run):
    return run[0]


def test_sixty_honest_lines():
    lines = SOURCE.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 110
    assert ";" not in SOURCE and "scorelm" not in SOURCE
    assert not re.search(r"^ *\w+(, \w+)+ = ", SOURCE, re.MULTILINE)  # one assignment a line


def test_it_learns_and_writes(run):
    page, losses, lines = run
    assert len(losses) == 100
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    for template, text in (line.split(" -> ") for line in lines):
        words = text.split()
        assert set(words) <= set(page["WORDS"][1:])
        if template != "nothing":
            assert all(word in ("_", written) for word, written in zip(template.split(), words, strict=False))
    assert sum(len(line.split(" -> ")[1].split()) >= 4 for line in lines) > len(lines) / 2


def noisy_rows(page, rows=6):
    """(ids, sigma, eps) with positions of every kind: given, blank and at many levels."""
    rng = torch.Generator().manual_seed(1)
    shape = rows, page["LENGTH"]
    ids_BL = torch.randint(len(page["WORDS"]), shape, generator=rng)
    u_BL = 1.6 * torch.rand(shape, generator=rng) - 0.3
    sigma_BL = torch.where(u_BL < 0, 0.0, torch.where(u_BL > 1, torch.inf, 20**u_BL))
    assert all(bool(kind.any()) for kind in (sigma_BL == 0, sigma_BL.isinf(), (sigma_BL > 0) & sigma_BL.isfinite()))
    return ids_BL, sigma_BL, torch.randn(*shape, E, generator=rng)


def test_evidence_is_the_librarys_and_exact_at_both_ends(page):
    ids_BL, sigma_BL, eps_BLE = noisy_rows(page)
    table_VE = page["table"]().detach()
    context, prior = page["context"], page["prior"]
    page["context"], page["prior"] = torch.zeros_like(context), torch.zeros_like(prior)
    x_BLE = torch.where(sigma_BL.isinf()[..., None], 0.0, table_VE[ids_BL] + sigma_BL[..., None] * eps_BLE)
    found_BLV = page["denoise"](x_BLE, sigma_BL[..., None]).detach()
    page["context"], page["prior"] = context, prior
    open_BL = sigma_BL > 0
    torch.testing.assert_close(
        found_BLV[open_BL], evidence(x_BLE[open_BL], sigma_BL[open_BL], table_VE), atol=1e-5, rtol=1e-5
    )
    assert (found_BLV[sigma_BL.isinf()] == 0).all()
    given_MV = nn.functional.one_hot(ids_BL[~open_BL], len(table_VE)).float()
    assert torch.equal(found_BLV[~open_BL].softmax(-1), given_MV)


def test_loss_and_its_gradient_are_the_librarys(page):
    denoiser, (ids_BL, sigma_BL, eps_BLE) = library_denoiser(page), noisy_rows(page)
    expected = library_loss(denoiser, ids_BL, sigma_BL, eps_BLE)
    found = page["loss"](ids_BL, sigma_BL[..., None], eps_BLE)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    theirs = (denoiser.embedding.weight, denoiser.token_in, denoiser.context.weight, denoiser.prior)
    ours = (page["embedding"], page["token_in"], page["context"], page["prior"])
    grads = zip(torch.autograd.grad(found, ours), torch.autograd.grad(expected, theirs), strict=True)
    for our_grad, their_grad in grads:
        our_grad = our_grad if our_grad.shape == their_grad.shape else our_grad.T
        torch.testing.assert_close(our_grad, their_grad, atol=1e-5, rtol=1e-4)


def test_euler_step_is_the_librarys(page):
    _, sigma_BL, _ = noisy_rows(page)
    sigma_N, table_VE = sigma_BL[sigma_BL > 0], page["table"]().detach()
    rng = torch.Generator().manual_seed(2)
    x_NE, eps_NE = (5 * torch.randn(len(sigma_N), E, generator=rng) for _ in range(2))
    logits_NV = 3 * torch.randn(len(sigma_N), len(table_VE), generator=rng)
    target_N = sigma_N.clamp(max=20) * torch.rand(len(sigma_N), generator=rng).round(decimals=1)
    assert sigma_N.isinf().any() and (target_N == 0).any()
    expected_NE = library_euler(x_NE, sigma_N, target_N, logits_NV, table_VE, eps_NE)
    x0_NE = logits_NV.softmax(-1) @ table_VE
    found_NE = page["euler"](x_NE, x0_NE, sigma_N[:, None], target_N[:, None], eps_NE)
    torch.testing.assert_close(found_NE, expected_NE, atol=1e-5, rtol=1e-5)
