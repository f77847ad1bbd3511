"""The same texts under several arms on shared noise, and the differences between arms."""

from transformer_lens_bd3lm.analysis.experiment.metrics import WordFrequency
from transformer_lens_bd3lm.analysis.experiment.result import Experiment
from transformer_lens_bd3lm.analysis.experiment.run import experiment

__all__ = ["Experiment", "WordFrequency", "experiment"]
