"""A model that is saved, and copies of its directory to damage."""

import shutil
from pathlib import Path

import pytest

from scorelm import ScoreLM, Tokenizer

from .saving import LINES, make


@pytest.fixture(scope="package")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(LINES, 50, byte_fallback=False)


@pytest.fixture(scope="package")
def original(tokenizer: Tokenizer) -> ScoreLM:
    """The model that is saved."""
    return make(tokenizer)


@pytest.fixture(scope="package")
def saved(original: ScoreLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "model"
    original.save_pretrained(path)
    return path


@pytest.fixture
def broken(saved: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))
