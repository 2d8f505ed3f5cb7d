"""Data that ships with the library: the embedded corpus and a model of it.

See ``README.md`` beside this file for where each asset comes from.
"""
