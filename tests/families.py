"""Tokenizers of the families that Hugging Face's library is used with, trained on a few lines."""

import json
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [
    "the light of the world, and the sea\nis not the light",
    "thyself they cat cats 12. Don't ask ours, ask (theirs)!",
    "0123456789 - | . abcdefghijklmnopqrstuvwxyz",
] * 3
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def gpt2(**how: Any) -> Tokenizer:
    """Byte-level byte-pair encoding: ``Ġ`` is a space, and one token both begins and ends texts."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | how)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(LINES, trainer)
    return made


def bert() -> Tokenizer:
    """WordPiece in lower case: ``##`` marks the rest of a word, and a space stands between all other tokens."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    made.enable_truncation(8)
    made.enable_padding(length=8)
    return made


def llama() -> Tokenizer:
    """Byte-pair encoding that writes a space as ``▁``, one before every text, and what it does not know in bytes."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    made.train_from_iterator(LINES, trainer)
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    file = json.loads(made.to_str())
    file["added_tokens"] = file["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(file))


def unigram() -> Tokenizer:
    """A unigram model as T5 has one, whose vocabulary holds the names of its special tokens."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    trainer = trainers.UnigramTrainer(vocab_size=70, special_tokens=special, unk_token="<unk>", show_progress=False)
    made.train_from_iterator(LINES, trainer)
    return made


FAMILIES = {"gpt2": gpt2, "bert": bert, "llama": llama, "unigram": unigram}
