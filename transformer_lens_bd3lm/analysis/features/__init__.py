"""Features of a sparse autoencoder, one by one: their pages, and steering with them."""

from transformer_lens_bd3lm.analysis.features.ablation import RandomChange
from transformer_lens_bd3lm.analysis.features.contexts import Context
from transformer_lens_bd3lm.analysis.features.features import feature, features
from transformer_lens_bd3lm.analysis.features.result import Feature, Features
from transformer_lens_bd3lm.analysis.features.steering import feature_arms

__all__ = ["Context", "Feature", "Features", "RandomChange", "feature", "feature_arms", "features"]
