"""From words to packed rows of token ids: tokenizer, corpus, packing.

This room imports neither torch nor any other room of the library.
"""
