"""Training: from a recipe and text to a run directory with a model in it."""

from scorelm.training.run import train
from scorelm.training.signals import Interrupted

__all__ = ["Interrupted", "train"]
