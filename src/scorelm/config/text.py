"""Where text comes from, and how it becomes rows of tokens: the options of every verb that reads a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from scorelm.config import Options, named
from scorelm.errors import brief

MOST_TOKENS = 32_768  # of a document: the mask of attention holds their square


def check_vocab_size(value: Any) -> Any:
    """The value, unless it is no size; of a union pydantic would name what its members are called inside."""
    if value == "characters" or (isinstance(value, int) and value > 0):
        return value
    raise ValueError(f"vocab_size: give a number above 0, or characters (got {brief(value)})")


VocabSize = Annotated[PositiveInt | Literal["characters"], BeforeValidator(check_vocab_size)]


class TextOptions(Options):
    """Where text comes from, and what the examples in it are."""

    source: Annotated[str, named("data", "-d")] = "kjv"
    """Text to learn: kjv (embedded), a file (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet; compressed ones too), a
    directory of files, or the name of a Hugging Face dataset."""
    field: Annotated[str, named("field", "--data.field")] = "text"
    """Column that holds the text, in files with columns."""
    csv_separator: Annotated[str | None, named("csv-separator", "--data.csv-separator")] = None
    """Character between the columns of a .csv file, or tab; by default the comma, semicolon or tab that its header
    has."""
    split: Annotated[str | None, named("split", "--data.split")] = None
    """What is one example: line, paragraph, file (or record), or sentence-window:CHARACTERS,OVERLAP for windows of
    whole sentences, of up to CHARACTERS characters, a share OVERLAP of which may repeat the window before. By default a
    line of a text file, and the whole record in files with columns."""
    hub_split: Annotated[str | None, named("hub-split", "--data.hub-split")] = None
    """Split of a Hugging Face dataset, whole or in part, such as test or train[:10%]; by default train."""
    hub_config: Annotated[str | None, named("hub-config", "--data.hub-config")] = None
    """Configuration of a Hugging Face dataset that has several; by default the dataset's own default, if it has one."""
    streaming: Annotated[bool, named("streaming", "--data.streaming")] = False
    """Train on a Hugging Face dataset without fetching it whole first: its first 10,000 records make the tokenizer and
    the held-out texts that are measured, and the rest is read meanwhile. Training then needs --steps or --minutes."""


NormalStep = Literal["lower", "nfc", "nfkc", "numbers", "symbols"]
"""What can be done to a text before its tokens are looked up; see `scorelm.text.normalization`."""


class DataConfig(TextOptions):
    """The text, and how it becomes rows of tokens."""

    holdout: Annotated[float, Field(ge=0, lt=1), named("holdout", "--data.holdout")] = 0.02
    """Share of the examples that training never sees, to measure with; chosen by a hash of their text."""
    tokenizer: Annotated[Path | None, named("tokenizer", "-spm")] = None
    """A SentencePiece .model file, or a tokenizer.json of Hugging Face's library (of the GPT-2, BERT or Llama family);
    by default one is trained on the data."""
    vocab_size: Annotated[VocabSize, named("vocab-size")] = 2048
    """Size of the vocabulary, when a tokenizer is trained; or characters, for a token for each character of the text
    and no others. scorelm train and data choose it for the text unless it, or --recipe, is given."""
    byte_fallback: Annotated[bool, named("byte-fallback", "--data.byte-fallback")] = True
    """Spell unknown characters in bytes, so that any text comes back as it was, when a tokenizer of that size is
    trained."""
    normalize: Annotated[tuple[NormalStep, ...], named("normalize")] = ()
    """What is done to the text, and later to whatever the model is given, by default nothing: lower (to lower case),
    nfc or nfkc (Unicode's forms), numbers (to English words; needs the extra numbers) and symbols (left out); several
    may be given. The model keeps it."""
    max_length: Annotated[int, Field(ge=4, le=MOST_TOKENS), named("max-length")] = 64
    """Tokens in a packed row; longer examples are cut into windows, at different places in every epoch. scorelm train
    and data choose it for the text unless it, or --recipe, is given."""
