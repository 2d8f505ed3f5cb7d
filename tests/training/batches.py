"""Packed batches of random documents, small denoisers for them, and their draws and losses by every objective."""

import torch
from torch import nn

from scorelm.config.recipe import Mixture, ModelConfig, NoiseConfig, TrainingConfig
from scorelm.model.denoiser import Denoiser
from scorelm.noise.forward import add_noise
from scorelm.noise.schedule import make_schedule
from scorelm.objectives import OBJECTIVES
from scorelm.objectives.objective import Batch

from ..conftest import SPECIAL

V, E = 50, 16
BOS, EOS, PAD, _ = SPECIAL
SCHEDULE = make_schedule("adaptive", E, V)
PLAIN = TrainingConfig()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def only(*kinds):
    """A mixture of these kinds of levels, equally often."""
    return Mixture(**{name: float(name in kinds) for name in Mixture.model_fields})


def trained_like(seed=0, dim=32, **config):
    """A denoiser whose every weight is random."""
    sizes = {"dim": dim, "layers": 2, "heads": 2, "hidden": 2 * dim, "embedding_dim": E} | config
    torch.manual_seed(seed)
    denoiser = Denoiser(ModelConfig(**sizes), V)
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter, std=0.2)
    return denoiser


def pack(rows, seed=0, width=24):
    """Random documents <s> ... </s>, packed; every fifth is a window without its <s>, every seventh without </s>."""
    gen = rng(seed)
    ids, segment, position = (torch.full((rows, width), fill) for fill in (PAD, 0, 0))
    count = 0
    for row in range(rows):
        at, number = 0, 1
        while True:
            length = int(torch.randint(3, 11, (), generator=gen))
            if at + length > width:
                break
            tokens = torch.randint(4, V, (length,), generator=gen)
            tokens[0], tokens[-1] = BOS, EOS
            if count % 5 == 4:
                tokens[0] = 7
            if count % 7 == 6:
                tokens[-1] = 8
            ids[row, at : at + length], segment[row, at : at + length] = tokens, number
            position[row, at : at + length] = torch.arange(length)
            at, number, count = at + length, number + 1, count + 1
    return Batch(ids, segment, position)


def draw_noise(batch, seed=0, objective="score", schedule=SCHEDULE, **values):
    """A draw by an objective, with these options of noise."""
    learned, config = OBJECTIVES[objective], NoiseConfig(**values)
    return learned.draw(batch, config, schedule, SPECIAL, learned.random(batch, config, rng(seed)))


def noisy_draw(batch, seed=1, **how):
    """`draw_noise` with the noise for embeddings of size E."""
    return draw_noise(batch, seed, **how).with_noise(E, rng(seed + 1))


def loss_of(denoiser, draw, config=PLAIN, *, objective="score", schedule=SCHEDULE, live=None, self_conditioned=False):
    """The outcome of a draw, divided by its own open positions unless told otherwise."""
    live = torch.as_tensor(draw.live if live is None else live)
    return OBJECTIVES[objective].loss(
        denoiser, draw, schedule, config, live=live, special=SPECIAL, self_conditioned=self_conditioned
    )


def gradients(denoiser, draw, *args, **how):
    """The outcome of a draw, and the gradient of every parameter that has one."""
    denoiser.zero_grad()
    outcome = loss_of(denoiser, draw, *args, **how)
    outcome.loss.backward()
    return outcome, [p.grad.clone() for p in denoiser.parameters() if p.grad is not None]


def predicted(denoiser, draw, self_cond=None):
    """What the denoiser says of a draw, and its targets: the forward process without the loss."""
    x = add_noise(denoiser.embedding(draw.ids_BS), draw.sigma_BS, draw.eps_BSE)
    seen = denoiser.predict(x, draw.sigma_BS, draw.layout, self_cond, asks_next_BL=draw.asks_next_BS)
    assert torch.equal(seen.open_BL, draw.open_BS)
    return seen, draw.target_BS[draw.open_BS]
