"""Prices of texts: rows and batches, figures that follow from the nats, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from scorelm.errors import InputError
from scorelm.evaluation.likelihood import bound
from scorelm.evaluation.price import bound_levels, price
from scorelm.evaluation.rows import batches, cut, length_nats, most_positions
from scorelm.noise.schedule import Gumbel, Log
from scorelm.sampling.paths import PATHS, make_path

from ..conftest import SPECIAL
from ..pretend import elsewhere
from .exact import BOS, EOS, F64, PAD, fast, one_batch, total
from .networks import TEXTS, cross_entropy, free_places, make_model, network, next_logits, tokenizer, writable

# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_are_the_texts_and_nothing_else():
    rows = cut(TEXTS, tokenizer(), 20)
    for number, text in enumerate(TEXTS):
        joined = [t for row, owner in zip(rows.ids, rows.text, strict=True) if owner == number for t in row]
        assert joined == [BOS, *tokenizer().encode(text), EOS]
        assert rows.tokens[number] == len(joined)
    assert max(map(len, rows.ids)) == 20 and rows.characters == [len(text) for text in TEXTS]


@pytest.mark.parametrize("positions", [1, 30, 64, 4096])
def test_batches_hold_every_row_once_with_padding_behind(positions):
    rows = cut(TEXTS, tokenizer(), 20).ids
    seen = []
    for batch in batches(rows, torch.device("cpu"), SPECIAL, positions):
        assert batch.ids_BL.numel() <= positions or len(batch.index) == 1
        for line, index in enumerate(batch.index):
            length, width = len(rows[index]), batch.ids_BL.shape[1]
            assert batch.ids_BL[line].tolist() == rows[index] + [PAD] * (width - length)
            assert batch.real_BL[line].tolist() == [1] * length + [0] * (width - length)
            assert batch.position_BL[line].tolist() == list(range(width))
        seen += batch.index
    assert sorted(seen) == list(range(len(rows)))


def test_a_large_vocabulary_makes_batches_smaller():
    """The logits are what takes memory: 4096 positions of the default vocabulary."""
    sizes = 50, 2048, 1 << 16, 1 << 24
    assert [most_positions(size, torch.device("cpu")) for size in sizes] == [4096, 4096, 128, 1]
    assert [most_positions(size, torch.device("cuda")) for size in sizes] == [65_536, 65_536, 2048, 8]


def test_lengths_are_a_distribution():
    """Over all that a row can be: one of each length that ends there, and a full one that goes on."""
    lengths = [0, 0, 3, 0, 5, 1]
    rows = [[BOS, *[5] * (n - 2), EOS][-n:] for n in range(1, 6)] + [[BOS, 5, 5, 5, 5]]
    nats = length_nats(lengths, rows)
    assert float((-nats).exp().sum()) == pytest.approx(1)
    assert nats[2] == pytest.approx(-math.log(0.5 / (9 + 2.5))) and nats[3] == pytest.approx(-math.log(5.5 / 11.5))
    assert nats[4] == nats[5] == pytest.approx(-math.log(1.5 / 11.5) + math.log(2))


def test_noise_is_standard_normal_and_new_in_every_draw_and_row():
    batch, _ = one_batch([[5] * 40 for _ in range(50)])
    eps_DN = torch.stack([batch.noise(8, 0, draw).flatten() for draw in range(4)])
    assert abs(float(eps_DN.mean())) < 0.01
    torch.testing.assert_close(torch.cov(eps_DN), torch.eye(4), atol=0.04, rtol=0)
    row_BN = batch.noise(8, 0, 0).flatten(1)
    assert float((torch.corrcoef(row_BN) - torch.eye(50)).abs().max()) < 0.25
    assert not torch.equal(batch.noise(8, 0, 0), batch.noise(8, 1, 0))


# --- figures ----------------------------------------------------------------------------------------------------------

WAYS = [
    ("uniform", None), ("ramp:0.5", None), ("blocks:1", None), ("blocks:3", None), ("ordered", None), ("reverse", None),
    ("random", None), ("uniform", 3), ("blocks:3", 9), ("shuffled", 4), ("confidence", 4), ("entropy", 4),
    ("surest", 4), ("bounded", 8),
]  # fmt: skip


@pytest.mark.parametrize(("path", "steps"), fast(*WAYS[1:8:3], *WAYS[10::3], of=WAYS))
def test_a_price_does_not_depend_on_the_size_of_the_batches(path, steps):
    lm = make_model()
    small, large, alone = (price(lm, TEXTS, path, steps=steps, draws=2, positions=n) for n in (64, 4096, 1))
    exact = path in ("ordered", "reverse")
    for other in (small, alone, price(lm, TEXTS, path, steps=steps, draws=2)):
        torch.testing.assert_close(other.by_text, large.by_text, rtol=1e-5 if exact else 2e-4, atol=1e-5)
    assert small.nats_per_token == pytest.approx(large.nats_per_token, rel=1e-4)
    assert small.nfe == large.nfe and small.tokens == large.tokens
    assert math.isfinite(large.nats_per_token) and (large.by_text > -20).all()


EXACT = [("score", "ordered"), ("score", "reverse"), ("autoregressive", "ordered")]


@pytest.mark.parametrize(("objective", "path"), EXACT)
def test_an_exact_price_does_not_depend_on_the_order_of_the_texts(objective, path):
    lm = make_model(objective)
    forward, backward = price(lm, TEXTS, path), price(lm, TEXTS[::-1], path)
    torch.testing.assert_close(forward.by_text, backward.by_text.flip(0), rtol=1e-5, atol=1e-5)
    alone = [float(price(lm, text, path).by_text) for text in TEXTS]
    torch.testing.assert_close(forward.by_text, torch.tensor(alone, dtype=F64), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("path", "steps"), WAYS)
def test_the_figures_follow_from_the_nats_of_each_text(path, steps):
    """Everything but the nats themselves, again by hand; texts that are cut count whole."""
    found = price(make_model(), TEXTS, path, steps=steps, draws=2)
    tokens = np.array([len(tokenizer().encode(text)) + 2 for text in TEXTS])
    nats = found.by_text.numpy()
    mean = nats.sum() / tokens.sum()
    assert tokens.max() > 20
    assert found.tokens == tokens.sum() and found.nats_per_token == pytest.approx(mean)
    assert found.bits_per_char == pytest.approx(nats.sum() / math.log(2) / sum(map(len, TEXTS)))
    error = math.sqrt(sum((n - mean * t) ** 2 for n, t in zip(nats, tokens, strict=True))) / tokens.sum()
    assert found.stderr_nats_per_token == pytest.approx(error)
    assert sum(found.terms.values()) == pytest.approx(mean)
    assert found.path == path and found.exact == (path in ("ordered", "reverse", "surest", "bounded"))
    mean_over = {"random": "upper bound (mean over 2 orders)"}
    assert found.kind == ("exact" if found.exact else mean_over.get(path, "upper bound"))
    assert ("length" in found.terms) == (path not in ("ordered", "blocks:1"))
    if "length" in found.terms:
        # Lengths 1 to 20 with counts 0, 1, ..., 19 and a half each; a text of more than 20 tokens is several rows, and
        # whether a full row ends or goes on costs ln 2.
        rows = [min(20, t - start) for t in tokens for start in range(0, t, 20)]
        expected = sum(-math.log((n - 1 + 0.5) / (190 + 10)) + math.log(2) * (n == 20) for n in rows)
        assert found.terms["length"] == pytest.approx(expected / tokens.sum())
    shown = found.to_json()
    assert shown["nats_per_token"] == found.nats_per_token and "by_text" not in shown and "integrand" not in shown


@pytest.mark.usefixtures("no_grad")
def test_a_price_is_the_sum_of_what_its_rows_cost():
    """Through the methods themselves: nothing is lost or swapped on the way."""
    lm = make_model()
    rows = cut(TEXTS, tokenizer(), 20)
    batch, _ = one_batch(rows.ids)
    by_row_N = torch.zeros(len(rows.ids), dtype=F64)
    levels = replace(lm.schedule, sigma_min=easy_level())
    by_row_N[batch.index] = total(bound(network(), levels, batch, make_path("uniform"), 4, 7, 2))
    by_row_N += length_nats(lm.lengths, rows.ids)
    expected = [sum(float(by_row_N[i]) for i, t in enumerate(rows.text) if t == k) for k in range(len(TEXTS))]
    found = price(lm, TEXTS, draws=4, seed=7)
    assert found.path == "uniform" and not found.exact
    assert found.nfe == pytest.approx(2 * (4 + 1) * len(rows.ids) / len(TEXTS))
    torch.testing.assert_close(found.by_text, torch.tensor(expected, dtype=F64), rtol=1e-4, atol=1e-4)
    assert price(lm, TEXTS, draws=4, seed=8).nats_per_token != found.nats_per_token


def test_an_autoregressive_price_is_every_prefix_alone():
    lm = make_model("autoregressive")
    found = price(lm, TEXTS)
    assert found.path == "ordered" and found.exact and found.nfe >= 1
    rows = cut(TEXTS, tokenizer(), 20)
    expected_T = torch.zeros(len(TEXTS), dtype=F64)
    for ids, owner in zip(rows.ids, rows.text, strict=True):
        for i in free_places(ids, closed=False):
            expected_T[owner] += cross_entropy(writable(next_logits(lm, ids[:i])), ids[i])
    torch.testing.assert_close(found.by_text, expected_T, rtol=1e-5, atol=1e-5)


def easy_level():
    """Where all other tokens together have odds of 1 to 20 against the true one: embeddings have 8 numbers."""
    return math.sqrt(8 / (2 * math.log(20 * (tokenizer().vocab_size - 1))))


@pytest.mark.parametrize(("low", "high"), [(0.1, 20.0), (0.5, 20.0), (1.5, 20.0), (0.1, 0.6)])
def test_a_bound_begins_where_a_token_is_easy_to_tell(low, high):
    """But not beyond the levels that the model has learned."""
    lm = make_model()
    lm.schedule, before = Log(low, high), lm.schedule
    try:
        begins = max(low, easy_level()) if easy_level() < high else low
        assert bound_levels(lm) == Log(pytest.approx(begins), high)
        assert float(price(lm, TEXTS[0], draws=1).integrand[0].min()) > begins
    finally:
        lm.schedule = before


@pytest.mark.parametrize("mu", [0.0, 1.0, 2.0])
def test_a_bound_does_not_miss_the_levels_that_a_steep_schedule_leaves_out(mu):
    """With levels drawn as a schedule that was fitted so steep says, the figure would be far below."""
    lm = make_model()
    before, log = lm.schedule, price(lm, TEXTS, seed=1).nats_per_token
    lm.schedule = Gumbel(0.1, 20.0, mu, beta=0.1)
    try:
        assert bound_levels(lm).beta > 0.4
        assert price(lm, TEXTS, seed=1).nats_per_token == pytest.approx(log, rel=0.25)
    finally:
        lm.schedule = before


def test_in_one_step_every_path_is_exact_and_costs_the_same():
    lm = make_model()
    in_blocks, ordered = price(lm, TEXTS, "blocks:1", steps=1), price(lm, TEXTS, "ordered")
    torch.testing.assert_close(in_blocks.by_text, ordered.by_text, rtol=1e-5, atol=1e-4)
    at_once = [price(lm, TEXTS, path, steps=1) for path in PATHS if path not in ("blocks", "remask")]
    for found in at_once:
        torch.testing.assert_close(found.by_text, at_once[0].by_text, rtol=1e-5, atol=1e-4)
    assert all(found.exact for found in (in_blocks, *at_once))
    assert not price(lm, TEXTS, "blocks:1", steps=2).exact and not price(lm, TEXTS, "blocks:1").exact


def test_the_curve_adds_up_to_the_diffusion_term():
    """Nats per token and unit of log sigma, over log sigma; with a log schedule the bins are of equal width."""
    found = price(make_model(), TEXTS, draws=24)
    sigma, density = found.integrand
    width = math.log(20.0 / easy_level()) / len(sigma)
    assert float((sigma.log() - sigma[0].log()).max()) == pytest.approx(width * (len(sigma) - 1))
    assert float(density.sum()) * width == pytest.approx(found.terms["diffusion"])


def test_watch_is_told_the_share_that_is_done():
    shares = []
    price(make_model(), TEXTS, draws=1, positions=1, watch=shares.append)
    assert shares == sorted(shares) and len(shares) == 8 and shares[-1] == 1


class Half:
    """One of two processes that share the rows; what a process finds is left for the other."""

    world = 2

    def __init__(self, rank, found):
        self.rank, self.found = rank, found

    def gather(self, part):
        self.found.append(part)
        return self.found


@pytest.mark.parametrize("path", ["uniform", "reverse", "ordered"])
def test_processes_share_the_rows_out(path):
    """The second finds what one process alone finds, the order of the rows included."""
    lm, found = make_model(), []
    how = {"path": path, "draws": 2, "positions": 30}
    price(lm, TEXTS, ranks=Half(0, found), **how)
    shared, alone = price(lm, TEXTS, ranks=Half(1, found), **how), price(lm, TEXTS, **how)
    torch.testing.assert_close(shared.by_text, alone.by_text)
    assert shared.terms == pytest.approx(alone.terms) and shared.nfe == alone.nfe and len(found) == 2
    assert (found[0][1] == 0).any() and (found[1][1] == 0).any()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "texts", "options", "reason"),
    [
        ("score", [], {}, "no text"),
        ("score", TEXTS, {"path": "ordered", "steps": 4}, "no steps"),
        ("score", TEXTS, {"path": "reverse", "steps": 4}, "no steps"),
        ("score", TEXTS, {"path": "random", "steps": 4}, "no steps"),
        ("score", TEXTS, {"path": "sideways"}, "sideways"),
        ("score", TEXTS, {"path": "ramp:-1"}, "-1"),
        ("score", TEXTS, {"path": "blocks:0"}, "0"),
        ("score", TEXTS, {"path": "remask", "steps": 4}, "no price"),
        ("score", TEXTS, {"draws": 0}, "draws"),
        ("score", TEXTS, {"path": "uniform", "steps": 0}, "steps"),
        ("score", TEXTS, {"stepps": 4}, "did you mean steps"),
        ("autoregressive", TEXTS, {"path": "uniform"}, "left to right"),
        ("autoregressive", TEXTS, {"path": "ordered", "steps": 2}, "no steps"),
        ("masked", TEXTS, {"path": "uniform"}, "random"),
        ("masked", TEXTS, {"path": "ordered"}, "random"),
        ("masked", TEXTS, {"path": "confidence"}, "random"),
    ],
)
def test_what_cannot_be_priced_is_refused_in_one_line(objective, texts, options, reason):
    with pytest.raises(InputError, match=reason) as caught:
        price(make_model(objective), texts, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("objective", ["score", "masked", "autoregressive"])
def test_a_text_that_cannot_be_spelled_has_no_price(objective):
    """It could never be written: the first of them is named, and what to do."""
    lm, texts = make_model(objective), ["god said", "god ☃ said", "void", "☃"]
    assert lm.tokenizer.special.unk in lm.tokenizer.encode(texts[1])
    with pytest.raises(
        InputError, match=r"2 of 4 texts \(number 2 is the first\).*cannot spell.*--byte-fallback"
    ) as found:
        price(lm, texts)
    assert "\n" not in str(found.value)
    with pytest.raises(InputError, match="1 of 1 texts"):
        price(lm, "☃")
    assert price(lm, [texts[0], texts[2]]).tokens > 0


# --- on another device ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "steps", "reads"),
    [("ordered", None, 7), ("reverse", None, 0), ("random", None, 0), ("uniform", None, 1), ("blocks:2", None, 1),
     ("bounded", 16, 1), ("confidence", 6, 2), ("blocks:1", 6, 1)],
)  # fmt: skip
def test_a_price_elsewhere_is_the_price_here(path, steps, reads):
    """Nor does the host often wait for the device: so many times an evaluation, and up to seven for a batch."""
    lm, texts = make_model(), [text for text in TEXTS if text]
    here = price(lm, texts, path, steps=steps, draws=4)
    with elsewhere(lm) as device:
        there = price(lm, texts, path, steps=steps, draws=4)
    torch.testing.assert_close(there.by_text, here.by_text, rtol=1e-4, atol=1e-4)
    longest = max(cut(texts, tokenizer(), 20).tokens)
    evaluations = max(here.nfe, longest if path in ("reverse", "blocks:1") else 0)
    assert device.waits.total() <= 11 + reads * evaluations, device.waits
