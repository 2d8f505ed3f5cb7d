"""Generation: the contract of step records, what the model is asked, and how often."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from scorelm.model.embedding import Embedding
from scorelm.model.layout import Layout
from scorelm.sampling.loop import generate

from .steps import BOS, EOS, INF, NEVER, PAD, PATHS, entropy, judged, records

SOLVERS = ["posterior", "renoise", "ancestral:0.5", "sde", "euler", "heun", "dpmpp_2m"]
CLOSED = [
    [BOS, 7, None, None, 9, None, EOS],
    [BOS, None, None, None, None, None, None, None, 12, EOS],
    [BOS, None, EOS],
    [BOS, 8, 9, 10, EOS],
]


# --- the contract of records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "solver"),
    [*((path, "posterior") for path in PATHS), *(("uniform", solver) for solver in SOLVERS[1:]), ("ramp:0.5", "heun"),
     ("blocks:3", "sde"), ("blocks:1", "heun"), ("confidence", "sde"), ("entropy", "dpmpp_2m"), ("shuffled", "euler"),
     ("bounded", "renoise")],
)  # fmt: skip
def test_records_keep_their_contract(lm, path, solver):
    found = records(lm, CLOSED, path=path, solver=solver, steps=6)
    width = max(map(len, CLOSED))
    given = torch.zeros(len(CLOSED), width, dtype=torch.bool)
    ids = torch.full((len(CLOSED), width), PAD)
    real = torch.zeros(len(CLOSED), width, dtype=torch.bool)
    for row, template in enumerate(CLOSED):
        for column, token in enumerate(template):
            real[row, column] = True
            if token is not None:
                given[row, column], ids[row, column] = True, token
    free = real & ~given
    before = torch.where(free, INF, 0.0)
    nfe = torch.zeros(len(CLOSED), dtype=torch.long)
    assert [record.step for record in found] == list(range(1, len(found) + 1))
    for record in found:
        for tensor in (record.sigma_BL, record.ids_BL, record.entropy_BL, record.change_BL):
            assert tensor.shape == (len(CLOSED), width) and tensor.device.type == "cpu"
        assert record.length_B.tolist() == [len(template) for template in CLOSED]
        assert (record.sigma_BL <= before).all() and (record.sigma_BL >= 0).all()
        moved = (record.sigma_BL < before).any(1)
        assert moved.any()
        most = 1 if solver not in ("heun", "sde") else 2 + (solver == "sde" and path in ("confidence", "entropy"))
        grown = record.nfe_B - nfe
        assert ((grown >= 1) & (grown <= most))[moved].all() and (grown[~moved] == 0).all()
        nfe = record.nfe_B
        assert torch.equal(record.ids_BL[given], ids[given]) and (record.sigma_BL[given] == 0).all()
        known = before == 0
        assert (record.entropy_BL[known] == 0).all() and (record.change_BL[known] == 0).all()
        fresh = (record.sigma_BL < before) & free
        assert (record.entropy_BL[fresh] >= 0).all() and (record.step > 1 or (record.entropy_BL[fresh] > 0).all())
        assert (record.entropy_BL <= math.log(50) + 1e-4).all() and torch.isfinite(record.change_BL).all()
        assert (record.change_BL <= 2 + 1e-5).all()
        before = record.sigma_BL
    assert (found[-1].sigma_BL == 0).all()
    assert int(nfe.max()) <= (6 if not path.startswith("blocks") else 11)
    written = found[-1].ids_BL[free]
    assert not torch.isin(written, NEVER).any()
    assert ((written >= 0) & (written < 50)).all()
    for earlier, later in pairwise(found):  # a finished token never changes
        done = earlier.sigma_BL == 0
        assert torch.equal(earlier.ids_BL[done], later.ids_BL[done])


def test_records_are_snapshots(lm, settings_of):
    """A record that was kept must not change when generation goes on."""
    stream = generate(lm.loop(), CLOSED, range(4), settings_of(path="uniform", steps=5))
    first = next(stream)
    copies = {name: value.clone() for name, value in vars(first).items() if isinstance(value, torch.Tensor)}
    list(stream)
    for name, value in copies.items():
        assert torch.equal(getattr(first, name), value), name


def test_watch_sees_every_record(lm):
    seen = []
    samples = lm.generate(n=2, path="uniform", steps=5, watch=seen.append)
    assert [record.step for record in seen] == [1, 2, 3, 4, 5]
    for row, one in enumerate(samples):
        assert seen[-1].ids_BL[row, : len(one.ids)].tolist() == one.ids


# --- what the model is asked ------------------------------------------------------------------------------------------


def test_entropy_of_the_first_step_is_the_posteriors(lm):
    """Against the denoiser itself: no evidence anywhere, one free block after <s>, specials ruled out."""
    record = records(lm, [[BOS, None, None, 9, EOS]], temperature=0.7, steps=6)[0]
    logits = judged(lm, [BOS, PAD, PAD, 9, EOS], [0, INF, INF, 0, 0])[1:3] / 0.7
    torch.testing.assert_close(record.entropy_BL[0, 1:3].double(), entropy(logits), rtol=1e-4, atol=1e-5)
    x0 = logits.softmax(-1) @ lm.denoiser.embedding.table().detach().double()
    torch.testing.assert_close(record.change_BL[0, 1:3].double(), x0.norm(dim=-1) / 4, rtol=1e-4, atol=1e-5)


def test_the_second_step_is_conditioned_on_the_first_estimate(lm):
    """Left to right: after one token is written the other is judged with the first pass's x0 fed back."""
    first, second = records(lm, [[BOS, None, None, 9, EOS]], path="ramp:1e6", steps=2)
    assert first.sigma_BL[0].tolist() == [0, 0, INF, 0, 0]
    table = lm.denoiser.embedding.table().detach().double()
    before = judged(lm, [BOS, PAD, PAD, 9, EOS], [0, INF, INF, 0, 0])[2]
    cond = torch.zeros(1, 5, 16)
    cond[0, 2] = (before.softmax(-1) @ table).float()
    written = [BOS, int(first.ids_BL[0, 1]), PAD, 9, EOS]
    fed, plain = (judged(lm, written, [0, 0, INF, 0, 0], c)[2] for c in (cond, None))
    assert float(second.entropy_BL[0, 2]) == pytest.approx(float(entropy(fed)), abs=1e-4)
    assert abs(float(entropy(fed) - entropy(plain))) > 1e-3
    moved = (fed.softmax(-1) - before.softmax(-1)) @ table
    assert float(second.change_BL[0, 2]) == pytest.approx(float(moved.norm()) / 4, abs=1e-4)


def test_first_tokens_have_the_law_of_the_posterior(lm):
    """One step of one free token, 2,000 seeds in batches of 250: chi-square against the denoiser's own posterior.

    An error of 5% in total variation would be 20 or more above the mean, which is 3.5 standard deviations or more.
    """
    rows, counts = 2000, torch.zeros(50, dtype=torch.float64)
    for first in range(0, rows, 250):
        record = records(lm, [[BOS, 5, None, 9, EOS]] * 250, range(first, first + 250), steps=1)[-1]
        counts += torch.bincount(record.ids_BL[:, 2], minlength=50)
    expected = rows * judged(lm, [BOS, 5, PAD, 9, EOS], [0, 0, INF, 0, 0])[2].softmax(-1)
    assert (counts[expected == 0] == 0).all()
    often = expected >= 5
    rest = (counts[~often].sum() - expected[~often].sum()) ** 2 / expected[~often].sum().clamp(min=1)
    chi2 = float(((counts - expected)[often] ** 2 / expected[often]).sum() + rest)
    freedom = int(often.sum())
    assert abs(chi2 - freedom) < 4.5 * math.sqrt(2 * freedom)


def test_euler_finishes_with_the_likeliest_token(lm):
    template = [BOS, 5, None, 9, EOS]
    final = records(lm, [template] * 5, solver="euler", steps=1)[-1].ids_BL[:, 2]
    assert len(final.unique()) == 1
    cold = records(lm, [template] * 5, steps=1, temperature=1e-3)[-1].ids_BL[:, 2]
    assert torch.equal(cold, final)


def test_blocks_do_not_see_what_comes_later(lm):
    """On blocks a given token further right has no say, on uniform it has."""
    one, two = [BOS, None, None, 5, 6, EOS], [BOS, None, None, 20, 30, EOS]

    def first_entropy(template, path):
        return records(lm, [template], path=path, steps=2)[0].entropy_BL[0, 1:3]

    assert torch.equal(first_entropy(one, "blocks:2"), first_entropy(two, "blocks:2"))
    assert not torch.allclose(first_entropy(one, "uniform"), first_entropy(two, "uniform"))
    three, four = [BOS, 5, 6, None, None, EOS], [BOS, 20, 30, None, None, EOS]
    late = [records(lm, [t], path="blocks:2", steps=2)[0].entropy_BL[0, 3:5] for t in (three, four)]
    assert not torch.allclose(*late)


def test_blocks_generate_as_two_streams_train(lm):
    """The posterior of a block in generation is that of the noisy stream in training, given the same past."""
    record = records(lm, [[BOS, 5, 6, None, None, EOS]], path="blocks:2", steps=1)[0]
    ids = torch.tensor([[BOS, 5, 6, 9, 9, EOS]])
    place, block = torch.arange(6)[None], torch.tensor([[0, 2, 2, 4, 4, 6]])
    layout = Layout.two_streams(place * 0 + 1, place, block)
    sigma = torch.tensor([[0.0] * 6 + [0, INF, INF, INF, INF, INF]])
    with torch.no_grad():
        found = lm.denoiser.predict(lm.denoiser.embedding(torch.cat([ids, ids], 1)), sigma, layout)
        logits = found.spread(found.logits_NV)[0, 9:11].double()
    logits[:, NEVER] = -INF
    torch.testing.assert_close(record.entropy_BL[0, 3:5].double(), entropy(logits), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("path", ["uniform", "blocks:3"])
def test_the_table_of_embeddings_is_computed_once(lm, path, monkeypatch):
    whole, calls = Embedding.table, []
    monkeypatch.setattr(Embedding, "table", lambda self: calls.append(self) or whole(self))
    assert records(lm, CLOSED, path=path, steps=8)[-1].nfe_B.max() > 1
    assert len(calls) == 1


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "solver"),
    [("uniform", "sde"), ("blocks:1", "posterior"), ("remask", "renoise"), ("confidence", "ancestral"),
     ("uniform", "euler")],
)  # fmt: skip
def test_same_seed_same_text_and_another_seed_another(lm, path, solver):
    """Bit for bit, and no global state has a say."""
    how = {"n": 3, "path": path, "solver": solver, "steps": 8}
    once = lm.generate(**how, seed=3)
    assert len({tuple(one.ids) for one in once}) > 1
    torch.manual_seed(99)
    np.random.seed(99)
    assert once == lm.generate(**how, seed=3)
    assert once != lm.generate(**how, seed=300)


def test_generation_leaves_global_randomness_and_weights_alone(lm):
    before, weights = torch.get_rng_state(), [p.clone() for p in lm.parameters()]
    lm.generate(n=2, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, lm.parameters(), strict=True))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_uniform_takes_its_steps(lm, steps):
    assert [one.nfe for one in lm.generate(n=3, path="uniform", steps=steps)] == [steps] * 3


@pytest.mark.parametrize(
    ("size", "steps", "nfe"), [(1, 1, 9), (1, 9, 9), (1, 30, 30), (3, 1, 3), (3, 12, 12), (4, 8, 8), (9, 5, 5)]
)
def test_blocks_take_the_steps_asked_for_or_one_a_block(lm, size, steps, nfe):
    """Nine free tokens."""
    assert lm.generate([""], path=f"blocks:{size}", steps=steps, length=11)[0].nfe == nfe


def test_ramp_takes_no_more_than_its_steps(lm):
    for slope in (0.1, 1, 1e6):
        assert all(0 < one.nfe <= 20 for one in lm.generate(n=4, path=f"ramp:{slope}", steps=20))
