"""The loop: requests of every kind join and leave it, share evaluations, and each gets what it gets alone."""

import pytest
import torch

from scorelm.config.generation import Generation
from scorelm.sampling.loop import generate
from scorelm.sampling.query import joined
from scorelm.sampling.request import Settings
from scorelm.text.tokenizer import Special

PATHS = (
    "uniform", "bounded", "ramp:0.5", "blocks:3", "shuffled", "surest", "confidence", "blocks:1", "remask:0.2",
    "entropy",
)  # fmt: skip
SOLVERS = ("posterior", "euler", "heun", "ancestral", "sde", "dpmpp_2m", "renoise")


def requests(special: Special) -> list[tuple[list[list[int | None]], list[int], Settings, int]]:
    """Twenty requests: templates, seeds, settings, and the step of the loop at which each arrives."""
    found = []
    for k in range(20):
        path = PATHS[k % len(PATHS)]
        guided = {"guidance": 1.5} if k in (3, 10) else {}
        options = Generation(
            path=path, solver=SOLVERS[k % len(SOLVERS)], steps=2 + k % 7, temperature=0.6 + k / 20, **guided
        )
        free: list[int | None] = [None] * (3 + k % 9)
        templates = [[special.bos, 5, *free, 9, None, special.eos], [special.bos, *free, special.eos]][: 1 + k % 2]
        found.append((templates, [100 + k, 200 + k][: len(templates)], Settings.of(options), (7 * k) % 12))
    return found


class Watched:
    """An evaluator that keeps what it answered, by the layout tensor that tells requests apart."""

    def __init__(self, evaluator) -> None:
        self.evaluator, self.seen, self.sizes = evaluator, {}, []

    def __call__(self, queries):
        found = self.evaluator(queries)
        self.sizes.append(len(queries))
        for query, prediction in zip(queries, found, strict=True):
            kept = (query.sigma_BL.clone(), query.x_BLE.clone(), prediction.logits_NV.clone())
            self.seen.setdefault(id(query.position_BL), []).append(kept)
        return found


def watched_loop(lm):
    """A loop whose evaluators are watched."""
    loop = lm.loop()
    loop.evaluator_for = lambda network, window: Watched(lm.objective.evaluator(network, window))
    return loop


def test_twenty_requests_that_come_and_go_each_get_what_they_get_alone(make_lm, special) -> None:
    """Logits to rounding: all of them up to the first place where a rounding has moved a draw, and that is rare."""
    lm = make_lm()
    lm.denoiser.tells_next_token = True
    loop = watched_loop(lm)
    waiting, jobs, steps = dict(enumerate(requests(special))), {}, 0
    finished: list[int] = []
    while waiting or loop.jobs:
        for k in [k for k, request in waiting.items() if request[3] <= steps]:
            jobs[k] = loop.join(*waiting.pop(k)[:3])
        before = {id(job.query): job.query for job in loop.jobs}
        for job in loop.step():
            finished.append(next(k for k, one in jobs.items() if one is job))
        assert all(id(job.query) not in before for job in loop.jobs)  # every request is one evaluation further
        steps += 1
    assert sorted(finished) == list(range(20)) and finished != sorted(finished)
    assert max(loop.evaluators[None].sizes) > 5 and max(loop.evaluators[0].sizes) > 2  # evaluations were shared
    compared = evaluations = moved = different = 0
    for k, (templates, seeds, settings, _) in enumerate(requests(special)):
        alone = watched_loop(lm)
        job = alone.join(templates, seeds, settings)
        while not job.finished:
            alone.step()
        ((window, evaluator),) = alone.evaluators.items()
        ((own),) = evaluator.seen.values()
        together = loop.evaluators[window].seen[id(jobs[k].state.rows.layout.position_BL)]
        evaluations += len(own)
        for (sigma, x, logits), (other_sigma, other_x, other) in zip(own, together, strict=False):
            if not (torch.equal(sigma, other_sigma) and torch.allclose(x, other_x, atol=1e-3)):
                moved += 1
                break
            torch.testing.assert_close(logits, other, rtol=1e-4, atol=1e-3)
            compared += 1
        for row, other_row in zip(job.rows(), jobs[k].rows(), strict=True):
            different += row != other_row
    assert evaluations > 100 and compared > 0.8 * evaluations and moved <= 2
    assert different <= 1, f"{different} of 30 rows differ"


def test_a_request_with_nothing_to_write_is_finished_when_it_joins(make_lm, settings_of, special) -> None:
    loop = make_lm().loop()
    job = loop.join([[special.bos, 7, special.eos]], [0], settings_of())
    assert job.finished and not loop.jobs and job.rows() == [([special.bos, 7, special.eos], 0)]
    assert loop.step() == []


def test_a_finished_request_frees_its_place(make_lm, settings_of, special) -> None:
    """The rows of the network are as many and as long as those that are still under way need."""
    lm = make_lm()
    loop, sizes, records = lm.loop(), [], ([], [])
    handle = lm.denoiser.backbone.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[1].shape)))
    short = [special.bos, None, None, special.eos]
    long = [special.bos, *[None] * 12, special.eos]
    try:
        loop.join([short] * 3, [1, 2, 3], settings_of(path="uniform", steps=2), watch=records[0].append)
        loop.join([long], [4], settings_of(path="uniform", steps=4), watch=records[1].append)
        while loop.jobs:
            loop.step()
    finally:
        handle.remove()
    assert sizes == [(2, 14)] * 2 + [(1, 14)] * 2
    assert [[record.step for record in own] for own in records] == [[1, 2], [1, 2, 3, 4]]


def test_queries_are_joined_as_long_as_the_longest(make_lm, settings_of, special) -> None:
    loop = make_lm().loop()
    jobs = [loop.join([[special.bos, *[None] * n, special.eos]], [n], settings_of(path="uniform")) for n in (2, 6)]
    query = joined([job.query for job in jobs])
    assert query.sigma_BL.shape == (2, 8) and query.x_BLE.shape == (2, 8, 16)
    assert query.reach_BL.tolist() == [[True] * 4 + [False] * 4, [True] * 8]
    assert joined([jobs[0].query]) is jobs[0].query


def test_generate_yields_a_record_after_every_step_and_is_lazy(make_lm, settings_of, special) -> None:
    lm = make_lm()
    stream = generate(lm.loop(), [[special.bos, *[None] * 4, special.eos]], [0], settings_of(path="uniform", steps=5))
    first = next(stream)
    assert first.step == 1 and first.nfe_B.tolist() in ([1], [2])  # at most one evaluation ahead
    assert [record.step for record in stream] == [2, 3, 4, 5]


@pytest.mark.parametrize("path", ["blocks:1", "blocks:4"])
def test_requests_with_a_cache_go_on_beside_others(make_lm, settings_of, special, path) -> None:
    lm = make_lm()
    template = [special.bos, 8, *[None] * 7, special.eos]
    loop = lm.loop()
    cached = loop.join([template], [5], settings_of(path=path, steps=6))
    dense = loop.join([template], [6], settings_of(path="uniform", steps=6))
    while loop.jobs:
        loop.step()
    for job, seed, name in ((cached, 5, path), (dense, 6, "uniform")):
        alone = lm.loop()
        own = alone.join([template], [seed], settings_of(path=name, steps=6))
        while alone.jobs:
            alone.step()
        assert own.rows() == job.rows()
