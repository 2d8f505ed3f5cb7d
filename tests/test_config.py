"""Recipes: TOML in and out, derived sizes, and errors that name the option."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scorelm.config import DataConfig, Mixture, ModelConfig, NoiseConfig, Recipe, TrainingConfig, load_recipe, to_toml


@given(source=st.text(min_size=1), steps=st.none() | st.integers(1, 10**9), lr=st.floats(1e-9, 10))
def test_a_recipe_survives_toml(
    tmp_path_factory: pytest.TempPathFactory, source: str, steps: int | None, lr: float
) -> None:
    recipe = Recipe(
        data=DataConfig(source=source, tokenizer=Path("a b.model")),
        model=ModelConfig(dim=64, noise_conditioning="film"),
        noise=NoiseConfig(block_sizes=(0, 3), sigma_min=0.1, mixture=Mixture(independent=0.5)),
        training=TrainingConfig(steps=steps, lr=lr, ema=()),
    )
    path = tmp_path_factory.mktemp("recipe") / "r.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def test_every_recipe_in_the_repository_loads() -> None:
    names = [p.stem for p in (Path(__file__).parents[1] / "recipes").glob("*.toml")]
    assert "demo" in names
    for name in names:
        assert isinstance(load_recipe(name), Recipe)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (ModelConfig(), (256, 4, 4, 704)),
        (ModelConfig(dim=768), (768, 12, 12, 2048)),
        (ModelConfig(dim=32), (32, 4, 1, 128)),
        (ModelConfig(dim=128, layers=7, heads=4, hidden=10), (128, 7, 4, 10)),
    ],
)
def test_sizes_follow_one_dial_unless_given(config: ModelConfig, size: tuple[int, ...]) -> None:
    assert tuple(config.size) == size


@pytest.mark.parametrize(
    ("toml", "says"),
    [
        ("[model]\ndimm = 3", "model.dimm"),
        ("[model]\ndim = 'wide'", "model.dim"),
        ("[model]\ndim = 100\nheads = 8", "even multiple"),
        ("[training]\nsteps = 3\nminutes = 1.0", "either steps or minutes"),
        ("[noise.mixture]\nshared=0\nspread=0\nramp=0\nprefix=0\nabsorbing=0\nordered=0", "above 0"),
        ("[noise]\nblock_sizes = []", "noise.block_sizes"),
        ("[data", "is not TOML"),
    ],
)
def test_a_bad_recipe_is_explained_in_one_line(tmp_path: Path, toml: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(ValueError, match=says) as caught:
        load_recipe(str(path))
    assert "bad.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="demo"):
        load_recipe("nonesuch")
