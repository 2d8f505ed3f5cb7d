"""Generation: the contract of step records, rows that mind their own business, and text that is kept."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scorelm.noise.plan import to_sigma
from scorelm.sampling.choose import minimum_bayes_risk, most_common
from scorelm.sampling.generate import Options, Sampler, generate
from torch import nn

from scorelm.config.recipe import ModelConfig
from scorelm.lm import ScoreLM
from scorelm.model.attention import CLEAN, NOISY, Layout
from scorelm.model.embedding import Embedding
from scorelm.noise.schedule import Log
from scorelm.sampling.cache import finished_blocks
from scorelm.sampling.guidance import Guidance
from scorelm.sampling.paths import make_path
from scorelm.sampling.sample import Sample, infill, sample
from scorelm.sampling.solvers import make_solver
from scorelm.sampling.state import start
from scorelm.text.sentencepiece import BOS, EOS, PAD, UNK, Tokenizer

LINES = [
    "in the beginning god created the heaven and the earth",
    "and the earth was without form and void",
    "and god said let there be light and there was light",
    "he called the light day and the darkness night 12",
] * 5
LENGTHS = [0] * 5 + [1, 2, 3, 4, 5, 4, 3, 2, 1, 1, 1]  # at most 15 tokens
PATHS = ["uniform", "ramp:0.5", "ramp:1e6", "blocks:1", "blocks:3", "blocks:100", "shuffled", "confidence", "entropy"]
SOLVERS = ["posterior", "renoise", "ancestral:0.5", "sde", "euler", "heun", "dpmpp_2m"]
INF = math.inf


@pytest.fixture(scope="module")
def lm():
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(LINES, 50, byte_fallback=False)
    config = ModelConfig(dim=32, layers=2, heads=2, hidden=64, embedding_dim=16)
    lm = ScoreLM(config, tokenizer, Log(0.7, 20.0), LENGTHS)
    for parameter in lm.denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    nn.init.normal_(lm.denoiser.context.weight, std=0.5)
    return lm.eval()


def options(path="uniform", solver="posterior", steps=6, temperature=1.0):
    return Options(make_path(path), make_solver(solver), steps, Guidance(temperature=temperature))


def records(lm, templates, *args, seeds=None, **kwargs):
    seeds = list(range(len(templates))) if seeds is None else seeds
    return list(generate(lm.denoiser, lm.schedule, templates, seeds, options(*args, **kwargs)))


CLOSED = [
    [BOS, 7, None, None, 9, None, EOS],
    [BOS, None, None, None, None, None, None, None, 12, EOS],
    [BOS, None, EOS],
    [BOS, 8, 9, 10, EOS],
]


# --- the contract of records ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_records_keep_their_contract(lm, path, solver):
    found = records(lm, CLOSED, path, solver)
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
        assert (record.entropy_BL[fresh] > 0).all()
        assert (record.entropy_BL <= math.log(50) + 1e-4).all() and torch.isfinite(record.change_BL).all()
        assert (record.change_BL <= 2 + 1e-5).all()
        before = record.sigma_BL
    assert (found[-1].sigma_BL == 0).all()
    assert int(nfe.max()) <= (6 if not path.startswith("blocks") else 11)
    written = found[-1].ids_BL[free]
    assert not torch.isin(written, torch.tensor([BOS, EOS, PAD, UNK])).any()
    assert ((written >= 0) & (written < 50)).all()


@pytest.mark.parametrize("path", PATHS)
def test_a_finished_token_never_changes(lm, path):
    found = records(lm, CLOSED, path)
    for earlier, later in pairwise(found):
        done = earlier.sigma_BL == 0
        assert torch.equal(earlier.ids_BL[done], later.ids_BL[done])


def test_records_are_snapshots(lm):
    """A record that was kept must not change when generation goes on."""
    stream = generate(lm.denoiser, lm.schedule, CLOSED, range(4), options(steps=5))
    first = next(stream)
    copies = {name: value.clone() for name, value in vars(first).items() if isinstance(value, torch.Tensor)}
    list(stream)
    for name, value in copies.items():
        assert torch.equal(getattr(first, name), value), name


def test_entropy_of_the_first_step_is_the_posteriors(lm):
    """Against the denoiser itself: no evidence anywhere, one free block after <s>, specials ruled out."""
    template = [BOS, None, None, 9, EOS]
    record = records(lm, [template], temperature=0.7)[0]
    ids = torch.tensor([[BOS, PAD, PAD, 9, EOS]])
    place = torch.arange(5)[None]
    layout = Layout(place * 0 + 1, place, (place > 0).long(), torch.where(place > 0, NOISY, CLEAN))
    sigma = torch.tensor([[0, INF, INF, 0, 0]])
    with torch.no_grad():
        logits = lm.denoiser(lm.denoiser.embedding(ids), sigma, layout)[0, 1:3].double()
    logits[:, [BOS, EOS, PAD, UNK]] = -INF
    log_p = (logits / 0.7).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)
    torch.testing.assert_close(record.entropy_BL[0, 1:3].double(), entropy, rtol=1e-4, atol=1e-5)
    x0 = log_p.exp() @ lm.denoiser.embedding.table().detach().double()
    torch.testing.assert_close(record.change_BL[0, 1:3].double(), x0.norm(dim=-1) / 4, rtol=1e-4, atol=1e-5)


def test_the_second_step_is_conditioned_on_the_first_estimate(lm):
    """Left to right: after one token is written the other is judged with the first pass's x0 fed back."""
    first, second = records(lm, [[BOS, None, None, 9, EOS]], "ramp:1e6", steps=2)
    assert first.sigma_BL[0].tolist() == [0, 0, INF, 0, 0]
    place = torch.arange(5)[None]
    layout = Layout(place * 0 + 1, place, (place > 0).long(), torch.where(place > 0, NOISY, CLEAN))
    specials = [BOS, EOS, PAD, UNK]

    def judge(ids, sigma, cond):
        with torch.no_grad():
            logits = lm.denoiser(lm.denoiser.embedding(torch.tensor([ids])), torch.tensor([sigma]), layout, cond)
        logits[..., specials] = -INF
        return logits[0, 2].log_softmax(-1).double()

    before = judge([BOS, PAD, PAD, 9, EOS], [0, INF, INF, 0, 0], None)
    cond = torch.zeros(1, 5, 16)
    cond[0, 2] = (before.exp() @ lm.denoiser.embedding.table().detach().double()).float()
    written = [BOS, int(first.ids_BL[0, 1]), PAD, 9, EOS]
    log_p, without = judge(written, [0, 0, INF, 0, 0], cond), judge(written, [0, 0, INF, 0, 0], None)
    entropy, plain = (float(-(p.exp() * p).nan_to_num().sum()) for p in (log_p, without))
    assert float(second.entropy_BL[0, 2]) == pytest.approx(entropy, abs=1e-4)
    assert abs(entropy - plain) > 1e-3
    moved = (log_p.exp() - before.exp()) @ lm.denoiser.embedding.table().detach().double()
    assert float(second.change_BL[0, 2]) == pytest.approx(float(moved.norm()) / 4, abs=1e-4)


def test_first_tokens_have_the_law_of_the_posterior(lm):
    """One step of one free token, 4,000 seeds: chi-square against the denoiser's own posterior."""
    rows = 4000
    record = records(lm, [[BOS, 5, None, 9, EOS]] * rows, steps=1)[-1]
    ids = torch.tensor([[BOS, 5, PAD, 9, EOS]])
    place = torch.arange(5)[None]
    layout = Layout(place * 0 + 1, place, (place > 0).long(), torch.where(place > 0, NOISY, CLEAN))
    with torch.no_grad():
        logits = lm.denoiser(lm.denoiser.embedding(ids), torch.tensor([[0, 0, INF, 0, 0]]), layout)[0, 2].double()
    logits[[BOS, EOS, PAD, UNK]] = -INF
    expected = rows * logits.softmax(-1)
    counts = torch.bincount(record.ids_BL[:, 2], minlength=50).double()
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


def test_levels_are_the_schedules(lm):
    u = torch.tensor([[1.0, 0.999, 0.5, 1e-9, 0.0]], dtype=torch.float64)
    sigma = to_sigma(u, lm.schedule)
    expected = [INF, 0.7 * (20 / 0.7) ** 0.999, math.sqrt(0.7 * 20), 0.7, 0.0]
    assert sigma.dtype == torch.float32
    torch.testing.assert_close(sigma[0], torch.tensor(expected), rtol=1e-5, atol=0)
    sigmas = [float(record.sigma_BL[0, 1]) for record in records(lm, [[BOS, None, EOS]], steps=4)]
    assert sigmas == pytest.approx([0.7 * (20 / 0.7) ** u for u in (0.75, 0.5, 0.25)] + [0.0], rel=1e-5)


def test_the_start_is_given_or_nothing(lm):
    state, layout = start(lm.denoiser.embedding, CLOSED, make_path("blocks:3"))
    free = state.free_BL
    assert torch.equal(state.sigma_BL == INF, free) and torch.equal(state.sigma_BL == 0, ~free)
    assert free.sum(1).tolist() == [3, 7, 1, 0]
    assert layout.segment_BL.sum(1).tolist() == [len(template) for template in CLOSED]
    assert layout.block_BL[0].tolist() == [0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert state.real_BL.sum(1).tolist() == state.length_B.tolist() == [len(template) for template in CLOSED]


def test_finished_blocks_are_clean():
    block = torch.tensor([[0, 1, 1, 2, 2, 3]])
    sigma = torch.tensor([[0, 0, 0, 0, 1.0, INF]])
    assert finished_blocks(block, sigma).tolist() == [[CLEAN, CLEAN, CLEAN, NOISY, NOISY, NOISY]]


# --- rows are independent ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("solver", ["posterior", "euler"])
@pytest.mark.parametrize("steps", [7, 12])
def test_a_row_does_not_depend_on_its_neighbours(lm, path, solver, steps):
    together = records(lm, CLOSED[:3], path, solver, steps=steps, seeds=[11, 12, 13])[-1]
    for row, template in enumerate(CLOSED[:3]):
        alone = records(lm, [template], path, solver, steps=steps, seeds=[11 + row])[-1]
        assert alone.ids_BL[0].tolist() == together.ids_BL[row, : len(template)].tolist()
        assert int(alone.nfe_B[0]) == int(together.nfe_B[row])


@pytest.mark.parametrize("path", PATHS)
def test_a_sample_can_be_had_again_from_its_seed(lm, path):
    many = lm.generate(["the", "god said"], n=3, path=path, steps=8, seed=5)
    assert [one.seed for one in many] == [5, 6, 7, 8, 9, 10]
    alone = [
        lm.generate([prompt], path=path, steps=8, seed=one.seed)[0]
        for prompt, one in zip(["the"] * 3 + ["god said"] * 3, many, strict=True)
    ]
    assert sum(a == one for a, one in zip(alone, many, strict=True)) >= 5  # a draw may fall within a rounding error


@pytest.mark.parametrize("path", ["uniform", "blocks:3"])
def test_the_table_of_embeddings_is_computed_once(lm, path, monkeypatch):
    whole, calls = Embedding.table, []
    monkeypatch.setattr(Embedding, "table", lambda self: calls.append(self) or whole(self))
    assert records(lm, CLOSED, path, steps=8)[-1].nfe_B.max() > 1
    assert len(calls) == 1


@pytest.mark.parametrize("path", ["uniform", "blocks:1"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_same_seed_same_text_and_another_seed_another(lm, path, solver):
    once = lm.generate(n=4, path=path, solver=solver, steps=40, seed=3)
    assert once == lm.generate(n=4, path=path, solver=solver, steps=40, seed=3)
    assert len({tuple(one.ids) for one in once}) > 1
    torch.manual_seed(99)
    np.random.seed(99)
    assert once == lm.generate(n=4, path=path, solver=solver, steps=40, seed=3)  # and no global state has a say
    assert once != lm.generate(n=4, path=path, solver=solver, steps=40, seed=300)


def test_generation_leaves_global_randomness_and_weights_alone(lm):
    before, weights = torch.get_rng_state(), [p.clone() for p in lm.parameters()]
    lm.generate(n=2, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(weights, lm.parameters(), strict=True))
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["uniform", "ramp:0.5", "blocks:4"])
def test_closed_rows_have_their_ends_and_no_other_specials(lm, path):
    for prompt in ("", "the light"):
        for one in lm.generate([prompt], n=20, path=path, steps=3, temperature=3.0):
            assert one.ids[0] == BOS and one.ids[-1] == EOS
            assert not set(one.ids[1:-1]) & {BOS, EOS, PAD, UNK}
            assert one.ids[1 : 1 + len(lm.tokenizer.encode(prompt))] == lm.tokenizer.encode(prompt)
            assert one.text == lm.tokenizer.decode(one.ids).strip() and one.text.startswith(prompt)
            assert 5 <= len(one.ids) <= 15


def test_open_rows_end_where_the_model_ends_them(lm):
    eager = lm.denoiser.prior.detach().clone()
    with torch.no_grad():
        lm.denoiser.prior[EOS] += 4.0
    try:
        samples = lm.generate(["the"], n=40, path="blocks:1", steps=1)
        spans = {}
        watched = []
        lm.generate(["the"], n=6, path="blocks:1", steps=1, watch=watched.append)
        for record in watched:
            for row in range(6):
                spans.setdefault(row, []).append(int(record.length_B[row]))
    finally:
        with torch.no_grad():
            lm.denoiser.prior.copy_(eager)
    head = 1 + len(lm.tokenizer.encode("the"))
    assert len({len(one.ids) for one in samples}) > 3
    assert sum(one.ids[-1] == EOS for one in samples) > 10
    for one in samples:
        assert one.ids[0] == BOS and len(one.ids) <= 15
        assert one.ids[-1] == EOS or len(one.ids) == 15
        assert not set(one.ids[1:-1]) & {BOS, EOS, PAD, UNK}
        assert one.nfe == len(one.ids) - head  # no evaluation after the end
    for lengths in spans.values():
        assert lengths == sorted(lengths, reverse=True)


def test_open_rows_do_not_depend_on_neighbours_that_end(lm):
    samples = lm.generate(["the"], n=12, path="blocks:1", steps=24, temperature=1.5)
    for one in samples:
        assert lm.generate(["the"], path="blocks:1", steps=24, temperature=1.5, seed=one.seed)[0].ids == one.ids


def test_a_length_closes_a_row_on_every_path(lm):
    for path in PATHS:
        for one in lm.generate(["the"], n=3, path=path, steps=4, length=11):
            assert len(one.ids) == 11 and one.ids[-1] == EOS and EOS not in one.ids[:-1]


def test_lengths_are_drawn_from_the_histogram(lm):
    counts = np.bincount([len(one.ids) for one in lm.generate(n=1500, steps=1)], minlength=16)
    law = np.array(LENGTHS) / sum(LENGTHS)
    assert (counts[law == 0] == 0).all()
    expected = 1500 * law[law > 0]
    assert ((counts[law > 0] - expected) ** 2 / expected).sum() < 32  # 10 degrees of freedom


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


def test_watch_sees_every_record(lm):
    seen = []
    samples = lm.generate(n=2, path="uniform", steps=5, watch=seen.append)
    assert [record.step for record in seen] == [1, 2, 3, 4, 5]
    for row, one in enumerate(samples):
        assert seen[-1].ids_BL[row, : len(one.ids)].tolist() == one.ids


# --- a generation path is what training showed ------------------------------------------------------------------------


def test_blocks_do_not_see_what_comes_later(lm):
    """On blocks a given token further right has no say, on uniform it has."""
    one, two = [BOS, None, None, 5, 6, EOS], [BOS, None, None, 20, 30, EOS]

    def entropy(template, path):
        return records(lm, [template], path, steps=2)[0].entropy_BL[0, 1:3]

    assert torch.equal(entropy(one, "blocks:2"), entropy(two, "blocks:2"))
    assert not torch.allclose(entropy(one, "uniform"), entropy(two, "uniform"))
    three, four = [BOS, 5, 6, None, None, EOS], [BOS, 20, 30, None, None, EOS]
    late = [records(lm, [t], "blocks:2", steps=2)[0].entropy_BL[0, 3:5] for t in (three, four)]
    assert not torch.allclose(*late)


def test_blocks_generate_as_two_streams_train(lm):
    """The posterior of a block in generation is that of the noisy stream in training, given the same past."""
    template = [BOS, 5, 6, None, None, EOS]
    record = records(lm, [template], "blocks:2", steps=1)[0]
    ids = torch.tensor([[BOS, 5, 6, 9, 9, EOS]])
    place, block = torch.arange(6)[None], torch.tensor([[0, 1, 1, 2, 2, 3]])
    layout = Layout(*(torch.cat(pair, 1) for pair in ((place * 0 + 1,) * 2, (place,) * 2, (block,) * 2)),
                    torch.cat([torch.zeros_like(block), torch.ones_like(block)], 1))  # fmt: skip
    sigma = torch.tensor([[0.0] * 6 + [0, INF, INF, INF, INF, INF]])
    with torch.no_grad():
        x = lm.denoiser.embedding(torch.cat([ids, ids], 1))
        logits = lm.denoiser(x, sigma, layout)[0, 9:11].double()
    logits[:, [BOS, EOS, PAD, UNK]] = -INF
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).nan_to_num().sum(-1)
    torch.testing.assert_close(record.entropy_BL[0, 3:5].double(), entropy, rtol=1e-4, atol=1e-5)


# --- infilling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_infill_keeps_what_is_given_and_fills_the_blanks(lm, path):
    pieces = [lm.tokenizer.encode(piece) for piece in ("god", "the", "day")]
    for one in lm.infill("god ____ the ____ day", n=4, blank_tokens=2, path=path, steps=4):
        ids = one.ids
        assert ids[0] == BOS and ids[-1] == EOS and len(ids) == 2 + sum(map(len, pieces)) + 4
        at = 1
        for k, piece in enumerate(pieces):
            assert ids[at : at + len(piece)] == piece
            at += len(piece) + (2 if k < 2 else 0)
        assert not set(ids[1:-1]) & {BOS, EOS, PAD, UNK}
        assert one.text.startswith("god") and one.text.endswith("day") and " the" in one.text


@pytest.mark.parametrize(
    ("text", "first", "last"), [("____ day", BOS, None), ("the ____", None, EOS), ("____", BOS, EOS)]
)
def test_blanks_at_the_ends(lm, text, first, last):
    one = lm.infill(text, blank_tokens=3, steps=3)[0]
    assert one.ids[0] == BOS and one.ids[-1] == EOS
    assert len(one.ids) == 2 + 3 + len(lm.tokenizer.encode(text.replace("____", "").strip()))


def test_text_beside_a_blank_gets_no_space(lm):
    inside = lm.tokenizer.encode_inside("ed")
    assert lm.tokenizer.decode([7, *inside]).endswith("ed") and inside != lm.tokenizer.encode("ed")
    for one in lm.infill("the light____ed", n=4, blank_tokens=1, steps=2):
        assert one.ids[-1 - len(inside) :] == [*inside, EOS]


def test_blanks_of_drawn_length_fit_the_model(lm):
    lengths = {len(one.ids) for one in lm.infill("the ____ day ____", n=30, steps=1)}
    fixed = 2 + len(lm.tokenizer.encode("the")) + len(lm.tokenizer.encode("day"))
    assert min(lengths) >= fixed + 2 and max(lengths) <= 15 and len(lengths) > 2


def test_infill_is_reproducible_row_by_row(lm):
    many = lm.infill("the ____ day", n=5, steps=4, seed=20)
    assert [one.seed for one in many] == [20, 21, 22, 23, 24]
    for one in many:
        assert lm.infill("the ____ day", steps=4, seed=one.seed) == [one]


# --- errors and nothing to do -----------------------------------------------------------------------------------------


def test_none_asked_none_given(lm):
    assert sample(lm, ["the"], 0) == [] and sample(lm, [], 3) == [] and infill(lm, "the ____", 0) == []


def test_nothing_free_is_the_text_itself(lm):
    template = [BOS, *lm.tokenizer.encode("the day"), EOS]
    assert records(lm, [template]) == []
    one = lm.generate(["the day"], length=len(template), steps=3)[0]
    assert one == Sample("the day", template, 0, 0)


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0}, {"steps": -1}, {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.inf},
        {"temperature": math.nan}, {"path": "sideways"}, {"path": "uniform:1"}, {"path": "blocks:0"},
        {"path": "blocks:inf"}, {"solver": "simpson"}, {"top_k": -1},
        {"top_p": 0.0}, {"guidance": -1.0}, {"seed": -1}, {"seed": 2**63},
        {"n": -1}, {"halt": "boredom"}, {"solver": "ancestral:2"},
    ],
)  # fmt: skip
def test_bad_options_are_refused(lm, bad):
    with pytest.raises(ValueError):
        lm.generate(["the"], **bad)
    with pytest.raises(ValueError):
        lm.infill("the ____", **bad)


@pytest.mark.parametrize("length", [-1, 0, 2, 4, 16, 1000])
def test_a_bad_length_is_refused(lm, length):
    with pytest.raises(ValueError, match=str(length)):
        lm.generate(["the day"], length=length)


@pytest.mark.parametrize("path", ["uniform", "blocks:1"])
def test_a_prompt_that_is_too_long_is_refused(lm, path):
    with pytest.raises(ValueError, match="15"):
        lm.generate(["the light and the darkness and the heaven and the earth"], path=path)


def test_infill_needs_a_blank_that_fits(lm):
    with pytest.raises(ValueError, match="blank"):
        lm.infill("no blank here")
    with pytest.raises(ValueError, match="blank"):
        lm.infill("three ___ are none")
    with pytest.raises(ValueError):
        lm.infill("the ____ day", blank_tokens=15)
    with pytest.raises(ValueError):
        lm.infill("the light and the darkness and the heaven ____ and the earth")


@pytest.mark.parametrize("blank_tokens", [0, -1, -5])
def test_a_blank_of_no_tokens_is_refused(lm, blank_tokens):
    with pytest.raises(ValueError):
        lm.infill("the ____ day", blank_tokens=blank_tokens)


# --- the cache of finished blocks -------------------------------------------------------------------------------------


def walk(lm, templates, path, solver, cached, window=0):
    """Records of a generation, and the most positions that a step has evaluated."""
    chosen = Options(make_path(path), make_solver(solver), 12, window=window)
    sampler = Sampler(lm.denoiser, lm.schedule, templates, range(len(templates)), chosen)
    widths, live = [], sampler.denoiser.live
    if not cached:
        sampler.cache = None

    def counted(x, *args):
        widths.append(x.shape[1])
        return live(x, *args)

    sampler.denoiser = Counted(lm.denoiser, counted)
    with torch.inference_mode():
        return list(sampler.records()), widths


class Counted:
    """A denoiser with another `live`."""

    def __init__(self, denoiser, live):
        self.embedding, self.live = denoiser.embedding, live


@pytest.mark.parametrize("path", ["blocks:1", "blocks:3", "blocks:4"])
@pytest.mark.parametrize("solver", ["posterior", "heun", "dpmpp_2m", "sde"])
def test_cached_blocks_are_the_uncached(lm, path, solver):
    templates = [*CLOSED[:3], [BOS, 7, 8, *[None] * 9], [BOS, None, None, 5, None, 6, None, None, EOS]]
    found, widths = walk(lm, templates, path, solver, cached=True)
    expected, whole = walk(lm, templates, path, solver, cached=False)
    assert len(found) == len(expected) and len(found) > 3
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.ids_BL, other.ids_BL) and torch.equal(one.sigma_BL, other.sigma_BL)
        torch.testing.assert_close(one.entropy_BL, other.entropy_BL, rtol=1e-3, atol=1e-4)
        assert torch.equal(one.nfe_B, other.nfe_B)
    assert max(widths) <= 2 * make_path(path).block + 2 < max(whole)  # a finished block, the next one, and the prompt


def test_a_window_hides_what_is_further_back(lm):
    """With a window of 6, a block does not depend on a text 6 positions or more before its end; without, it does."""
    tail = [None] * 3
    texts = [[BOS, a, a, a, 9, 10, 11, 12, 13, 14, 15, 16, *tail, EOS] for a in (7, 8)]
    near = [walk(lm, [text], "blocks:3", "posterior", cached=True, window=6)[0][0].entropy_BL for text in texts]
    far = [walk(lm, [text], "blocks:3", "posterior", cached=True)[0][0].entropy_BL for text in texts]
    assert torch.equal(*near) and not torch.equal(*far) and not torch.equal(near[0], far[0])


def test_blocks_write_beyond_the_training_length(lm):
    one = lm.generate(["the"], path="blocks:4", length=50, max_length=60, steps=20)[0]
    assert len(one.ids) == 50 and one.ids[-1] == EOS
    eager = lm.denoiser.prior.detach().clone()
    with torch.no_grad():
        lm.denoiser.prior[EOS] = -30.0
    try:
        endless = lm.generate(["the"], path="blocks:1", max_length=40, steps=1)[0]
    finally:
        with torch.no_grad():
            lm.denoiser.prior.copy_(eager)
    assert len(endless.ids) == 40 and endless.ids[-1] != EOS
    with pytest.raises(ValueError, match="only blocks"):
        lm.generate(["the"], path="uniform", length=50, max_length=60)
    with pytest.raises(ValueError, match="at most 15"):
        lm.generate(["the"], path="blocks:4", length=50)


# --- best of n --------------------------------------------------------------------------------------------------------


def test_the_best_of_several_is_one_of_them(lm):
    how = {"path": "uniform", "steps": 3, "temperature": 3.0}
    many = lm.generate(["the"], n=6, **how)
    one, two = lm.generate(["the"], n=2, best_of=3, **how)
    assert one.text in [s.text for s in many[:3]] and two.text in [s.text for s in many[3:]]
    assert (one.nfe, two.nfe) == (9, 9)
    for bad in ({"best_of": 0}, {"choose": "coin"}):
        with pytest.raises(ValueError):
            lm.generate(["the"], **bad)


def test_choices():
    texts = ["a b c d e", "a b c d f", "x y", "a b c d e f", "x y"]
    assert minimum_bayes_risk(texts) in (0, 1, 3)
    assert most_common(texts) == 2
    assert minimum_bayes_risk(["one"]) == most_common(["one"]) == 0


def test_a_repair_keeps_the_ends_doubts_the_rest_and_needs_no_blank(lm):
    """With little noise the text comes back, with much it is another; rows are independent; ends and length stay."""
    text = "the light"
    given = lm.tokenizer.encode_document(text)
    one = lm.infill(text, repair=0.01, steps=8)[0]
    assert one.ids == given and one.nfe <= 8
    many = lm.infill(text, n=4, repair=0.99, steps=8)
    assert all(len(s.ids) == len(given) and (s.ids[0], s.ids[-1]) == (BOS, EOS) for s in many)
    assert any(s.ids != given for s in many) and lm.infill(text, repair=0.99, steps=8, seed=2)[0] == many[2]
    for path in ("shuffled", "confidence", "bounded:1"):
        assert len(lm.infill(text, repair=0.5, steps=4, path=path)[0].ids) == len(given)


@pytest.mark.parametrize("text", ["____", ""])
def test_a_repair_of_nothing_given_is_an_infill(lm, text):
    assert lm.infill(text, repair=0.5, steps=4)[0].ids[0] == BOS


@pytest.mark.parametrize("options", [{"repair": 0.0}, {"repair": 1.0}, {"repair": 0.5, "path": "blocks:2"}])
def test_a_repair_that_makes_no_sense_is_refused(lm, options):
    with pytest.raises(ValueError, match="repair"):
        lm.infill("the light", **options)
