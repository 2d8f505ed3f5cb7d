"""From words to packed rows of token ids: tokenizer, corpus, packing, templates. Nothing here imports torch."""
