"""Sparse autoencoders: loaded from SAELens's folders, spliced into the network, and scored."""

from transformer_lens_bd3lm.analysis.sae.activity import FeatureActivity, feature_activity
from transformer_lens_bd3lm.analysis.sae.result import SaeScores
from transformer_lens_bd3lm.analysis.sae.saved import SavedSae, load_sae
from transformer_lens_bd3lm.analysis.sae.scores import sae_scores
from transformer_lens_bd3lm.analysis.sae.splice import Splice
from transformer_lens_bd3lm.analysis.sae.train import train_sae
from transformer_lens_bd3lm.analysis.sae.training_result import SaeTraining

__all__ = [
    "FeatureActivity",
    "SaeScores",
    "SaeTraining",
    "SavedSae",
    "Splice",
    "feature_activity",
    "load_sae",
    "sae_scores",
    "train_sae",
]
