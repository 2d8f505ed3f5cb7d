"""A batch is its rows: what the network says of a row, and what is drawn for it, has nothing to do with the others.

The network's answers are compared in the same state, to rounding. Whole texts of a random network are not: in it a
rounding grows into another text now and then. They are compared for a model whose positions hardly see each other, and
there one row in twenty may differ.
"""

from dataclasses import fields

import pytest
import torch

from scorelm.sampling.evaluator import Cached, Dense
from scorelm.sampling.loop import Loop, generate
from scorelm.sampling.paths import PATHS as REGISTRY
from scorelm.sampling.query import Query

from .steps import BOS, EOS, NEVER, PAD, free, raised_prior, records

UNEVEN = [
    [BOS, None, EOS],
    [BOS, *[5, None] * 16, 9, EOS],
    [BOS, 7, 8, None, None, EOS],
    [BOS, *[None] * 12, EOS],
    [BOS, 11, 12, 13, 14, EOS],  # nothing to write
    [BOS, None, 9, EOS],
    [BOS, *range(4, 30), None, EOS],
    [BOS, 7, *[None] * 9],  # may write its end
]
PATHS = ["uniform", "ramp:0.5", "blocks:3", "shuffled", "confidence", "entropy", "surest", "bounded:1", "remask:0.3"]


def row_of(query, row, length):
    """The query of one row alone."""
    parts = {f.name: getattr(query, f.name)[row : row + 1, :length] for f in fields(Query) if f.name != "in_blocks"}
    return Query(**parts, in_blocks=query.in_blocks)


class BesideAlone:
    """Answers as `evaluator` does, and compares each answer with what a row gets alone.

    Args:
        evaluator: that answers.
        alone: makes an evaluator for a row alone.
        lengths: of the rows.
    """

    def __init__(self, evaluator, alone, lengths):
        self.evaluator, self.rows, self.compared = evaluator, [(alone(), n) for n in lengths], 0

    def __call__(self, queries):
        (query,) = queries
        (answer,) = self.evaluator(queries)
        open_BL = query.open_BL
        for row, (evaluator, length) in enumerate(self.rows):
            own = row_of(query, row, length)
            if own.reach_BL.any():
                (expected,) = evaluator([own])
                found = answer.at(open_BL & (torch.arange(len(open_BL)) == row)[:, None])
                torch.testing.assert_close(found, expected.logits_NV, rtol=1e-4, atol=1e-4)
                self.compared += 1
        return [answer]


def compare_with_rows_alone(lm, templates, settings, evaluator_for):
    """Run a request, every answer in it compared; the number of comparisons and the last record."""
    lengths, watched = [len(template) for template in templates], []

    def beside(network, window):
        watched.append(BesideAlone(evaluator_for(network), lambda: evaluator_for(network), lengths))
        return watched[0]

    loop = Loop(lm.loop().network, lm.schedule, beside)
    *_, last = generate(loop, templates, range(40, 40 + len(templates)), settings)
    return watched[0].compared, last


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("uniform", {"solver": "heun", "steps": 6}),
        ("ramp:0.5", {}),
        ("shuffled", {"halt": "entropy:1.5"}),
        ("confidence", {"solver": "sde", "steps": 9}),
        ("bounded:1", {"guidance": 2.0}),
        ("remask:0.3", {"self_guidance": 1.5}),
        ("blocks:3", {"guidance": 0.5, "self_guidance": 3.0}),
    ],
)
def test_an_answer_is_that_of_the_row_alone(long_lm, settings_of, path, options):
    """Rows of very different lengths that share rows of the model: logits in every state of a generation."""
    settings = settings_of(**{"path": path, "steps": 4} | options)
    compared, last = compare_with_rows_alone(long_lm, UNEVEN, settings, Dense)
    assert compared > 9 and (last.sigma_BL == 0).all()


@pytest.mark.parametrize(
    ("path", "solver"), [("blocks:1", "posterior"), ("blocks:3", "posterior"), ("blocks:4", "sde")]
)
def test_behind_a_cache_too(long_lm, settings_of, path, solver):
    """Every row at its own block."""
    compared, last = compare_with_rows_alone(
        long_lm,
        UNEVEN,
        settings_of(path=path, solver=solver, steps=8),
        lambda network: Cached(network, 0, network.noisy),
    )
    assert compared > 20 and (last.sigma_BL == 0).all()


def test_a_row_costs_what_it_costs_alone(lm, settings_of):
    """A row without a prompt has no second pass, even beside one that has."""
    prompted, plain = [BOS, 5, 6, None, None, 9, None, EOS], [BOS, None, None, None, None, EOS]
    for path in ("uniform", "confidence", "blocks:2"):
        together = records(lm, [plain, prompted], path=path, guidance=2.0, steps=6)[-1]
        alone = [records(lm, [t], [k], path=path, guidance=2.0, steps=6)[-1] for k, t in enumerate((plain, prompted))]
        assert together.nfe_B.tolist() == [int(one.nfe_B[0]) for one in alone]


# --- whole texts ------------------------------------------------------------------------------------------------------


def different_rows(lm, templates, seeds, **options):
    """The last record of a batch, how many of its rows are not those of the row alone, and how many were compared."""
    *_, together = records(lm, templates, seeds, **options)
    different = compared = 0
    for row, (template, seed) in enumerate(zip(templates, seeds, strict=True)):
        alone = records(lm, [template], [seed], **options)
        size = len(template)
        assert (together.ids_BL[row, size:] == PAD).all() and (together.sigma_BL[row] == 0).all()
        if not alone:
            assert None not in template and together.nfe_B[row] == 0
            continue
        same = torch.equal(together.ids_BL[row, :size], alone[-1].ids_BL[0])
        same &= int(together.length_B[row]) == int(alone[-1].length_B[0])
        different += not (same and int(together.nfe_B[row]) == int(alone[-1].nfe_B[0]))
        compared += 1
    return together, different, compared


@pytest.mark.thorough
def test_texts_are_those_of_each_row_alone(calm_lm):
    """On every path, with solvers of every kind, and with rows that halt: ids, lengths and evaluations."""
    assert {path.partition(":")[0] for path in PATHS} == set(REGISTRY)
    requests = [{"path": path} for path in (*PATHS, "blocks:1", "bounded")]
    requests += [{"path": p, "solver": s} for p in ("uniform", "blocks:3") for s in ("heun", "dpmpp_2m", "renoise")]
    requests += [{"path": "confidence", "solver": "ancestral:0.5", "temperature": 0.8, "top_p": 0.95}]
    requests += [
        {"path": path, "halt": halt, "steps": 12}
        for path in ("uniform", "blocks:3", "entropy") for halt in ("entropy:3.4", "patience:2", "kl:0.3")
    ]  # fmt: skip
    different = compared = 0
    for options in requests:
        _, more, of = different_rows(calm_lm, UNEVEN, range(40, 48), **{"steps": 7} | options)
        different, compared = different + more, compared + of
    assert compared > 150 and different <= compared // 20


def test_texts_of_a_few_requests_are_those_of_each_row_alone(calm_lm):
    """The smaller one of the test before."""
    found = [
        different_rows(calm_lm, UNEVEN, range(40, 48), **options)
        for options in (
            {"path": "bounded", "steps": 5},
            {"path": "blocks:3", "solver": "heun", "halt": "patience:2", "steps": 12},
            {"path": "uniform", "halt": "entropy:3.4", "steps": 6},
        )
    ]
    assert sum(different for _, different, _ in found) <= 1


def test_open_and_closed_rows_share_the_model(calm_lm):
    """Only a row that is open may write its end, wherever it stands in a row of the model; each is the row alone."""
    templates = [[BOS, 7, *[None] * 9], [BOS, *[None] * 3, EOS], [BOS, *[None] * 4], [BOS, *[None] * 6, EOS]] * 3
    with raised_prior(calm_lm, EOS, 3.0):
        for path in ("uniform", "blocks:3", "blocks:1"):
            together, different, _ = different_rows(calm_lm, templates, range(12), path=path, steps=4)
            assert different <= 1
            for row, template in enumerate(templates):
                length = int(together.length_B[row])
                text = together.ids_BL[row, :length].tolist()
                assert EOS not in text[:-1]
                assert template[-1] is None or (length == len(template) and text[-1] == EOS)
            lengths = together.length_B.tolist()
            assert any(n < len(template) for n, template in zip(lengths, templates, strict=True))


def test_the_order_of_the_requests_does_not_matter(calm_lm):
    """Packing sorts rows by length; nothing comes back in another row."""
    seeds = list(range(len(UNEVEN)))
    there = records(calm_lm, UNEVEN, seeds, steps=5)[-1]
    back = records(calm_lm, UNEVEN[::-1], seeds[::-1], steps=5)[-1]
    assert (there.ids_BL != back.ids_BL.flip(0)).any(1).sum() <= 1 and torch.equal(there.nfe_B, back.nfe_B.flip(0))


PROMPTS = ["", "the", "and god said let there be light", "in the beginning god created the heaven and the earth"]


def test_a_sample_can_be_had_again_from_its_seed(calm_lm):
    """Text, ids, seed and evaluations of a batch of prompts and of blanks, one by one."""
    pairs = []
    for options in (
        {"path": "uniform"},
        {"path": "blocks:3", "solver": "ancestral", "temperature": 0.8, "top_p": 0.95},
    ):
        batch = calm_lm.generate(PROMPTS, steps=7, seed=7, **options)
        assert len({len(one.ids) for one in batch}) > 2 and [one.seed for one in batch] == [7, 8, 9, 10]
        pairs += [
            (one, calm_lm.generate(PROMPTS[k], steps=7, seed=one.seed, **options)[0]) for k, one in enumerate(batch)
        ]
    many = calm_lm.infill("the ____ day", n=5, steps=4, seed=20)
    assert [one.seed for one in many] == [20, 21, 22, 23, 24] and len({tuple(one.ids) for one in many}) > 3
    pairs += [(one, calm_lm.infill("the ____ day", steps=4, seed=one.seed)[0]) for one in many]
    assert sum(one != again for one, again in pairs) <= 1
    for one, _ in pairs:
        assert not set(one.ids[1:-1]) & set(NEVER.tolist())


@pytest.mark.parametrize("options", [{"self_guidance": 2.0}, {}])
def test_a_request_has_nothing_of_the_one_before(lm, settings_of, options):
    """In the same loop, as long as the one before, but in other blocks: what was kept is not taken for its own."""
    loop = lm.loop()
    for template, size in (
        ([BOS, None, None, None, EOS], 4), ([BOS, 5, 6, None, EOS], 2), ([BOS, 5, None, None, EOS], 3),
    ):  # fmt: skip
        settings = settings_of(path=f"blocks:{size}", steps=3, **options)
        found, fresh = (list(generate(one, [template], [1], settings)) for one in (loop, lm.loop()))
        for record, expected in zip(found, fresh, strict=True):
            assert torch.equal(record.ids_BL, expected.ids_BL) and torch.equal(record.entropy_BL, expected.entropy_BL)


def test_a_random_order_is_the_rows_own(lm):
    """Reproducible from its seed, whatever its neighbours, and different for other seeds; given tokens have no turn."""
    templates = [[BOS, 5, *[None] * 7, EOS], [BOS, *[None] * 20, EOS], [BOS, None, 6, None, 7, None, None, None, EOS]]

    def orders(templates, seeds):
        found = records(lm, templates, seeds, path="shuffled", steps=5)
        return [
            [next(r.step for r in found if r.sigma_BL[row, column] == 0) for column in free(template)]
            for row, template in enumerate(templates)
        ]

    together = orders(templates, [8, 9, 8])
    assert together == [orders([template], [seed])[0] for template, seed in zip(templates, [8, 9, 8], strict=True)]
    assert len({tuple(orders(templates[:1], [seed])[0]) for seed in range(10)}) > 5


# --- dense rows -------------------------------------------------------------------------------------------------------


def test_the_model_sees_dense_rows(long_lm):
    """The six rows that move, of up to 35 positions and 91 in all, stand in three rows of the model."""
    sizes = []
    handle = long_lm.denoiser.backbone.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[1].shape)))
    try:
        records(long_lm, UNEVEN[:-1], steps=3)
    finally:
        handle.remove()
    assert [len(template) for template in UNEVEN[:-1] if None in template] == [3, 35, 6, 14, 4, 29]
    assert sizes == [(3, 35)] * 3  # 35; 29 and 6; 14, 4 and 3
