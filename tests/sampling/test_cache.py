"""The cache of finished blocks: what it answers is what an evaluation of everything answers, within a window."""

from dataclasses import fields, replace

import pytest
import torch

from scorelm.objectives import OBJECTIVES
from scorelm.sampling.evaluator import Cached, Dense
from scorelm.sampling.loop import Loop, generate
from scorelm.sampling.query import Query

from .steps import BOS, EOS, records


class BesideDense:
    """Answers from a cache, and compares each answer with that of an evaluation of everything."""

    def __init__(self, cached, dense):
        self.cached, self.dense, self.compared = cached, dense, 0

    def __call__(self, queries):
        (answer,), (expected,) = self.cached(queries), self.dense(queries)
        torch.testing.assert_close(answer.logits_NV, expected.logits_NV, rtol=1e-4, atol=1e-4)
        assert torch.equal(answer.open_BL, expected.open_BL)
        self.compared += 1
        return [answer]


CLOSED = [
    [BOS, 7, None, None, 9, None, EOS],
    [BOS, *[None] * 7, 12, EOS],
    [BOS, None, EOS],
    [BOS, 7, 8, *[None] * 9],
    [BOS, None, None, 5, None, 6, None, None, EOS],
]


@pytest.mark.parametrize(
    ("path", "solver"), [("blocks:1", "posterior"), ("blocks:3", "heun"), ("blocks:4", "sde"), ("blocks:4", "dpmpp_2m")]
)
def test_cached_blocks_are_the_uncached(lm, settings_of, path, solver):
    settings, widths, found = settings_of(path=path, solver=solver, steps=12), [], []

    def beside(network, window):
        found.append(BesideDense(*(OBJECTIVES["score"].evaluator(network, w) for w in (window, None))))
        return found[0]

    loop = Loop(lm.loop().network, lm.schedule, beside)
    handle = lm.denoiser.backbone.register_forward_pre_hook(lambda _, args: widths.append(args[1].shape[1]))
    try:
        assert (list(generate(loop, CLOSED, range(5), settings))[-1].sigma_BL == 0).all()
    finally:
        handle.remove()
    assert isinstance(found[0].cached, Cached) and found[0].compared > 8
    cached, dense = widths[0::2], widths[1::2]
    assert max(cached) <= 2 * settings.path.block + 2 < max(dense)  # a finished block, the next one, and the prompt


@pytest.mark.parametrize("tells_next_token", [False, True])
def test_token_by_token_only_what_is_needed_is_computed(make_lm, settings_of, tells_next_token):
    """The token that was written last, and where that does not tell the next one, a position without evidence."""
    lm, widths = make_lm(), []
    lm.denoiser.tells_next_token = tells_next_token
    lm.denoiser.backbone.register_forward_pre_hook(lambda _, args: widths.append(args[1].shape[1]))
    *_, last = generate(lm.loop(), [[BOS, 7, 8, *[None] * 5]], [0], settings_of(path="blocks:1", steps=1))
    new = 1 if tells_next_token else 2
    assert widths == [2 + new, *[new] * (last.step - 1)] and last.step > 2


def test_guidance_on_blocks_reads_everything(lm, settings_of):
    """With another pass there are no keys to keep."""
    for options, kind in (({}, Cached), ({"guidance": 2.0}, Dense), ({"self_guidance": 2.0}, Dense)):
        loop = lm.loop()
        loop.join(CLOSED, range(5), settings_of(path="blocks:2", **options))
        assert [type(evaluator) for evaluator in loop.evaluators.values()] == [kind]


def test_a_window_hides_what_is_further_back(lm):
    """With a window of 6, a block does not depend on a text 6 positions or more before its end; without, it does."""
    tail = [None] * 3
    texts = [[BOS, a, a, a, 9, 10, 11, 12, 13, 14, 15, 16, *tail, EOS] for a in (7, 8)]
    near = [records(lm, [text], window=6, path="blocks:3", steps=12)[0].entropy_BL for text in texts]
    far = [records(lm, [text], path="blocks:3", steps=12)[0].entropy_BL for text in texts]
    assert torch.equal(*near) and not torch.equal(*far) and not torch.equal(near[0], far[0])


def test_a_window_reads_what_a_shorter_text_would_show(lm, settings_of):
    """Behind a cache with a window, the answer is that of an evaluation of everything within the window."""
    template = [BOS, *range(10, 19), None, None, None, EOS]
    (first, *_) = records(lm, [template], window=6, path="blocks:3", steps=1)
    network = lm.loop().network
    loop = Loop(network, lm.schedule, lambda network, window: Dense(network))
    job = loop.join([template], [0], settings_of(path="blocks:3", steps=1))
    reach_BL = job.query.reach_BL & (torch.arange(14) >= 13 - 6)
    (seen,) = Dense(network)([replace(job.query, **hidden(job.query, reach_BL))])
    torch.testing.assert_close(first.entropy_BL[0, 10:13], seen.entropy_N, rtol=1e-4, atol=1e-4)


def hidden(query, reach_BL):
    """The columns of a query within reach only, moved to the front."""
    columns = reach_BL[0].nonzero().squeeze(1)
    return {f.name: getattr(query, f.name)[:, columns] for f in fields(Query) if f.name != "in_blocks"}
