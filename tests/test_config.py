"""Options: recipes as TOML, derived sizes, requests, and errors that name the option."""

import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from scorelm.config.generation import Continuation, Infilling, Pricing, takes
from scorelm.config.recipe import Mixture, ModelConfig, NoiseConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.config.toml import load_recipe, to_toml
from scorelm.errors import InputError


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
    path = tmp_path_factory.getbasetemp() / "recipe.toml"
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
        ("[data]\nvocab_size = 'letters'", "vocab_size: give a number above 0, or characters .got letters"),
        ("[data]\nvocab_size = 1.5", "vocab_size: give a number above 0, or characters .got 1.5"),
        ("[noise.mixture]\nshared=0\nspread=0\nramp=0\nprefix=0\nabsorbing=0\nordered=0", "above 0"),
        ("[noise]\nblock_sizes = []", "noise.block_sizes"),
        ("[data", "is not TOML"),
    ],
)
def test_a_bad_recipe_is_explained_in_one_line(tmp_path: Path, toml: str, says: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(InputError, match=says) as caught:
        load_recipe(str(path))
    assert "bad.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="demo"):
        load_recipe("nonesuch")


def test_the_options_of_a_request_are_immutable_and_checked() -> None:
    request = Continuation.of(path="uniform", top_p=0.5, length=9)
    assert (request.path, request.top_p, request.length, request.steps) == ("uniform", 0.5, 9, None)
    with pytest.raises(ValidationError):
        request.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"temprature": 1.0}, "no option 'temprature': did you mean temperature?"),
        ({"zzz": 1}, "no option 'zzz': choose steps, path"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"choose": "best"}, "choose"),
        ({"precision": "float16"}, "precision"),
        ({"best_of": 0}, "best_of"),
        ({"nats_per_step": 0}, "nats_per_step"),
        ({"nats_per_step": float("inf")}, "nats_per_step"),
        ({"max_length": 0}, "max_length"),
        ({"repair": 0.5}, "repair"),
    ],
)
def test_a_bad_option_of_a_request_is_explained_in_one_line(values: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Continuation.of(**values)
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("repair", [0, 1, -0.5, float("nan")])
def test_a_repair_is_between_nothing_and_everything(repair: float) -> None:
    with pytest.raises(InputError, match="repair"):
        Infilling.of(repair=repair)


def test_every_option_has_a_meaning() -> None:
    for options in (Continuation, Infilling, Pricing, DataConfig, ModelConfig, NoiseConfig, Mixture, TrainingConfig):
        for name, field in options.model_fields.items():
            assert name == "mixture" or (field.description or "").endswith("."), (options, name)


def test_a_function_shows_the_options_that_it_takes() -> None:
    @takes(Infilling)
    def write(text: str, steps: int = 8, **options: object) -> None:
        """Write.

        Raises:
            InputError: it cannot.
        """

    shown = inspect.signature(write)
    assert list(shown.parameters)[:2] == ["text", "steps"] and shown.parameters["steps"].default == 8
    assert {"repair", "temperature", "seed"} <= set(shown.parameters) and "options" not in shown.parameters
    assert shown.parameters["temperature"].default == 0.75
    assert "InputError: it cannot." in write.__doc__ and "\n    repair: Doubt " in write.__doc__
