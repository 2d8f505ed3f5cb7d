"""Settings and small things that every test shares, a browser among them."""

import os
import shutil
import sys

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command does; read once, when torch is imported

import torch
from torch import nn

from scorelm.config.generation import Generation
from scorelm.config.recipe import ModelConfig
from scorelm.noise.schedule import Log, Schedule
from scorelm.objectives import OBJECTIVES
from scorelm.sampling.evaluator import Network
from scorelm.sampling.loop import Loop
from scorelm.sampling.request import Settings
from scorelm.text.tokenizer import Special

torch.set_num_threads(1)
SPECIAL = Special(0, 1, 2, 3)
LINES = [
    "in the beginning god created the heaven and the earth",
    "and the earth was without form and void",
    "and god said let there be light and there was light",
    "he called the light day and the darkness night 12",
] * 5


@pytest.fixture(scope="session")
def special() -> Special:
    """The special ids of every tokenizer here."""
    return SPECIAL


@pytest.fixture(scope="session")
def make_lm():
    """Makes a model of random weights, in which every rounding shows."""
    from scorelm import ScoreLM, Tokenizer

    def make(objective="score", lengths=(*[0] * 5, *[1] * 40), schedule: Schedule | None = None, **config):
        torch.manual_seed(0)
        tokenizer = Tokenizer.train(LINES, 50, byte_fallback=False)
        sizes = {"dim": 32, "layers": 2, "heads": 2, "hidden": 64, "embedding_dim": 16} | config
        lm = ScoreLM(ModelConfig(**sizes), tokenizer, schedule or Log(0.7, 20.0), list(lengths), objective=objective)
        for parameter in lm.denoiser.parameters():
            nn.init.normal_(parameter, std=0.2)
        nn.init.normal_(lm.denoiser.context.weight, std=0.5)
        return lm.eval()

    return make


@pytest.fixture(scope="session")
def settings_of():
    """Settings from the options of a request: ``settings_of(path="uniform", steps=6)``."""

    def settings(options: type[Generation] = Generation, window: int = 0, **values) -> Settings:
        return Settings.of(options.of(**values), window=window)

    return settings


@pytest.fixture(scope="session")
def loop_of():
    """A loop around any denoiser, for tests that stand below `ScoreLM`."""

    def loop(denoiser, schedule: Schedule, objective: str = "score", precision: str = "float32") -> Loop:
        return Loop(Network(denoiser, SPECIAL, precision), schedule, OBJECTIVES[objective].evaluator)

    return loop


@pytest.fixture
def own_modules(tmp_path, monkeypatch) -> None:
    """Where transformers keeps the code of models that it loads: a directory of the test, not the user's cache."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


# --- a browser --------------------------------------------------------------------------------------------------------

CHROMIUM = "/usr/bin/chromium"
QUIETLY = ["disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]
ARGUMENTS = [f"--{name}" for name in ("headless", "no-sandbox", "disable-gpu", *QUIETLY)]


class Browser:
    """Tabs of one browser, and what went wrong in them."""

    def __init__(self, context):
        self.context, self.tab = context, None
        self.asked, self.trouble = set(), []

    def new_tab(self):
        tab = self.context.new_page()
        tab.on("console", lambda message: self.trouble.append(message.text))
        tab.on("pageerror", lambda error: self.trouble.append(str(error)))
        tab.on("request", lambda request: request.url.startswith(tuple(self.asked)) or self.trouble.append(request.url))
        return tab

    def open(self, place, tab=None, *, width=1280, height=720, color_scheme="light", reduced_motion="no-preference"):
        """Show a file, or a page of a server, by default in the tab that showed the one before."""
        if tab is None:
            tab = self.tab = self.tab or self.new_tab()
        tab.set_viewport_size({"width": width, "height": height})
        tab.emulate_media(color_scheme=color_scheme, reduced_motion=reduced_motion)
        address = place if isinstance(place, str) else place.as_uri()
        self.asked.add(address.partition("#")[0])
        tab.goto(address)
        return tab

    def forgive(self, text):
        """What went wrong was meant to, and has this text in it."""
        assert self.trouble and all(text in one for one in self.trouble), self.trouble
        self.trouble.clear()


@pytest.fixture(scope="session")
def chromium():
    if shutil.which(CHROMIUM) is None:
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with api.sync_playwright() as playwright:
        process = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield Browser(process.new_context())
        process.close()


@pytest.fixture
def browser(chromium):
    """One browser for all pages, which fails a test whose page says anything or asks for anything but itself."""
    yield chromium
    trouble, chromium.trouble[:] = list(chromium.trouble), []
    assert trouble == []
