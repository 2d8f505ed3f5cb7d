"""What is proposed for a text and a machine: sizes, dropout and time that suit both, and nothing that was given."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scorelm.cli import main
from scorelm.cli.train import value
from scorelm.config.network import Network
from scorelm.config.recipe import ModelConfig, NoiseConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.config.toml import load_recipe
from scorelm.text.corpus import load_corpus, tokenise
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.text.source import Reading
from scorelm.training.proposal import LADDER, Machine, Text, choose, draw_shares, measure_text, measure_work

LAPTOP = Machine(torch.device("cpu"), torch.bfloat16, 9e11)
OLD = Machine(torch.device("cpu"), torch.float32, 1e11)
CARD = Machine(torch.device("cuda"), torch.bfloat16, 8e14)


def text(tokens: float) -> Text:
    length = max(40.0, tokens / 1e5)
    return Text("book", np.full(int(tokens / length), length), 2048)


def sizes(machine: Machine, tokens: float) -> tuple[int, float | None, float]:
    recipe, _ = choose(Recipe(), (), text(tokens), machine)
    return recipe.model.size.dim, recipe.training.minutes, recipe.training.dropout


def test_more_text_and_a_faster_machine_take_larger_models() -> None:
    for machine in (OLD, LAPTOP, CARD):
        widths = [sizes(machine, tokens)[0] for tokens in (1e4, 3e5, 1e6, 1e7, 1e8, 1e9)]
        assert widths == sorted(widths) and set(widths) <= {dim for dim, _, _ in LADDER}
    assert sizes(OLD, 1e6)[0] <= sizes(LAPTOP, 1e6)[0] <= sizes(CARD, 1e6)[0] == 384
    assert sizes(OLD, 1e4)[0] == sizes(CARD, 1e4)[0] == 128
    for machine in (OLD, LAPTOP, CARD):
        assert all(1 <= (sizes(machine, tokens)[1] or 0) <= machine.minutes for tokens in (1e4, 1e6, 1e9))


def test_a_gpu_takes_larger_batches_only_where_that_leaves_enough_steps() -> None:
    """A step of a small batch takes as long as its launches, which is what the speed says then."""

    def positions(machine: Machine, tokens: float) -> int:
        recipe, _ = choose(Recipe(), (), text(tokens), machine)
        return recipe.training.rows * recipe.data.max_length

    assert [positions(CARD, tokens) for tokens in (1e5, 1e6, 1e8)] == [16_384, 16_384, 65_536]
    assert positions(LAPTOP, 1e5) == positions(LAPTOP, 1e8) == 4096
    for accumulation in (1, 16):  # each of whose batches has launches of its own
        said = Recipe(training=TrainingConfig(accumulation=accumulation))
        assert " 327,700 tokens/s" in choose(said, (), text(1e6), CARD).lines[2]


def test_dropout_and_whole_documents_follow_how_often_the_text_is_read() -> None:
    often, lines = choose(Recipe(), (), text(1e6), CARD)
    assert "50% of the examples are learned as a whole, and of the others up to 40% is hidden;" in lines[-1]
    assert often.training.dropout == 0.2 and often.noise.block_sizes == (1, 2, 4, 8, 0, 0, 0, 0)
    assert often.noise.hidden == 0.4
    once, lines = choose(Recipe(training=TrainingConfig(minutes=1)), ("minutes",), text(1e8), LAPTOP)
    assert once.training.dropout == 0 and once.training.patience is None
    assert once.noise == NoiseConfig() and "hidden" not in lines[-1]
    assert re.search(r"read \d% through", lines[-1]) and "no sense" in lines[-1]
    few, _ = choose(Recipe(training=TrainingConfig(steps=2000)), ("steps",), text(1e6), LAPTOP)
    assert few.training.dropout == 0.1 and few.training.minutes is None and few.training.steps == 2000


def test_readings_are_counted_in_the_time_and_rows_that_are_proposed() -> None:
    tiny, lines = choose(Recipe(), (), text(2000), LAPTOP)
    assert tiny.training.minutes == 1 and int(re.search(r"about (\d+) times", lines[-1])[1]) > 100
    given = Recipe(training=TrainingConfig(steps=60, rows=8))
    few, lines = choose(given, ("steps", "rows"), text(20_000), LAPTOP)
    assert few.training.dropout == 0 and "read about 1.5 times" in lines[-1]  # 60 x 8 x 64 of 20,000


@pytest.mark.parametrize("compiler", [None, "/usr/bin/gcc"])
def test_a_run_is_compiled_on_a_gpu_that_can_be_compiled_for(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None
) -> None:
    """And is long enough; networks that others have trained have not been compiled yet."""
    monkeypatch.setattr("shutil.which", lambda name: compiler)

    def compiles(machine: Machine, minutes: float, **training: Any) -> bool:
        said = Recipe(training=TrainingConfig(minutes=minutes, **training))
        return choose(said, ("minutes",), text(1e8), machine).recipe.training.compile

    assert compiles(CARD, 5) is bool(compiler)
    assert not compiles(CARD, 4.9) and not compiles(LAPTOP, 60) and not compiles(CARD, 60, init_from=Path("bert"))
    assert compiles(LAPTOP, 5, compile=True)


def test_muon_is_proposed_but_not_for_what_others_have_trained() -> None:
    """Networks that others have trained, and adapters, have been tried with AdamW only."""
    network = Network(family="bert", kv_heads=1, norm_eps=1e-6, positions=512)
    started = Recipe(model=ModelConfig(dim=64, layers=2, network=network))
    lora = Recipe(training=TrainingConfig(lora=4, init_from=Path("mine")))
    found = [choose(said, ("dim",), text(1e6), OLD).recipe.training for said in (Recipe(), started, lora)]
    assert [training.optimizer for training in found] == ["muon", "adamw", "adamw"]


def test_flags_are_read_however_they_are_written() -> None:
    for words in (["--max-length", "9"], ["--max_length", "9"], ["--max-length=9"], ["--max_length=9"]):
        assert value(words, "--max-length") == "9"
    assert value(["--data", "a_b=c.txt"], "--data") == "a_b=c.txt"


@pytest.mark.parametrize(
    ("given", "room", "value"),
    [
        ("dim", "model", 96), ("layers", "model", 3), ("max_length", "data", 48), ("vocab_size", "data", 700),
        ("rows", "training", 5), ("optimizer", "training", "adamw"), ("dropout", "training", 0.33),
        ("patience", "training", 2), ("minutes", "training", 7.5), ("block_sizes", "noise", (3,)),
        ("hidden", "noise", 0.1), ("compile", "training", False),
    ],
)  # fmt: skip
def test_what_was_given_stays(given: str, room: str, value: Any) -> None:
    said = Recipe()
    said = said.model_copy(update={room: getattr(said, room).model_copy(update={given: value})})
    recipe, _ = choose(said, (given,), text(1e6), CARD)
    assert getattr(getattr(recipe, room), given) == value
    assert Recipe.model_validate(recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("objective", "copies", "passes", "fewest", "most"),
    [("score", 2, 3.5, 0.9, 1.5), ("masked", 1, 3, 0.4, 1), ("autoregressive", 1, 3, 0.4, 1)],
)
def test_the_work_of_a_token_is_that_of_a_hand_count(
    objective: str, copies: int, passes: float, fewest: float, most: float
) -> None:
    """2 FLOPs for each weight of the trunk and each copy, attention, and the vocabulary where it is used.

    Two copies have more than one answer a token: of whole documents twice, and of the tokens after clean blocks.
    """
    model, vocabulary, length = ModelConfig(dim=128, layers=2, embedding_dim=32), 1000, 64
    weights = 2 * (4 * 128 * 128 + 3 * 128 * model.size.hidden)
    pairs = 4 * 128 * 2 * length
    recipe = Recipe(training=TrainingConfig(objective=objective))
    work, found = measure_work(model, recipe, vocabulary, length, draw_shares(recipe, length))
    assert found == weights
    trunk = 2 * copies * weights + copies * pairs
    assert work > passes * (trunk + 2 * vocabulary * 128 * fewest)
    assert work < passes * (trunk + 2 * vocabulary * most * (128 + 0.6 * (32 + 128)))


def test_tokens_are_counted_as_training_will_find_them() -> None:
    config = DataConfig()
    corpus = load_corpus("kjv", Reading.of(config), holdout=config.holdout)
    found = measure_text(corpus, config, fixed=False)
    assert found.vocab_size == 2048
    tokenizer = SentencePieceTokenizer.train(list(corpus.train["text"][::4]), 2048)
    exact = tokenise(corpus, tokenizer, max_length=64)
    counts = np.array([len(ids) for ids in exact.train["ids"]])
    assert found.tokens == pytest.approx(counts.sum(), rel=0.03)
    assert np.quantile(found.lengths, 0.995) == pytest.approx(np.quantile(counts, 0.995), rel=0.1)


def test_one_long_line_of_other_words_does_not_change_what_the_others_are_taken_for(tmp_path: Path) -> None:
    """Its characters for each token are not theirs."""
    lines = [f"{n} is the number of line {n * n}" for n in range(200)]
    (tmp_path / "odd.txt").write_text("\n".join([*lines, "word " * 9000]))
    tokenizer = SentencePieceTokenizer.train([*lines, "word"], 300)
    tokenizer.save(tmp_path / "tokenizer.model")
    config = DataConfig(source=str(tmp_path / "odd.txt"), holdout=0, tokenizer=tmp_path / "tokenizer.model")
    found = measure_text(load_corpus(config.source, Reading.of(config), holdout=0), config, fixed=True)
    assert list(found.lengths[:200]) == [len(tokenizer.encode(line)) + 2 for line in lines]


def test_a_text_that_is_one_example_is_said_to_be_one() -> None:
    assert "in one example to learn from" in choose(Recipe(), (), Text("a", np.full(1, 900), 512), OLD).lines[0]


def test_a_run_takes_what_is_proposed_and_what_was_given(
    tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    words = ["--steps", "2", "--model.dim", "32", "--dropout=0.25", "--samples", "0", "--device", "cpu"]
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--data", str(text), "--out", str(out), *words])
    recipe, said = load_recipe(str(out / "recipe.toml")), capfd.readouterr().err
    assert (recipe.training.steps, recipe.training.minutes, recipe.training.dropout) == (2, None, 0.25)
    assert recipe.model.size.dim == 32 and recipe.training.rows == 64 and recipe.data.max_length == 64
    assert "lines: about" in said and "so dropout is 0.25" in said
    with pytest.raises(SystemExit, match="0"):
        main(["info", str(text), "--device", "cpu"])
    shown = capfd.readouterr().out
    assert "model: 4 layers of width 128" in shown and f"scorelm train --data {text}" in shown


def test_a_text_that_is_not_there_or_too_small_is_refused_before_anything_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for name, says in (("none.txt", "none.txt"), ("empty.txt", "no text")):
        with pytest.raises(SystemExit, match="2"):
            main(["train", "--data", str(tmp_path / name), "--out", str(tmp_path / "run")])
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert says in error and error.startswith("scorelm: ")
    assert not (tmp_path / "run").exists()
