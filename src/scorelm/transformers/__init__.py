"""Models as transformers loads them: the directory that ``scorelm export`` writes, and the classes behind it."""
