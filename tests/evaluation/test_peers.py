"""The peers: what masked and autoregressive models cost and write, against loops that evaluate everything afresh."""

import math
from functools import cache
from itertools import combinations, permutations

import numpy as np
import pytest
import torch

from scorelm.config.recipe import NoiseConfig, TrainingConfig
from scorelm.evaluation.price import price
from scorelm.noise.schedule import Log
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch
from scorelm.sampling.loop import Loop, generate

from ..conftest import SPECIAL
from .exact import BOS, EOS, F64, PAD, UNK
from .networks import cross_entropy, evaluate, make_model, network, next_logits, tokenizer, writable

pytestmark = pytest.mark.usefixtures("no_grad")
MASKED, AUTOREGRESSIVE = OBJECTIVES["masked"], OBJECTIVES["autoregressive"]
ROW = (BOS, 12, 30, 17, EOS)

# --- autoregressive ---------------------------------------------------------------------------------------------------


def written_by_hand(lm, template, seed):
    """A row drawn token by token, every prefix evaluated afresh; ids and the logits that each was drawn from."""
    gen = torch.Generator().manual_seed(seed)
    ids, seen = [], {}
    for place, token in enumerate(template):
        if token is None:
            logits_V = writable(next_logits(lm, ids))
            if template[-1] == EOS:
                logits_V[EOS] = -torch.inf
            seen[place] = logits_V
            u = float(torch.rand(1, dtype=F64, generator=gen))
            token = int((logits_V.softmax(-1).cumsum(0) <= u).sum())
        ids.append(token)
        if token == EOS:
            break
    return ids, seen


def test_an_autoregressive_model_draws_what_an_uncached_loop_draws(settings_of):
    """Rows with and without a prompt, of known length and open; each at its own pace."""
    lm, prompt, kept = make_model("autoregressive"), tokenizer().encode("and god"), {}
    templates = [
        [BOS, *[None] * 12], [BOS, *prompt, *[None] * 9], [BOS, *[None] * 7, EOS], [BOS, *prompt, None, None, EOS],
        [BOS, *[None] * 18],
    ]  # fmt: skip
    seeds = [5, 6, 7, 8, 9]

    def watched(network, window):
        evaluator = AUTOREGRESSIVE.evaluator(network, window)

        def answer(queries):
            (answer,) = evaluator(queries)
            for (row, place), logits_V in zip(answer.open_BL.nonzero().tolist(), answer.logits_NV, strict=True):
                kept[row, place] = logits_V.clone()
            return [answer]

        return answer

    loop = Loop(network("autoregressive"), lm.schedule, watched)
    *_, record = generate(loop, templates, seeds, settings_of(path="blocks:1", steps=1))
    count = ends = 0
    for row, (template, seed) in enumerate(zip(templates, seeds, strict=True)):
        ids, logits = written_by_hand(lm, template, seed)
        assert record.ids_BL[row, : len(ids)].tolist() == ids
        assert int(record.length_B[row]) == len(ids) and int(record.nfe_B[row]) == len(logits)
        ends, count = ends + (len(ids) < len(template)), count + len(logits)
        for place, logits_V in logits.items():
            torch.testing.assert_close(kept[row, place].double(), logits_V, rtol=1e-4, atol=1e-4)
        assert not {ids[place] for place in logits} & {BOS, PAD, UNK}
    assert len(kept) == count and ends


def test_the_text_of_an_autoregressive_sample_is_that_of_its_ids():
    lm = make_model("autoregressive")
    for sample in lm.generate(["and god", ""], n=3, seed=3, temperature=1, top_p=1):
        assert sample.ids[0] == BOS and len(sample.ids) <= lm.max_length
        assert sample.text == tokenizer().decode(sample.ids)
        prompt = tokenizer().encode("and god") if sample.seed < 6 else []
        template = [BOS, *prompt, *[None] * lm.max_length][: lm.max_length]
        assert sample.ids == written_by_hand(lm, template, sample.seed)[0]


@pytest.mark.parametrize(
    ("objective", "options", "word"),
    [
        ("autoregressive", {"path": "uniform"}, "left to right"),
        ("autoregressive", {"path": "blocks:2"}, "left to right"),
        ("autoregressive", {"guidance": 2.0}, "guidance"),
        ("masked", {"path": "uniform"}, "bounded"),
        ("masked", {"path": "blocks:1"}, "bounded"),
    ],
)
def test_what_a_peer_cannot_write_is_refused_in_one_line(objective, options, word):
    with pytest.raises(ValueError, match=word) as error:
        make_model(objective).generate(["and"], **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("objective", "options"), [("autoregressive", {}), ("masked", {"repair": 0.5})])
def test_what_a_peer_cannot_fill_in_is_refused_in_one_line(objective, options):
    with pytest.raises(ValueError, match="cannot") as error:
        make_model(objective).infill("and ____", **options)
    assert "\n" not in str(error.value)


# --- masked -----------------------------------------------------------------------------------------------------------


def drawn(row, count, seed):
    """`count` copies of a document, two in each packed row, with masks of a seed."""
    ids = torch.tensor([list(row) * 2] * (count // 2))
    segment = torch.tensor([[1] * len(row) + [2] * len(row)] * (count // 2))
    batch = Batch(ids, segment, torch.arange(len(row)).repeat(2).expand_as(ids))
    rng = torch.Generator().manual_seed(seed)
    random = MASKED.random(batch, NoiseConfig(), rng)
    return MASKED.draw(batch, NoiseConfig(), Log(0.5, 20.0), SPECIAL, random).with_noise(8, rng)


@cache
def given_some(row, given):
    """Cross-entropies of a row's other places (a dict) when the places `given` and its ends are known."""
    sigma = [0.0 if i in given or t in (BOS, EOS) else math.inf for i, t in enumerate(row)]
    logits_LV = evaluate(make_model("masked"), list(row), sigma)
    return {i: cross_entropy(logits_LV[i], row[i]) for i in range(len(row)) if sigma[i]}


def any_order_nats(row, free):
    """The mean NLL over every order of the free places, one order after the other."""
    costs = []
    for order in permutations(free):
        known = frozenset(set(range(len(row))) - set(free))
        for place in order:
            costs.append(given_some(row, known)[place])
            known |= {place}
    return sum(costs) / math.factorial(len(free))


def test_masks_never_hide_the_start_and_hide_all_else_equally_often():
    draw = drawn(ROW, 20_000, 0)
    hidden_NL = (draw.sigma_BS == torch.inf).view(-1, 5)
    assert set(draw.sigma_BS.unique().tolist()) == {0.0, math.inf}
    assert not hidden_NL[:, 0].any()
    expected_L = torch.tensor([0.5, 0.5, 0.5, 0.25], dtype=F64)  # </s> is known half of the time
    torch.testing.assert_close(hidden_NL[:, 1:].double().mean(0), expected_L, atol=0.015, rtol=0)
    share = torch.bincount(hidden_NL[:, 1:4].sum(1), minlength=4).double() / 20_000
    torch.testing.assert_close(share, torch.full((4,), 0.25, dtype=F64), atol=0.015, rtol=0)  # t uniform: all counts
    assert ((draw.weight_BS > 0) == (draw.sigma_BS > 0)).all()


def raw_costs(row, given):
    """As `given_some`, but nothing is ruled out, as in training, and ``</s>`` is known only if it is given."""
    sigma = [0.0 if i == 0 or i in given else math.inf for i in range(len(row))]
    logits_LV = evaluate(make_model("masked"), list(row), sigma, raw=True)
    return {i: cross_entropy(logits_LV[i], row[i]) for i in range(1, len(row)) if sigma[i]}


def mean_over_masks(row, places, always=()):
    """n / m times the mean cost of the m of n places that are hidden, averaged over all masks of a size, summed."""
    nats = 0.0
    for shown in range(len(places)):
        masks = list(combinations(places, shown))
        costs = [sum(raw_costs(row, (*mask, *always)).values()) / (len(places) - shown) for mask in masks]
        nats += sum(costs) / len(masks)
    return nats


@pytest.mark.thorough
def test_the_loss_of_a_masked_model_is_the_mean_over_all_orders():
    """Weighted cross-entropies are unbiased: every mask of three tokens, with ``</s>`` known half of the time."""
    lm = make_model("masked")
    expected = (mean_over_masks(ROW, (1, 2, 3), always=(4,)) + mean_over_masks(ROW, (1, 2, 3, 4))) / (3 + 4)
    losses = []
    for seed in range(6):
        draw, config = drawn(ROW, 6000, seed), TrainingConfig(likelihood_weight=0.0, z_loss=0.0)
        outcome = MASKED.loss(lm.denoiser, draw, lm.schedule, config, live=draw.live, special=SPECIAL)
        losses.append(float(outcome.loss))
    error = np.std(losses, ddof=1) / 6**0.5
    assert np.mean(losses) == pytest.approx(expected, abs=4 * error + 0.002 * expected)
    assert error < 0.06


def test_a_masked_models_price_is_its_mean_over_all_orders():
    """With one draw for each count of given tokens, and the length's own price beside it."""
    lm = make_model("masked")
    text = next(t for t in ("da", "go", "he", "or", "be", "12") if len(tokenizer().encode(t)) in (2, 3))
    row = tuple(tokenizer().encode_document(text))
    places = tuple(range(1, len(row) - 1))
    found = price(lm, [text] * 1500, draws=len(places))
    assert found.path == "random"
    expected = any_order_nats(row, places) - math.log((len(row) - 1 + 0.5) / 200)
    error = float(found.by_text.std()) / 1500**0.5
    assert abs(float(found.by_text.mean()) - expected) < 4 * error + 1e-4
    assert error < 0.06
