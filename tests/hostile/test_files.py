"""Hostile recipes, corpora, tokenizers, texts: each is taken, or refused with an InputError of one printable line."""

import io
import json
import lzma
import os
import random
import subprocess
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scorelm.cli.entry import main
from scorelm.config.generation import Infilling
from scorelm.config.toml import load_recipe
from scorelm.errors import InputError
from scorelm.text.corpus import load_corpus
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer
from scorelm.text.templates import blank_draft

LINES = [f"line {number} of the light and the darkness" for number in range(40)]
TOKENIZER = Tokenizer.train(LINES, 300)
RECIPE = (
    b"[data]\nsource = 'kjv'\nholdout = 0.1\n[model]\ndim = 64\n[noise]\nblock_sizes = [1, 0]\n[training]\nlr = 1e-3\n"
)


campaign = pytest.mark.parametrize("examples", [200, pytest.param(3000, marks=pytest.mark.slow)])


def clear(message, name):
    """Whether an error says in one short printable line what it is about."""
    return name in message and message.isprintable() and len(message) < 1000


def taken(action, name):
    """Whether an action succeeds; otherwise it must refuse as it should, and any other exception is the test's."""
    try:
        action()
    except InputError as error:
        assert type(error) is InputError and clear(str(error), name), repr(error)
        return False
    return True


def damaged(whole, seed):
    """A copy with bytes replaced, cut out, repeated or put in."""
    draw, contents = random.Random(seed), whole
    for _ in range(draw.choice([1, 1, 2, 5])):
        place = draw.randrange(len(contents) + 1)
        new = draw.choice([b"", draw.randbytes(1), draw.randbytes(8), b"\xff" * 4, b"\n", b'"', b"[", whole[:60]])
        contents = contents[:place] + new + contents[place + draw.choice([0, 1, 4, len(new), 10**9]) :]
    return contents


# --- recipes ----------------------------------------------------------------------------------------------------------


@campaign
def test_any_bytes_are_a_recipe_or_refused(tmp_path, examples):
    path = tmp_path / "fuzz.toml"

    @given(contents=st.binary(max_size=60) | st.integers(0, 2**32).map(lambda seed: damaged(RECIPE, seed)))
    @settings(max_examples=examples, deadline=None, derandomize=True)
    def check(contents):
        path.write_bytes(contents)
        taken(lambda: load_recipe(str(path)), "fuzz.toml")

    check()


@pytest.mark.parametrize(
    "contents",
    [
        b"a=" + b"[" * 100_000,
        b"a=" + b"{a=" * 3000 + b"1" + b"}" * 3000,
        b"a" + b".a" * 2000 + b"=1",
        b"[" + b"a." * 2000 + b"a]",
        b"[model]\ndim=" + b"9" * 5000,
        b"[model]\ndim=0x" + b"f" * 100_000,
        b'["a\\nb\\u001b[31m"]\nx=1',
        b'[model]\ndim="' + b"x" * 100_000 + b'"',
        b"[training]\nlr=inf",
        b"[noise]\nsigma_max=nan",
        b"[noise.mixture]\nshared=inf",
        b"[data]\nmax_length=10000000000000",
        b"#" * (1 << 21),
    ],
    ids=lambda contents: repr(contents[:24]),
)
def test_recipes_that_nest_or_count_without_end_are_refused(tmp_path, contents):
    (tmp_path / "bad.toml").write_bytes(contents)
    assert not taken(lambda: load_recipe(str(tmp_path / "bad.toml")), "bad.toml")


@pytest.mark.parametrize(
    "name", ["\0", "x" * 5000, "x" * 5000 + ".toml", "a\nb", "../../etc/passwd", ".", "\ud800", ""]
)
def test_names_that_are_no_recipe_are_refused(name):
    assert not taken(lambda: load_recipe(name), "no recipe")


# --- texts with blanks ------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(["_", "___", "____", "\\", "a", " ", "light", "0", "é", "\n", "\0", "\u2581", "\ud800", "😀"])


@campaign
def test_any_text_is_a_template_or_refused(examples):
    @given(
        text=st.lists(PIECES, max_size=30).map("".join),
        lengths=st.sampled_from([[0] * 4 + [1] * 60, [0] * 64, [1] * 5]),
        size=st.sampled_from(["blank_tokens", "blank_words"]),
        number=st.none() | st.sampled_from([-1, 0, 1, 3, 10**30]),
        repair=st.none() | st.just(0.5),
    )
    @settings(max_examples=examples, deadline=None, derandomize=True)
    def check(text, lengths, size, number, repair):
        def fill():
            request = Infilling.of(repair=repair, **{size: number})
            template = blank_draft(text, TOKENIZER, True, True, lengths, request, np.random.default_rng(0)).template
            assert 2 <= len(template) < len(lengths)
            assert any(not isinstance(token, int) for token in template) <= ("____" in text)

        taken(fill, "")

    check()


@pytest.mark.parametrize("text", ["x" * 10**6, "a ____" * 10_000, "_" * 10**6 + "a" * 10**5])
def test_long_texts_are_refused_in_few_words(text):
    lengths, rng = [1] * 64, np.random.default_rng(0)
    assert not taken(lambda: blank_draft(text, TOKENIZER, True, True, lengths, Infilling(), rng), "")


# --- files that native code reads, in a process of their own ----------------------------------------------------------

CHILD = """
import json, resource, sys
from pathlib import Path
from scorelm.text.corpus import load_corpus, tokenise
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))

def use(path):
    if path.suffix == ".model":
        tokenizer = Tokenizer.load(path)
        tokenizer.decode(range(tokenizer.vocab_size))
        for text in ("", "the light 12", "\\u2581 _ \\u2603", "x" * 500):
            tokenizer.decode([*tokenizer.encode_document(text), *tokenizer.encode_inside(text)])
    else:
        tokenise(load_corpus(str(path), holdout=0), Tokenizer.load(sys.argv[2]), max_length=10_000)

for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        use(path)
        said = ["taken", ""]
    except Exception as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps([path.name, *said]), flush=True)
"""


def check_in_a_child(folder, files):
    """Read files in another process, which must survive them all; returns what it said of each, "" where it took it."""
    (folder / "files").mkdir()
    for name, contents in files.items():
        (folder / "files" / name).write_bytes(contents)
    TOKENIZER.save(folder / "own.model")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder / "files"), str(folder / "own.model")],
        env=os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert (done.returncode, len(said)) == (0, len(files)), (done.returncode, said[-1:], done.stderr[-500:])
    for name, kind, message in said:
        assert kind in ("taken", "InputError"), (name, kind, message)
        assert kind == "taken" or clear(message, name.split(".")[0]), (name, message)
    return {name: message for name, _, message in said}


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


WHOLE = {
    ".txt": "\n".join(LINES).encode(),
    ".txt.xz": lzma.compress("\n".join(LINES).encode()),
    ".jsonl": "".join(json.dumps({"id": 1, "text": line}) + "\n" for line in LINES).encode(),
    ".json": json.dumps([{"text": line} for line in LINES]).encode(),
    ".csv": ("id,text\n" + "".join(f'1,"{line}"\n' for line in LINES)).encode(),
    ".parquet": parquet(text=LINES, id=list(range(40))),
    ".model": TOKENIZER.to_bytes(),
}
MALICIOUS = {
    "null.json": b"null",
    "deep.json": b"[" * 100_000,
    "nested.jsonl": b'{"text":' * 50_000 + b"1" + b"}" * 50_000,
    "aside.jsonl": b'{"text":"a","x":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "scalar.json": b"3",
    "strings.json": b'["a","b"]',
    "number.jsonl": b'{"text":"a"}\n{"text":1}',
    "surrogate.jsonl": b'{"text":"\\ud800"}',
    "key.jsonl": b'{"a\\nb":"x"}',
    "keys.jsonl": b"{" + b",".join(b'"%d":1' % key for key in range(3000)) + b"}",
    "digits.jsonl": b'{"text":' + b"9" * 5000 + b"}",
    "header.csv": b'"te\nxt",y\na,b\n',
    "quote.csv": b'text\n"' + b"x\n" * 1000,
    "empty.txt.xz": b"",
    "cut.txt.xz": WHOLE[".txt.xz"][:-9],
    "bomb.txt.xz": lzma.compress(bytes(1 << 20)) * 66,
    "utf8.parquet": parquet(text=pa.array([b"\xff\xfe"], pa.binary()).view(pa.string())),
    "name.parquet": parquet(**{"a\nb": ["x"]}),
    "huge.parquet": b"PAR1" + b"\xff" * 100 + (2**31).to_bytes(4, "little") + b"PAR1",
    "utf8.model": TOKENIZER.to_bytes().replace("\u2581".encode(), b"\xff\xfe\xfd"),
    "large.model": bytes((1 << 24) + 1),
}  # fmt: skip


def make_damaged(seeds):
    """Whole files, damaged copies of them and noise."""
    whole = {f"whole{kind}": contents for kind, contents in WHOLE.items()}
    whole["wide.csv"] = b"text" + b",x" * 5_000 + b"\nthe light" + b",1" * 5_000 + b"\n"
    bad = {f"bad{seed}{kind}": damaged(contents, seed) for kind, contents in WHOLE.items() for seed in range(seeds)}
    noise = {
        f"noise{seed}{kind}": random.Random(seed).randbytes(99 * seed) for kind in WHOLE for seed in range(seeds // 5)
    }
    return whole, bad | noise


def check_damaged(whole, bad, said):
    taken_files = {name for name in whole | bad if not said[name]}
    assert whole.keys() <= taken_files and len(taken_files) < len(whole | bad)


@pytest.mark.thorough
def test_malicious_and_damaged_files_are_taken_or_refused_and_the_process_lives(tmp_path):
    whole, bad = make_damaged(seeds=15)
    said = check_in_a_child(tmp_path, MALICIOUS | whole | bad)
    assert all(said[name] for name in MALICIOUS), said
    assert "expands" in said["bomb.txt.xz"] and "larger than" in said["large.model"]
    check_damaged(whole, bad, said)


@pytest.mark.slow
def test_many_damaged_files_are_taken_or_refused_and_no_process_dies(tmp_path):
    whole, bad = make_damaged(seeds=100)
    check_damaged(whole, bad, check_in_a_child(tmp_path, whole | bad))


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    for name in ("pipe.txt", "pipe.model"):
        os.mkfifo(tmp_path / name)
    assert not taken(lambda: load_corpus(str(tmp_path / "pipe.txt")), "pipe.txt")
    assert not taken(lambda: Tokenizer.load(tmp_path / "pipe.model"), "pipe.model")


@pytest.mark.parametrize(
    ("name", "contents", "options", "message"),
    [
        ("", b"", (), "the text has no name: give a file"),
        ("a.csv", b"id, text\n1, a\n", (), "no field 'text'; its fields are id, ' text'"),
        ("a.csv", b"text\na\n", ("--csv-separator", '"'), "a CSV separator is one character"),
        ("a.jsonl", b'{"text":"a"}\n{"text":"b","text":"c"}\n', (), "line 2: an object has 'text' more than once"),
        ("a.txt", "light\n".encode("utf-16-le"), (), "looks like UTF-16: convert it"),
        ("a.txt.xz", lzma.compress(b"a\n") + b"junk", (), "cannot read"),
        ("a.txt", b"a\n", ("--split", ""), "no split '': choose line"),
    ],
)
def test_the_command_refuses_bad_text_in_one_line(tmp_path, monkeypatch, capfd, name, contents, options, message):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / name
    if name:
        path.write_bytes(contents)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", str(path) if name else "", "--out", str(tmp_path / "run"), *options])
    [last] = capfd.readouterr().err.splitlines()[-1:]
    assert ended.value.code == 2 and message in last
