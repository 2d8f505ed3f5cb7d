"""The tokenizer: special ids, exact round trips, and one clear line for what cannot work."""

import io
import pickle
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from scorelm.errors import DiskError, InputError
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer
from scorelm.text.tokenizer import Special

LINES = [
    "In the beginning God created the heaven and the earth.",
    "And the earth was without form, and void; and darkness was upon the face of the deep.",
    "And God said, Let there be light: and there was light in the year 1611.",
    "And God saw the light, that it was good: and God divided the light from the darkness.",
]
TOKENIZER = Tokenizer.train(LINES, 340)
BOS, EOS, PAD, UNK = TOKENIZER.special
SPACE_SIGN = "\u2581"


def test_an_indentation_takes_a_token_or_two() -> None:
    """Not one for each of its spaces, of which there are twenty here."""
    names = ("one", "two", "three", "four")
    lines = [f"def {name}(self):\n        if x:\n            return {name}" for name in names]
    tokenizer = Tokenizer.train(lines * 20, 300)
    ids = tokenizer.encode(lines[2])
    assert tokenizer.decode(ids) == lines[2]
    assert sum(not tokenizer.decode([i]).strip(" ") for i in ids) <= 5


def test_special_ids_come_first_and_digits_stand_alone():
    assert TOKENIZER.pieces([BOS, EOS, PAD, UNK]) == ["<s>", "</s>", "<pad>", "<unk>"]
    assert TOKENIZER.special == Special(bos=0, eos=1, pad=2, unk=3)
    assert TOKENIZER.pieces(TOKENIZER.encode("year 1611"))[-4:] == ["1", "6", "1", "1"]
    assert TOKENIZER.vocab_size == 340


def test_document_stands_between_bos_and_eos_and_decoding_drops_them():
    ids = TOKENIZER.encode("the light")
    assert TOKENIZER.encode_document("the light") == [BOS, *ids, EOS]
    assert TOKENIZER.decode([BOS, *ids, EOS, PAD, PAD]) == "the light"
    assert not {BOS, EOS, PAD, UNK} & set(ids)


@pytest.mark.parametrize("text", [": and", " and", "ed", "", " ", "0", "12", "é☃", "\n"])
def test_text_inside_a_text_gets_no_space(text):
    ids = [*TOKENIZER.encode("light"), *TOKENIZER.encode_inside(text)]
    assert TOKENIZER.decode(ids) == "light" + text


@pytest.mark.parametrize("text", ["the", " the", "12", "0"])
def test_text_inside_a_text_gets_no_space_where_another_model_merges_digits_with_words(text):
    model = io.BytesIO()
    ids = {f"{name}_id": token for name, token in TOKENIZER.special._asdict().items()}
    lines = [f"0the 00 012 of the 0{k}light {k} -." for k in range(50)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=60, split_by_number=False,
        split_by_unicode_script=False, minloglevel=2, **ids,
    )  # fmt: skip
    other = Tokenizer.from_bytes(model.getvalue())
    assert other.pieces(other.encode("0the"))[0] not in ("0", "▁0")
    assert other.decode([*other.encode("of"), *other.encode_inside(text)]) == "of" + text


def test_special_names_in_text_are_text():
    assert TOKENIZER.decode(TOKENIZER.encode("<s> a </s><pad>")) == "<s> a </s><pad>"
    assert not {BOS, EOS, PAD} & set(TOKENIZER.encode("<s> a </s><pad>"))


@pytest.mark.parametrize(
    "text", ["", " ", "  two  spaces  ", "a\tb\nc\r", "起初 神 🎉", "e\u0301\ufb01\u00a0\ufeff", "0 12"]
)
def test_round_trip_of_awkward_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(f" 0{SPACE_SIGN}\u2585")))
def test_round_trip_of_any_text(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.decode([*TOKENIZER.encode("light"), *TOKENIZER.encode_inside(text)]) == f"light{text}"


def test_lines_with_signs_of_sentencepiece_are_learned_from():
    tokenizer = Tokenizer.train([*LINES, *["zebra\u2585zebra zebra", f"giraffe{SPACE_SIGN}giraffe giraffe"] * 50], 340)
    assert {"▁zebra", "▁giraffe"} <= set(tokenizer.pieces(range(340)))
    assert tokenizer.decode(tokenizer.encode("a\u2585b \u2585")) == "a\u2585b \u2585"


def test_without_byte_fallback_the_space_sign_is_unknown_and_no_space():
    tokenizer = Tokenizer.train(LINES, 80, byte_fallback=False)
    assert tokenizer.encode(f"light{SPACE_SIGN}light") == [
        *tokenizer.encode("light"), UNK, *tokenizer.encode_inside("light"),
    ]  # fmt: skip


def test_a_vocabulary_of_characters_has_those_of_the_text_and_no_others():
    text = "ROMEO:\n O,  she doth teach\tthe torches\r\n\nto burn – 16 神🎉.\n"
    tokenizer = Tokenizer.train([text], "characters")
    assert set(tokenizer.pieces(range(tokenizer.vocab_size))) == {
        "<s>", "</s>", "<pad>", "<unk>", *text.replace(" ", SPACE_SIGN)
    }  # fmt: skip
    assert tokenizer.vocab_size == 4 + len(set(text))
    assert tokenizer.decode([tokenizer.encode(character)[0] for character in text]) == text
    for part in (text, text[8:], " ", "  the", "\n"):
        assert tokenizer.encode_inside(part) == tokenizer.encode(part)
        assert len(tokenizer.encode(part)) == len(part) and tokenizer.decode(tokenizer.encode(part)) == part
    assert tokenizer.encode("7") == tokenizer.encode(SPACE_SIGN) == [UNK]
    assert Tokenizer.train([text], "characters").to_bytes() == tokenizer.to_bytes()


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\x1f\u2581\u2585"), min_size=1))
def test_every_character_of_any_text_is_a_token(text):
    tokenizer = Tokenizer.train([f"a{text}"], "characters")
    assert len(tokenizer.encode(text)) == len(text) and tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(0, TOKENIZER.vocab_size - 1)))
def test_any_ids_decode(ids):
    assert isinstance(TOKENIZER.decode(ids), str)
    assert len(TOKENIZER.pieces(ids)) == len(ids)


def test_unknown_reads_as_a_sign_and_an_id_out_of_range_is_named():
    assert "⁇" in TOKENIZER.decode([UNK])
    with pytest.raises(InputError, match="token id 340 is outside the vocabulary of 340"):
        TOKENIZER.decode([340])
    with pytest.raises(InputError, match="token id -1"):
        TOKENIZER.pieces([-1])


def test_training_is_deterministic():
    assert Tokenizer.train(iter(LINES), 340).to_bytes() == TOKENIZER.to_bytes()


def test_without_byte_fallback_unknown_characters_are_unk():
    tokenizer = Tokenizer.train(LINES, 80, byte_fallback=False)
    assert UNK in tokenizer.encode("起")
    assert tokenizer.decode(tokenizer.encode("the light")) == "the light"


def test_a_long_line_is_not_dropped():
    tokenizer = Tokenizer.train(["ab " * 100_000, "in the light"], 285)
    assert "▁ab" in tokenizer.pieces(tokenizer.encode("ab"))


def test_rare_characters_go_to_bytes_where_the_alphabet_is_large():
    lines = ["the light and the darkness " * 200 + chr(0x4E00 + number) for number in range(200)]
    tokenizer = Tokenizer.train(lines, 300)
    assert tokenizer.decode(tokenizer.encode(chr(0x4E00))) == chr(0x4E00)


@pytest.mark.parametrize("byte_fallback", [True, False])
def test_a_vocabulary_too_large_names_the_largest_that_works(byte_fallback):
    with pytest.raises(InputError, match=r"vocabulary size 5000 is too large.* largest that works is \d+$") as caught:
        Tokenizer.train(LINES, 5000, byte_fallback=byte_fallback)
    largest = int(str(caught.value).split()[-1])
    assert Tokenizer.train(LINES, largest, byte_fallback=byte_fallback).vocab_size == largest
    with pytest.raises(InputError, match="too large"):
        Tokenizer.train(LINES, largest + 1, byte_fallback=byte_fallback)


def test_a_vocabulary_too_small_names_what_works():
    with pytest.raises(InputError, match="vocabulary size 20 is too small: 270 tokens are reserved"):
        Tokenizer.train(LINES, 20)
    with pytest.raises(InputError, match=r"vocabulary size 20 is too small.* smallest that works is \d+$") as caught:
        Tokenizer.train(LINES, 20, byte_fallback=False)
    smallest = int(str(caught.value).split()[-1])
    assert Tokenizer.train(LINES, smallest, byte_fallback=False).vocab_size == smallest


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_nothing_to_train_on(lines):
    for size in (300, "characters"):
        with pytest.raises(InputError, match="no text"):
            Tokenizer.train(lines, size)


def test_text_that_is_not_unicode_is_refused_in_one_printable_line():
    for refuse in (TOKENIZER.encode, lambda text: Tokenizer.train([*LINES, text], 340)):
        with pytest.raises(InputError, match=r"^not Unicode text: light \\udcff$"):
            refuse("light \udcff")


def test_save_load_and_pickle_keep_the_bytes(tmp_path):
    path = tmp_path / "tokenizer.model"
    TOKENIZER.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["tokenizer.model"]
    for copy in (
        Tokenizer.load(path),
        Tokenizer.from_bytes(TOKENIZER.to_bytes()),
        pickle.loads(pickle.dumps(TOKENIZER)),
    ):
        assert copy.to_bytes() == TOKENIZER.to_bytes()
        assert copy.encode("the light 12") == TOKENIZER.encode("the light 12")


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing_behind(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"cannot write .*nowhere.*a\.model: No such file"):
        TOKENIZER.save(tmp_path / "nowhere" / "a.model")
    write = Path.write_bytes

    def full(path, contents):
        write(path, contents[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DiskError, match=r"cannot write .*a\.model: No space left on device$"):
        TOKENIZER.save(tmp_path / "a.model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [lambda proto: b"", lambda proto: b"junk", lambda proto: proto[: len(proto) // 2]])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = tmp_path / "broken.model"
    path.write_bytes(damage(TOKENIZER.to_bytes()))
    with pytest.raises(InputError, match=r"cannot use tokenizer .*broken\.model: not a SentencePiece model") as caught:
        Tokenizer.load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read tokenizer .*none\.model: No such file"):
        Tokenizer.load(tmp_path / "none.model")
    with pytest.raises(InputError, match="Is a directory"):
        Tokenizer.load(tmp_path)


def test_other_special_ids_are_refused(tmp_path):
    path, model = tmp_path / "default.model", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_writer=model, vocab_size=50, minloglevel=2
    )
    path.write_bytes(model.getvalue())
    with pytest.raises(InputError, match=r"default\.model: .*bos 1, eos 2, pad -1, unk 0.*bos 0, eos 1, pad 2, unk 3"):
        Tokenizer.load(path)
