"""Activations of named hook points on disk, under a declared distribution of noise.

The one door is :func:`.harvest`; :class:`.Harvest` is what it returns and what a folder is read as.
"""

from transformer_lens_bd3lm.analysis.harvest.harvest import harvest
from transformer_lens_bd3lm.analysis.harvest.result import Harvest

__all__ = ["Harvest", "harvest"]
