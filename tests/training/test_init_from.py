"""Runs that start from a model: its weights, tokenizer, sizes and schedule, and nothing that contradicts it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scorelm import ScoreLM, price, train
from scorelm.cli import main
from scorelm.config.recipe import ModelConfig, Recipe, TrainingConfig
from scorelm.config.text import DataConfig
from scorelm.config.toml import load_recipe
from scorelm.errors import InputError
from scorelm.model.directory import Provenance
from scorelm.model.layout import Layout
from scorelm.text.corpus import load_corpus
from scorelm.training.data import prepare
from scorelm.training.initial import NETWORK_LR, Initial, check_held_out, read_initial
from scorelm.training.proposal import propose
from scorelm.training.step import draw_first_pass, draw_step
from scorelm.training.trainer import Trainer

SIZES = {"model": {"dim": 24, "layers": 1, "heads": 2, "embedding_dim": 6, "noise_conditioning": "film"}}


@pytest.fixture(scope="module")
def old(tools: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model others start from; its text is about who does what."""
    out = tmp_path_factory.mktemp("old") / "run"
    tools.train(tools.recipe(text, SIZES, steps=40, lr=0.01), out)
    return out


def start(source: Path, model: Path, embedding_dim: int | None = None, **training: Any) -> Recipe:
    options = {"rows": 4, "log_every": 1, "warmup": 3, "samples": 0, "ema": (0.5,), "device": "cpu"} | training
    data = DataConfig(source=str(source), max_length=32, holdout=0.2)
    model_config = ModelConfig() if embedding_dim is None else ModelConfig(embedding_dim=embedding_dim)
    return Recipe(data=data, model=model_config, training=TrainingConfig(init_from=model, **options))


def test_the_first_loss_is_that_of_the_model(old: Path, other: Path, tmp_path: Path) -> None:
    """On the same batch: the weights, of which all averages are copies, and the schedule are the model's."""
    recipe, initial = read_initial(start(other, old, steps=5, log_every=9, precision="float32"), old)
    data = prepare(recipe.data, tmp_path, False, print)
    trainer, own = (Trainer(recipe, data, initial=initial) for _ in range(2))
    lm, learner = ScoreLM.from_pretrained(old), trainer.learner
    assert trainer.schedule == lm.schedule and trainer.data.tokenizer.to_bytes() == lm.tokenizer.to_bytes()
    for one in (learner.denoiser, *learner.averages.values()):
        for name, weight in lm.denoiser.state_dict().items():
            assert torch.equal(one.state_dict()[name], weight), name
    ((_, draw),) = draw_step(own.learner, own.shards, lm.schedule, 0)
    live, first_pass = torch.as_tensor(draw.live), draw_first_pass(recipe, 0)
    of_the_model = lm.objective.loss(
        lm.denoiser, draw, lm.schedule, recipe.training, live=live, special=lm.tokenizer.special,
        self_conditioned=first_pass,
    )  # fmt: skip
    trainer.step()
    assert float(trainer.unread.loss) == pytest.approx(of_the_model.loss.item(), rel=1e-6)


def test_a_model_learns_another_text_and_says_where_it_comes_from(
    tools: Any, old: Path, other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    recipe = start(other, old, steps=25, lr=0.01)
    tools.train(recipe, out)
    before, after = ScoreLM.from_pretrained(old), ScoreLM.from_pretrained(out)
    held_out = load_corpus(str(other), holdout=0.2).heldout["text"]
    costs = [price(lm, held_out, "ordered", lossy=True).nats_per_token for lm in (before, after)]
    assert costs[1] < 0.7 * costs[0]
    assert after.config == before.config and after.tokenizer.to_bytes() == before.tokenizer.to_bytes()
    made = after.provenance
    assert made.init_from == str(old) and made.before == before.provenance and made.data == str(other)
    assert load_recipe(str(out / "recipe.toml")).training.init_from == old
    assert f"It started from `{old}`, trained on `{before.provenance.data}`." in after.card()


@pytest.mark.parametrize(
    ("noise", "before", "expected"),
    [({}, None, True), ({"streams": 1}, None, False), ({"block_sizes": (0,)}, None, False),
     ({}, True, True), ({}, False, False)],
)  # fmt: skip
def test_given_tokens_tell_the_next_one_if_they_have_been_asked_all_along(
    tools: Any, text: Path, tmp_path: Path, noise: dict[str, Any], before: bool | None, expected: bool
) -> None:
    recipe = tools.recipe(text, SIZES | {"noise": noise}, steps=1)
    data = prepare(recipe.data, tmp_path, False, print)
    weights = Trainer(recipe, data).learner.weights("weights")
    initial = None if before is None else Initial(weights, tells_next_token=before)
    lm = Trainer(recipe, data, initial=initial).model()
    assert lm.provenance.tells_next_token == lm.denoiser.tells_next_token == expected
    lm.save_pretrained(tmp_path / "model")
    assert ScoreLM.from_pretrained(tmp_path / "model").denoiser.tells_next_token == expected


@pytest.mark.thorough
def test_such_a_run_goes_on_bit_for_bit_without_the_model(
    tools: Any, old: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    first = start(other, old, steps=4, decay=0.0)
    tools.train(tools.with_steps(first, 8), whole)
    tools.train(first, halves)
    monkeypatch.setattr("scorelm.training.run.read_initial", None)
    monkeypatch.setattr("scorelm.training.initial.describe_model", None)
    tools.train(tools.with_steps(first, 8), halves, resume=True)
    tools.assert_same(whole, halves)
    with pytest.raises(InputError, match="--init-from can't change"):
        train(start(other, whole, steps=9, decay=0.0), halves, resume=True)


@pytest.mark.parametrize(
    ("family", "kind"),
    [("Bert", "BertForMaskedLM"), ("ModernBert", "ModernBertForMaskedLM"), ("Llama", "LlamaForCausalLM")],
)
def test_without_evidence_a_model_says_what_its_network_says(
    networks: dict[str, Path], other: Path, tmp_path: Path, family: str, kind: str
) -> None:
    """Of the soft token that its prior gives, made of the rows of the network's own table."""
    recipe, initial = read_initial(start(other, networks[family], embedding_dim=6), networks[family])
    denoiser = Trainer(recipe, prepare(recipe.data, tmp_path, False, print), initial=initial).learner.denoiser.eval()
    network = getattr(pytest.importorskip("transformers"), kind).from_pretrained(networks[family]).eval()
    one, blank = torch.ones(1, 7, dtype=torch.long), torch.full((1, 7), torch.inf)
    layout = Layout.causal(one, one.cumsum(1) - 1)
    if family != "Llama":
        layout = Layout.one_stream(one, one.cumsum(1) - 1, one)
    with torch.no_grad():
        found = denoiser.predict(torch.zeros(1, 7, 6), blank, layout).logits_NV
        soft = denoiser.prior.softmax(0) @ network.get_input_embeddings().weight[: len(denoiser.prior)]
        said = network(inputs_embeds=soft.expand(1, 7, -1)).logits[0, :, : len(denoiser.prior)]
    torch.testing.assert_close(found[:, : said.shape[1]], said, rtol=1e-4, atol=1e-4)
    assert initial.tells_next_token == (family == "Llama")


def test_given_tokens_tell_what_a_causal_network_says_comes_next(
    networks: dict[str, Path], other: Path, tmp_path: Path
) -> None:
    """So such a model is priced from left to right as its network is, before it has learned anything."""
    recipe, initial = read_initial(start(other, networks["Llama"], embedding_dim=6), networks["Llama"])
    lm = Trainer(recipe, prepare(recipe.data, tmp_path, False, print), initial=initial).model()
    network = pytest.importorskip("transformers").LlamaForCausalLM.from_pretrained(networks["Llama"]).eval()
    ids, special = torch.tensor([lm.tokenizer.encode_document("the cat sat on the mat")]), lm.tokenizer.special
    one = torch.ones_like(ids)
    with torch.no_grad():
        seen = lm.objective.next_tokens(lm.denoiser, ids, one, one.cumsum(1) - 1, ids != special.bos, special)
        said = network(ids).logits[0, :-1]
    torch.testing.assert_close(seen.logits_NV[:, : said.shape[1]], said, rtol=1e-4, atol=1e-4)


@pytest.mark.thorough
def test_a_published_network_learns_a_text_and_becomes_a_model(
    tools: Any, networks: dict[str, Path], other: Path, tmp_path: Path
) -> None:
    """It is a model like any other: resumed bit for bit, read from its directory, written with, started from again."""
    whole, halves, again = (tmp_path / name for name in ("whole", "halves", "again"))
    first = start(other, networks["Llama"], steps=4, decay=0.0, save_every=4, optimizer="muon", lr=0.002)
    tools.train(tools.with_steps(first, 8), whole)
    tools.train(first, halves)
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--out", str(halves), "--resume", "--steps", "8"])
    tools.assert_same(whole, halves)
    losses, lm = tools.losses(whole), ScoreLM.from_pretrained(whole)
    assert losses[-1] < losses[0]
    assert lm.config.network is not None and lm.config.network.family == "llama"
    assert lm.provenance.init_from == str(networks["Llama"]) and lm.provenance.before is None
    for path in ("bounded", "blocks:2"):
        assert lm.generate(n=2, steps=4, path=path)[0].nfe > 0
    tools.train(start(other, whole, steps=1), again)
    assert ScoreLM.from_pretrained(again).config == lm.config


def test_a_network_that_does_not_suit_is_refused_in_one_line(
    networks: dict[str, Path], other: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, says in (
        (["--max-length", "41"], "--max-length 41: "), (["--model.dim", "64"], "--model.dim: a run with --init-from"),
        (["--model.noise-conditioning", "film"], "no noise conditioning"),
    ):  # fmt: skip
        command = ["train", "--out", str(tmp_path / "run"), "--data", str(other), "--init-from", str(networks["Bert"])]
        with pytest.raises(SystemExit, match="2"):
            main([*command, "--steps", "2", *words])
        assert says in capfd.readouterr().err.splitlines()[-1]


def test_a_network_learns_at_a_rate_of_its_own_unless_one_is_given(
    networks: dict[str, Path], old: Path, other: Path
) -> None:
    for model, rate in ((networks["Bert"], NETWORK_LR), (old, TrainingConfig().lr)):
        assert read_initial(start(other, model), model)[0].training.lr == rate
        assert read_initial(start(other, model, lr=0.002), model)[0].training.lr == 0.002


def test_the_first_line_says_the_rate_and_what_a_run_starts_from(
    tools: Any, networks: dict[str, Path], other: Path, tmp_path: Path
) -> None:
    said = tools.train(start(other, networks["Bert"], steps=1), tmp_path / "run")
    assert any(f"from {networks['Bert']} at a learning rate of {NETWORK_LR:g}, " in line for line in said)
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).training.lr == NETWORK_LR


@pytest.mark.thorough
@pytest.mark.parametrize(("lora", "optimizer"), [(0, "adamw"), (1, "muon")])  # the latter has fewer rows than ranks
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_ranks_start_from_the_same_weights(
    tools: Any,
    forks: Callable[..., tuple[int, str]],
    old: Path,
    other: Path,
    tmp_path: Path,
    parallel: str,
    lora: int,
    optimizer: str,
) -> None:
    if lora:
        pytest.importorskip("peft")
    recipe, outs = tmp_path / "recipe.toml", [tmp_path / "one", tmp_path / "two"]
    training = {
        "rows": 4, "shards": 2, "steps": 4, "log_every": 1, "samples": 0, "precision": "float32", "device": "cpu",
        "init_from": str(old), "parallel": parallel, "lora": lora,
        "optimizer": optimizer,
    }  # fmt: skip
    lines = [f"{name} = {json.dumps(value)}" for name, value in training.items()]
    recipe.write_text("\n".join([f'data.source = "{other}"', "data.max_length = 32", "[training]", *lines]))
    for world, out in enumerate(outs, start=1):
        code, errors = forks("train", "--recipe", str(recipe), "--out", str(out), world=world)
        assert code == 0, errors
    assert tools.losses(outs[1]) == pytest.approx(tools.losses(outs[0]), rel=1e-4)
    one, two = (tools.weights(out) for out in outs)
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.thorough
def test_what_is_proposed_keeps_the_sizes(
    old: Path, other: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    proposal = propose(Recipe(data=DataConfig(source=str(other)), training=TrainingConfig(init_from=old, device="cpu")))
    lm, out = ScoreLM.from_pretrained(old), tmp_path / "run"
    assert proposal.recipe.model == lm.config and proposal.recipe.data.vocab_size == lm.tokenizer.vocab_size
    with pytest.raises(SystemExit, match="0"):
        main(["train", "-d", str(other), "--init-from", str(old), "--out", str(out), "--steps", "2", "--device", "cpu"])
    assert "1 layers of width 24" in capfd.readouterr().err
    assert json.loads((out / "model" / "config.json").read_text())["provenance"]["init_from"] == str(old)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--model.dim", "256"], "--model.dim: a run with --init-from"),
        (["--vocab-size", "300", "--model.layers", "2"], "--model.layers: a run with"),
        (["--vocab-size", "2048", "--no-byte-fallback"], "--byte-fallback, --vocab-size: a run with"),
        (["--model.noise-conditioning", "none"], "--model.noise-conditioning"),
        (["--tokenizer", "{text}"], "--tokenizer"),
        (["--objective", "masked"], "add --objective score"),
        (["--init-from", "{tmp}/none"], "no model at"),
        (["--data", "{old}", "--holdout", "0.9"], "was trained on this text with 0.02 of it held out"),
    ],
)
def test_what_contradicts_the_model_is_refused_in_one_line(
    text: Path, old: Path, other: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    places = {"text": str(other), "old": str(text), "tmp": str(tmp_path)}
    given = [word.format(**places) for word in words]
    command = ["train", "--out", str(tmp_path / "run"), "--data", str(other), "--steps", "2", "--init-from", str(old)]
    with pytest.raises(SystemExit, match="2"):
        main([*command, *given])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("scorelm: ")]
    assert len(lines) == 1 and says in lines[0], lines
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_contradicts_the_model_is_refused(
    old: Path, other: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[data]\nsource = "{other}"\n[model]\ndim = 64\n[training]\nsteps = 2\ninit_from = "{old}"\n')
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--recipe", str(recipe), "--out", str(tmp_path / "run")])
    assert "--model.dim" in capfd.readouterr().err


def test_text_learned_by_any_model_before_is_not_held_out(text: Path) -> None:
    recipe = Recipe(data=DataConfig(source=str(text), holdout=0.1), training=TrainingConfig(init_from=text))
    learned, other = Provenance(fingerprint="a", holdout=0.05), Provenance(fingerprint="b", holdout=0.5)
    with pytest.raises(InputError, match=r"give --holdout 0\.05 or less"):
        check_held_out(recipe, "a", other.model_copy(update={"before": learned}))
    check_held_out(recipe, "b", other.model_copy(update={"before": learned}))
    check_held_out(recipe, "a", Provenance(fingerprint="a"))  # what was held out is not known
