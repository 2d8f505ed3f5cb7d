"""Solvers through the library's own loop, with a denoiser whose posterior is exactly Bayes' rule on a mixture."""

import math

import pytest
import torch

from scorelm.sampling.denoise import Draw, StepRecord, denoise
from scorelm.sampling.evaluator import Dense, Network
from scorelm.sampling.loop import generate
from scorelm.sampling.solvers import make_solver
from scorelm.sampling.state import Budget, start

from ..conftest import SPECIAL
from .laws import BOS, EOS, F64, SCHEDULE, SOLVERS, TABLE, E, bayes, mixture_denoiser, settings_for_steps
from .published import PUBLISHED, denoised, edm_algorithm_1

DETERMINISTIC = ["euler", "heun", "dpmpp_2m"]


def loop_steps(name, steps, count=30, **options):
    """Records and the state after each of `steps` steps of the uniform path over `count` free positions of one row."""
    network = Network(mixture_denoiser(), SPECIAL)
    settings = settings_for_steps("uniform", name, steps, **options)
    state = start(network.table_VE, [[BOS, *[None] * count, EOS]], [3], SPECIAL, 0, Budget(SCHEDULE, steps))
    way, evaluate = denoise(state, settings, Draw(settings.solver)), Dense(network)
    item = next(way)
    while item is not None:
        if isinstance(item, StepRecord):
            yield item, state
            item = next(way, None)
        else:
            item = way.send(evaluate([item])[0])


def trajectory_levels(steps):
    """Levels after each of `steps` steps of the uniform path: u = (K - k) / K, with 0 at the end."""
    return [0.4 * 20 ** (1 - k / steps) for k in range(1, steps)] + [0.0]


def likeliest(x_NE, sigma):
    return bayes(x_NE, torch.full((len(x_NE),), sigma, dtype=F64)).argmax(-1)


@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@torch.inference_mode()
def test_the_loop_makes_the_published_steps(name, temperature):
    """From the state after the first step, which starts from no evidence, every state is that of the algorithm."""

    def colder(x, t):
        return x + (denoised(x, t) - x) / temperature

    steps, states = 9, []
    for _, state in loop_steps(name, steps, score_temperature=temperature):
        states.append(state.x_BLE[0, 1:-1].double().clone())
    assert len(states) == steps
    levels = trajectory_levels(steps)
    for k in range(1, steps - 1):
        expected = PUBLISHED[name](states[0], levels[: k + 1], colder)
        torch.testing.assert_close(states[k], expected, rtol=0, atol=2e-4)
    chosen = state.ids_BL[0, 1:-1] - 4
    assert torch.equal(chosen, likeliest(states[-2], levels[-2]))
    torch.testing.assert_close(states[-1], TABLE[chosen], rtol=0, atol=1e-5)


@torch.inference_mode()
def test_the_loop_adds_edm_noise():
    """The normal that `sde` adds is the first that the row's generator gives in a step; the rest is Alg. 2."""
    steps = 9
    levels, states, noise = trajectory_levels(steps), [], []
    for _, state in loop_steps("sde:3,1.1,0.5,4", steps):
        twin = torch.Generator()
        twin.set_state(state.rows.generators[0].get_state())
        noise.append(torch.randn(30, E, generator=twin).double())
        states.append(state.x_BLE[0, 1:-1].double().clone())
    assert len(states) == steps
    for k in range(1, steps - 1):
        sigma, target = levels[k - 1], levels[k]
        gamma = 3 / steps if 0.5 <= sigma <= 4 else 0.0
        raised = sigma * (1 + gamma)
        x_hat = states[k - 1] + 1.1 * math.sqrt(raised**2 - sigma**2) * noise[k - 1]
        expected = edm_algorithm_1(x_hat, [raised, target], denoised)
        torch.testing.assert_close(states[k], expected, rtol=0, atol=2e-4)
    assert state.nfe_B.tolist() == [2 * (steps - 1)]


@pytest.mark.parametrize("steps", [2, 7])
@torch.inference_mode()
def test_a_finishing_token_is_limited_at_every_number_of_steps(steps):
    """With `posterior:1` every token that is written is the likeliest at the state that it was written from."""
    for record, state in loop_steps("posterior:1", steps, count=300):
        if record.step == steps - 1:
            before = state.x_BLE[0, 1:-1].double().clone()
    assert torch.equal(state.ids_BL[0, 1:-1] - 4, likeliest(before, trajectory_levels(steps)[-2]))


@pytest.mark.parametrize("name", SOLVERS)
def test_evaluations_are_those_asked_for(loop_of, settings_of, name):
    """Two-stage solvers take one in the first and one in the last step of the uniform path, two in the others."""
    for steps in (1, 2, 3, 8):
        settings = settings_of(path="uniform", solver=name, steps=steps)
        *_, last = generate(loop_of(mixture_denoiser(), SCHEDULE), [[BOS, None, None, EOS]], [0], settings)
        expected = steps - steps % 2 if make_solver(name).evaluations == 2 and steps > 1 else steps
        assert last.nfe_B.tolist() == [expected]
