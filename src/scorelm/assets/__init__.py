"""Data that ships with the library: the embedded corpus.

See ``README.md`` beside this file for where each asset comes from.
"""
