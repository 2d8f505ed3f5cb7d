"""Prices of texts that do not come back from the tokenizer as they were: what they say, and what they are of."""

import io
import json
import math

import pytest
import sentencepiece
import torch

from scorelm import ScoreLM, Tokenizer
from scorelm.cli import main
from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError
from scorelm.evaluation.price import price
from scorelm.evaluation.report import evaluate
from scorelm.noise.schedule import Log
from scorelm.text.tokenizer import count_lost

from ..conftest import LINES

SNOW, NORMALISED = "god ☃said", "the ﬁrst  light"


@pytest.fixture(scope="module")
def normalising():
    """A model whose tokenizer normalises: one form for characters that look alike, one space for several."""
    proto = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=proto, model_type="bpe", vocab_size=320, byte_fallback=True,
        normalization_rule_name="nmt_nfkc", num_threads=1, minloglevel=2, bos_id=0, eos_id=1, pad_id=2, unk_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    tokenizer = Tokenizer.from_bytes(proto.getvalue())
    config = ModelConfig(dim=32, layers=1, heads=2, hidden=64, embedding_dim=16)
    return ScoreLM(config, tokenizer, Log(0.7, 20.0), [0] * 5 + [1] * 40, objective="autoregressive").eval()


@pytest.fixture(scope="module")
def spelling(make_lm):
    """A model whose tokenizer knows few characters and has no bytes for the others."""
    return make_lm("autoregressive")


def test_characters_are_counted_that_do_not_come_back():
    assert count_lost("abcb", "abcb") == 0 and count_lost("", "") == 0
    assert count_lost("ab☃c☃", "abc") == 2 and count_lost("ﬁve", "five") == 1 and count_lost("a  b", "a b") == 1
    assert count_lost("ab", "ba") == count_lost("a", " a") == 1  # nothing is missing, and yet it is another text


def test_where_a_text_comes_back_changed_there_are_no_bits_per_character_unless_lossy(normalising):
    """The nats are those of the text that comes back, in either case; so are the characters, if lossy."""
    strict, lossy = (price(normalising, [NORMALISED, "light"], lossy=value) for value in (False, True))
    assert normalising.tokenizer.decode(normalising.tokenizer.encode(NORMALISED)) == "the first light"
    assert (strict.unknown_characters, strict.bits_per_char) == (2, None) and lossy.unknown_characters == 2
    assert (
        strict.nats_per_token == lossy.nats_per_token == price(normalising, ["the first light", "light"]).nats_per_token
    )
    assert lossy.bits_per_char == pytest.approx(float(lossy.by_text.sum()) / math.log(2) / len("the first lightlight"))
    assert strict.to_json()["bits_per_char"] is None and strict.to_json()["unknown_characters"] == 2
    assert price(normalising, "").bits_per_char is None
    plain = price(normalising, "light")
    assert (
        plain.unknown_characters == 0 and plain.bits_per_char == price(normalising, "light", lossy=True).bits_per_char
    )


@pytest.mark.parametrize(
    ("objective", "path"), [("autoregressive", "ordered"), ("score", "bounded"), ("score", "random")]
)
def test_lossy_leaves_out_what_cannot_be_spelled(make_lm, objective, path):
    """However many such characters there are, neither nats nor bits per character change."""
    lm = make_lm(objective)
    with pytest.raises(InputError, match=r"cannot spell.*--lossy"):
        price(lm, SNOW, path)
    one, more = (price(lm, text, path, lossy=True, draws=2) for text in (SNOW, SNOW.replace("☃", "☃雪☃")))
    assert (one.unknown_characters, more.unknown_characters) == (1, 3)
    assert one.nats_per_token == more.nats_per_token and one.bits_per_char == more.bits_per_char
    ids = [token for token in lm.tokenizer.encode(SNOW) if token != lm.tokenizer.special.unk]
    assert one.tokens == len(ids) + 2
    characters = len(lm.tokenizer.decode(ids))
    assert one.bits_per_char == pytest.approx(float(one.by_text.sum()) / math.log(2) / characters)


def score(lm, folder, capsys, text, *more):
    """What ``scorelm score`` prints for a text, and its exit code."""
    lm.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["score", str(folder / "model"), "--device", "cpu", "--data", str(folder / "text.txt"), *more])
    out, err = capsys.readouterr()
    return ended.value.code or 0, out, err


def test_score_says_what_does_not_come_back(normalising, spelling, tmp_path, capsys):
    code, out, _ = score(normalising, tmp_path, capsys, NORMALISED)
    assert code == 0 and "tokenizer: 2, so there are no bits/character without --lossy" in out
    assert out.count("bits/character") == 1
    code, out, _ = score(normalising, tmp_path, capsys, NORMALISED, "--lossy")
    assert code == 0 and "tokenizer: 2, what comes back is what is priced" in out and "bits/character, exact" in out
    found = json.loads(score(normalising, tmp_path, capsys, NORMALISED, "--json")[1])
    assert (found["unknown_characters"], found["bits_per_char"]) == (2, None)
    code, out, err = score(spelling, tmp_path, capsys, SNOW)
    assert (code, out) == (2, "") and "--lossy" in err.splitlines()[-1]
    code, out, _ = score(spelling, tmp_path, capsys, SNOW, "--lossy")
    assert code == 0 and "tokenizer: 1, " in out
    code, out, _ = score(spelling, tmp_path, capsys, "god said")
    assert code == 0 and "come back" not in out and "bits/character" in out


@pytest.mark.thorough
def test_eval_says_that_there_are_no_bits_per_character(normalising):
    found = evaluate(normalising, [NORMALISED] * 5, None, None, n=2, steps=2)
    assert found["prices"][0]["bits_per_char"] is None
    note = "no bits per character: 10 characters of the held-out texts do not come back from the tokenizer"
    assert found["notes"] == [note]
    from scorelm.cli.eval import tables

    printed = tables(found)
    assert f"note: {note}" in printed and "bits/character" not in printed
