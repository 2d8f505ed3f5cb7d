"""A ``tokenizer.json``: special tokens, round trips, spaces and blanks alike in every family, and damaged files."""

import json
import pickle
from functools import cache

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scorelm.config.generation import Infilling
from scorelm.errors import InputError
from scorelm.text.huggingface import HuggingFaceTokenizer
from scorelm.text.sentencepiece import SentencePieceTokenizer
from scorelm.text.templates import Hole, blank_draft, tokens_for
from scorelm.text.tokenizer import FILES, Special, count_lost, find_tokenizer, load_tokenizer
from scorelm.viz.frames import spell

from ..families import FAMILIES, LINES, gpt2

TRAINED = {name: make() for name, make in FAMILIES.items()}
OURS = {name: HuggingFaceTokenizer(made.to_str().encode()) for name, made in TRAINED.items()}
LIBRARY = {name: tokenizers.Tokenizer.from_str(made.to_str()) for name, made in TRAINED.items()}
for made in LIBRARY.values():
    made.no_truncation()
    made.no_padding()
TEXT = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n.,'theligh"))
WORDS = ["the", "light", "of", "world", "they", "cat", "cats", "sea", "is", "not"]
LENGTHS = [0] * 4 + [1] * 2000


def changed(**parts):
    """A file with other parts."""
    return json.dumps(json.loads(TRAINED["gpt2"].to_str()) | parts).encode()


def names(tokenizer: HuggingFaceTokenizer) -> list[str]:
    return tokenizer.pieces(tokenizer.special)


# --- special tokens ---------------------------------------------------------------------------------------------------


def test_special_tokens_are_those_of_the_file_and_others_come_behind():
    assert names(OURS["bert"]) == ["[CLS]", "[SEP]", "[PAD]", "[UNK]"]
    assert OURS["bert"].special == Special(bos=2, eos=3, pad=0, unk=1)
    assert OURS["bert"].vocab_size == TRAINED["bert"].get_vocab_size()
    assert OURS["unigram"].special == Special(bos=3, eos=1, pad=0, unk=2)
    assert OURS["llama"].special == Special(bos=1, eos=2, pad=380, unk=0)
    assert OURS["llama"].vocab_size == 381 and names(OURS["llama"])[2] == "<pad>"
    size = TRAINED["gpt2"].get_vocab_size()
    assert OURS["gpt2"].special == Special(bos=size, eos=0, pad=size + 1, unk=size + 2)
    assert names(OURS["gpt2"]) == ["<s>", "<|endoftext|>", "<pad>", "<unk>"]


def test_special_tokens_of_later_models_are_found():
    made = gpt2()
    made.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<|python_tag|>"])
    found = HuggingFaceTokenizer(made.to_str().encode())
    assert names(found) == ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>", "<unk>"]
    assert found.decode(found.encode("<|python_tag|>")) == "<|python_tag|>"
    assert made.token_to_id("<|python_tag|>") not in found.encode("<|python_tag|>")


def test_the_word_none_is_not_the_unknown_token():
    """Of a model that has none: so does SmolLM2's, in whose vocabulary the word is."""
    model = {"type": "BPE", "vocab": {"None": 0, "b": 1}, "merges": [], "unk_token": None}
    assert HuggingFaceTokenizer(changed(model=model)).special.unk > 1


def test_an_unknown_token_that_also_ends_texts_ends_none():
    model = {"type": "BPE", "vocab": {"<|endoftext|>": 0, "b": 1}, "merges": [], "unk_token": "<|endoftext|>"}
    found = HuggingFaceTokenizer(changed(model=model))
    assert found.special.eos == 0 and found.special.unk not in found.special[:3]
    assert found.encode("ab") == [found.special.unk, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_special_tokens_in_a_text_are_text(family):
    ours = OURS[family]
    text = "the <s> </s> <pad> [CLS] [SEP] [PAD] <|endoftext|> light"
    ids = ours.encode(text)
    assert not set(ours.special[:3]) & set(ids)
    assert family not in ("gpt2", "llama") or ours.decode(ids) == text
    assert ours.decode(ids).endswith("light")


# --- text -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@given(text=TEXT)
@example("<s></s><unk>")
@settings(deadline=None)
def test_any_text_comes_back_from_what_spells_in_bytes(family, text):
    ours, text = OURS[family], text.replace("▁", "")
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert ours.decode([*ours.encode("light"), *ours.encode_inside(text)]) == f"light{text}"
    assert ours.encode_document(text) == [ours.special.bos, *ids, ours.special.eos]
    assert ours.decode([*ours.encode_document(text), ours.special.pad]) == text


@pytest.mark.parametrize("family", FAMILIES)
@given(words=st.lists(st.sampled_from(WORDS), min_size=1))
@settings(deadline=None)
def test_words_come_back_from_every_family(family, words):
    ours, text = OURS[family], " ".join(words)
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode([*ours.encode("light"), *ours.encode_inside(f" {text}")]) == f"light {text}"
    assert ours.decode([*ours.encode("light"), *ours.encode_inside(text)]) == f"light{text}"
    assert "".join(ours.pieces(ours.encode(text))).replace("▁", " ").strip() == text


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXT)
@settings(deadline=None)
def test_ids_and_text_are_those_of_the_library(family, text):
    """But for the names of special tokens, which are text here, and what is unknown, which is shown."""
    ours, theirs = OURS[family], LIBRARY[family]
    ids = theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode(text) == ids
    if ours.special.unk not in ids:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
@settings(deadline=None)
def test_any_ids_decode_and_are_shown(family, data):
    ours = OURS[family]
    ids = data.draw(st.lists(st.integers(0, ours.vocab_size - 1), max_size=12))
    text = ours.decode(ids)
    assert len(ours.pieces(ids)) == len(spell(ours, ids)) == len(ids)
    assert ours.decode([*ids, ours.special.pad]) == text


def test_what_does_not_come_back_is_counted():
    bert = OURS["bert"]
    assert bert.decode(bert.encode("The Sea's LIGHT.")) == "the sea ' s light."
    assert count_lost("The Sea", bert.decode(bert.encode("The Sea"))) == 2
    assert bert.encode("起") == [bert.special.unk] and bert.decode([bert.special.unk]) == "⁇ "
    assert len(bert.encode("the light " * 50)) == 100


def test_a_space_that_is_put_first_is_taken_off_again():
    first = HuggingFaceTokenizer(gpt2(add_prefix_space=True).to_str().encode())
    assert first.pieces(first.encode("the light")) == ["▁the", "▁light"]
    assert first.decode(first.encode("the light")) == "the light"
    assert first.decode([*first.encode("light"), *first.encode_inside("the")]) == "lightthe"


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_mark_spaces_alike_in_every_family(family):
    ours = OURS[family]
    shown = "".join(ours.pieces(ours.encode("cat the light of")))
    assert shown.removeprefix("▁") == "cat▁the▁light▁of" and shown.startswith("▁") == (family != "gpt2")
    assert ours.pieces(ours.encode("cat the"))[-1] == "▁the" or family == "unigram"
    assert not "".join(ours.pieces(ours.encode_inside("the"))).startswith("▁")


@cache
def allowed(family):
    allowed_KV = tokens_for(OURS[family])
    allowed_KV[:, list(OURS[family].special)] = False
    return allowed_KV


def fill(family, text, seed, **how):
    """The text with its blanks filled by random tokens, each as its hole asks for, and where."""
    ours, allowed_KV, rng = OURS[family], allowed(family), np.random.default_rng(seed)
    draft = blank_draft(text, ours, bool(allowed_KV[Hole.SPACE.value].any()), True, LENGTHS, Infilling.of(**how), rng)
    choices = [np.flatnonzero(allowed_KV[hole.value if isinstance(hole, Hole) else 0]) for hole in draft.template]
    ids = [int(rng.choice(at)) if not isinstance(t, int) else t for t, at in zip(draft.template, choices, strict=True)]
    return *draft.read(ids, ours), ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "text", ["the ____ sea", "____ sea", "the ____", "the (____), of", "un____ed", " ____ ", "a\n____"]
)
def test_a_blank_of_one_word_is_one_word_and_all_else_is_as_it_was(family, text):
    before, behind = text.split("____")
    for seed in range(20):
        found, [(start, end)], ids = fill(family, text, seed, blank_words=1)
        assert found[:start] == before and found[end:] == behind
        assert found[start:end].isalnum()
        if family in ("gpt2", "llama"):
            assert OURS[family].decode(ids) == found


def test_wordpiece_begins_a_word_behind_a_sign_as_its_texts_do():
    ours = OURS["bert"]
    for text, first in (("the (____)", "▁"), ("un____", ""), ("____", "▁")):
        for seed in range(10):
            _, _, ids = fill("bert", text, seed, blank_words=1)
            free = len(ours.encode(text.partition("____")[0])) + 1
            assert ours.pieces(ids)[free].startswith("▁") == bool(first)


def test_characters_of_several_tokens_are_shown_at_the_first_and_half_ones_in_hexadecimal():
    for family in ("gpt2", "llama"):
        ours = OURS[family]
        ids = ours.encode_inside("é☃🎉")
        assert [token.text for token in spell(ours, ids)] == ["é", "", "☃", "", "", "🎉", "", "", ""]
        assert spell(ours, ids[1:2])[0] == ("⟨A9⟩", "byte")
    made = gpt2()
    file = json.loads(made.to_str())
    file["model"]["vocab"]["Ġâ"] = made.get_vocab_size()
    file["model"]["merges"].append(["Ġ", "â"])
    file["model"]["vocab"]["âĸģ"] = made.get_vocab_size() + 1
    ours = HuggingFaceTokenizer(json.dumps(file).encode())
    ids = ours.encode("the ☃")
    assert ours.pieces(ids) == ["the", "▁<0xE2>", "<0x98>", "<0x83>"] and ours.decode(ids) == "the ☃"
    assert [token.text for token in spell(ours, ids)] == ["the", " ☃", "", ""]
    assert spell(ours, ids[1:2])[0] == (" ⟨E2⟩", "byte")
    sign = made.get_vocab_size() + 1
    assert ours.decode([sign]) == "▁" and ours.pieces([sign]) == ["<0xE2><0x96><0x81>"]


# --- files ------------------------------------------------------------------------------------------------------------


def test_save_load_and_pickle_keep_the_bytes(tmp_path):
    for ours in OURS.values():
        path = tmp_path / ours.file_name
        ours.save(path)
        for copy in (load_tokenizer(path), pickle.loads(pickle.dumps(ours))):
            assert copy.to_bytes() == ours.to_bytes() == path.read_bytes()
            assert copy.encode("the light 12") == ours.encode("the light 12") and copy.special == ours.special


def test_dropout_of_merges_is_left_out():
    file = json.loads(TRAINED["gpt2"].to_str())
    file["model"]["dropout"] = 0.9
    ours = HuggingFaceTokenizer(json.dumps(file).encode())
    assert all(ours.encode("the light") == OURS["gpt2"].encode("the light") for _ in range(20))


def test_a_directory_has_one_tokenizer(tmp_path):
    assert find_tokenizer(tmp_path) == tmp_path / FILES[0]
    OURS["bert"].save(tmp_path / "tokenizer.json")
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.json"
    SentencePieceTokenizer.train(LINES, 340).save(tmp_path / "tokenizer.model")
    with pytest.raises(InputError, match=r"has both tokenizer\.model and tokenizer\.json: remove the one"):
        find_tokenizer(tmp_path)


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aaaaaaaaaa"}
DAMAGED = {
    "empty": (b"", "not a tokenizer.json"),
    "no JSON": (b"\xff\xfe", "not a tokenizer.json"),
    "a list": (b"[]", "not a tokenizer.json"),
    "deep": (b"[" * 200_000, "not a tokenizer.json"),
    "no model": (b'{"decoder": {"type": "ByteLevel"}}', "not a tokenizer.json"),
    "half": (TRAINED["bert"].to_str().encode()[:-1000], "not a tokenizer.json"),
    "a model of no kind": (changed(model={"type": "Magic", "vocab": {}}), "not a tokenizer.json"),
    "no vocabulary": (changed(model={"type": "BPE"}), "not a tokenizer.json"),
    "a decoder of no kind": (changed(decoder=[1]), "not a tokenizer.json"),
    "no decoder": (changed(decoder=None), "its decoder is none"),
    "another decoder": (changed(decoder={"type": "CTC"}), "its decoder is CTC, but only tokenizers of the GPT-2, BERT"),
    "gaps": (changed(added_tokens=[], model={"type": "BPE", "vocab": {"a": 5}, "merges": []}), "without gaps"),
    "a normalizer that grows": (changed(normalizer={"type": "Sequence", "normalizers": [REPLACE] * 9}), "far longer"),
    "many steps": (changed(normalizer={"type": "Sequence", "normalizers": [{"type": "NFKD"}] * 99}), "many steps"),
    "an unknown step": (changed(normalizer={"type": "Magic"}), "not a tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_in_one_line(tmp_path, damage):
    contents, says = DAMAGED[damage]
    path = tmp_path / "broken.json"
    path.write_bytes(contents)
    with pytest.raises(InputError, match=r"^cannot use tokenizer .*broken\.json: ") as caught:
        load_tokenizer(path)
    assert says in str(caught.value) and len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 700


def test_a_panic_of_the_library_is_an_error_like_others():
    normalizer = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(InputError, match=r"not a tokenizer\.json, or a damaged one"):
        HuggingFaceTokenizer(changed(normalizer=normalizer))


VALUES = (None, True, -1, 2**32 - 1, 2**64, 0.5, "", "x", "▁", [], {}, [1], {"type": "x"}, "Precompiled", "WordPiece")


@given(data=st.data())
@settings(deadline=None, max_examples=200, derandomize=True)
def test_a_file_with_anything_changed_is_taken_or_refused(data):
    place = file = json.loads(TRAINED[data.draw(st.sampled_from(list(FAMILIES)))].to_str())
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.integers(0, 3)) == 0:
            break
        place = place[key]
    place[key] = data.draw(st.sampled_from(VALUES))
    try:
        ours = HuggingFaceTokenizer(json.dumps(file).encode())
        for text in ("the light", " <s> Ünï\u0301 起 12\n"):
            assert isinstance(ours.decode(ours.encode_document(text) + ours.encode_inside(text)), str)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 500


def test_a_missing_or_a_huge_file_or_a_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read tokenizer .*none\.json: No such file"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "dir.json").mkdir()
    with pytest.raises(InputError, match="Is a directory"):
        load_tokenizer(tmp_path / "dir.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate((1 << 26) + 1)
    with pytest.raises(InputError, match=r"huge\.json: larger than"):
        load_tokenizer(tmp_path / "huge.json")


def test_ids_out_of_range_and_text_that_is_not_unicode_are_refused():
    with pytest.raises(InputError, match="token id -1 is outside the vocabulary"):
        OURS["bert"].decode([-1])
    with pytest.raises(InputError, match=r"^not Unicode text: light \\udcff$"):
        OURS["bert"].encode("light \udcff")
