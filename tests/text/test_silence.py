"""What only a process of its own shows: importing is light, and nothing is printed, not even by native code."""

import subprocess
import sys

PROGRAM = """
import sys
import scorelm.text.corpus, scorelm.text.packing, scorelm.text.sentencepiece, scorelm.text.templates
assert not {"torch", "datasets", "pandas"} & set(sys.modules)

import logging
import datasets
from scorelm.errors import InputError
from scorelm.text.corpus import load_corpus, tokenise
from scorelm.text.packing import packed_rows
from scorelm.text.sentencepiece import SentencePieceTokenizer as Tokenizer

corpus = load_corpus("lines.csv")
tokenizer = Tokenizer.train(corpus.train["text"], 300)
tokenizer.save("a.model")
for attempt in (lambda: Tokenizer.train(["a"], 5000), lambda: Tokenizer.from_bytes(b"junk")):
    try:
        attempt()
    except InputError:
        pass
    else:
        raise AssertionError
tokens = tokenise(corpus, Tokenizer.load("a.model"), max_length=64)
assert not datasets.are_progress_bars_disabled()
assert logging.getLogger("datasets").level != logging.CRITICAL

next(iter(packed_rows(tokens.train, max_length=64, rows=2, pad=tokenizer.special.pad, seed=0)))
assert "torch" not in sys.modules
"""


def test_importing_is_light_and_nothing_is_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = "".join(f'1,"line {number} of the light and the darkness"\n' for number in range(60))
    (tmp_path / "lines.csv").write_text("id,text\n" + lines)
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
