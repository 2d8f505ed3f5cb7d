"""The recipes of published sizes: they load, have the size that they say, and take a real step on local text."""

import json
import lzma
import re
from itertools import islice
from pathlib import Path

import pytest
import torch

from scorelm.cli import main
from scorelm.config.recipe import Recipe
from scorelm.config.toml import load_recipe
from scorelm.model.denoiser import Denoiser
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.training.data import prepare
from scorelm.training.trainer import Trainer

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))
PUBLISHED = {  # length, tokens of a step, parameters
    "text8": (256, 512 * 256, 85_023_561),
    "lm1b": (128, 512 * 128, 132_848_250),
    "owt-small": (1024, 512 * 1024, 163_812_465),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verses in the alphabet of text8: lower-case letters and single spaces."""
    path = tmp_path_factory.mktemp("text") / "verses.txt"
    with lzma.open(ROOT / "src" / "scorelm" / "assets" / "kjv.txt.xz", "rt", encoding="utf-8") as file:
        verses = [re.sub("[^a-z]+", " ", line.lower()).strip() for line in islice(file, 300)]
    path.write_text("\n".join([*verses, "a quick brown fox jumps over the lazy dog", "a zebra"]), encoding="utf-8")
    return path


def meta(name: str) -> tuple[Denoiser, int]:
    """The model of a recipe, and its vocabulary: Shakespeare's has 65 characters, and there are 4 special tokens."""
    recipe = load_recipe(name)
    vocab = 69 if recipe.data.vocab_size == "characters" else recipe.data.vocab_size
    with torch.device("meta"):
        return Denoiser(recipe.model, vocab), vocab


def test_the_published_recipes_are_there() -> None:
    assert set(NAMES) >= {"demo", "shakespeare-char", *PUBLISHED}


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_has_the_size_that_it_says(name: str) -> None:
    recipe, (denoiser, vocab) = load_recipe(name), meta(name)
    size, width = recipe.model.size, recipe.model.embedding_dim
    block = 4 * size.dim**2 + 3 * size.dim * size.hidden
    count = sum(p.numel() for p in denoiser.parameters())
    assert count == size.layers * block + 2 * vocab * size.dim + (vocab + size.dim) * width + vocab
    if name in PUBLISHED:
        length, tokens, parameters = PUBLISHED[name]
        training = recipe.training
        assert (size.dim, size.layers, recipe.data.max_length, count) == (768, 12, length, parameters)
        assert training.rows * training.accumulation * length == tokens
        assert training.steps == 1_000_000


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["text8", *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED if name != "text8")]
)
def test_a_published_recipe_takes_a_step_at_its_full_width(name: str, text: Path, tmp_path: Path) -> None:
    tree = load_recipe(name).model_dump()
    tree["data"] |= {"source": str(text), "max_length": 48, "vocab_size": 41 if name == "text8" else 400}
    tree["training"] |= {"rows": 4, "accumulation": 1, "device": "cpu"}  # of one row every level may be 0 or inf
    recipe = Recipe.model_validate(tree)
    trainer = Trainer(recipe, prepare(recipe.data, tmp_path, False, lambda _: None))
    denoiser = trainer.learner.denoiser
    before = {key: value.clone() for key, value in denoiser.state_dict().items()}
    trainer.step()
    assert recipe.model.size.dim == 768
    assert trainer.progress.step == 1 and 0 < float(trainer.window.read().loss) < 20
    moved = [key for key, value in denoiser.state_dict().items() if not torch.equal(value, before[key])]
    assert {"context.weight", "embedding.weight"} <= set(moved)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_recipe_trains_on_a_file_by_command(name: str, text: Path, tmp_path: Path) -> None:
    vocab = [] if name == "text8" else ["--vocab-size", "400"]
    small = ["--model.dim", "32", "--model.layers", "1", "--model.heads", "1", "--max-length", "64", "--rows", "2"]
    command = ["train", "--recipe", name, "--data", str(text), "--out", str(tmp_path / "run"), *vocab, *small]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--accumulation", "2", "--steps", "2", "--device", "cpu"])
    assert stop.value.code == 0
    kept = load_recipe(str(tmp_path / "run" / "recipe.toml"))
    assert kept.data.source == str(text) and kept.training.ema == (0.9999,)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2


def test_the_recipe_of_text8_learns_characters(text: Path, tmp_path: Path) -> None:
    config = load_recipe("text8").data.model_copy(update={"source": str(text)})
    tokenizer = prepare(config, tmp_path, False, lambda _: None).tokenizer
    words = "in the beginning"
    assert len(tokenizer.encode_document(words)) == len(words) + 3  # <s>, a space before the first word, </s>
    assert tokenizer.decode(tokenizer.encode_document(words)).strip() == words


def test_the_recipe_of_shakespeare_is_as_large_as_nanogpt_and_learns_the_characters_of_a_text(tmp_path: Path) -> None:
    assert sum(p.numel() for p in meta("shakespeare-char")[0].parameters()) == 10_684_389
    text = tmp_path / "speeches.txt"
    text.write_text("".join(f"ROMEO:\nO, she doth teach {'the ' * k}torches!\n\n" for k in range(40)))
    small = ["--model.dim", "32", "--model.layers", "1", "--max-length", "64", "--rows", "2", "--steps", "2"]
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", "shakespeare-char", "--data", str(text), "--out", str(tmp_path / "run"), *small])
    assert stop.value.code == 0
    tokenizer = SentencePieceTokenizer.load(tmp_path / "run" / "model" / "tokenizer.model")
    assert tokenizer.vocab_size == 4 + len(set(text.read_text()))
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).data.vocab_size == "characters"
