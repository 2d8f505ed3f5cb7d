"""Evaluation: how likely, how fluent, how varied and how much of its own making generated text is."""
