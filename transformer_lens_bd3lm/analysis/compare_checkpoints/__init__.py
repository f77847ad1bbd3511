"""What differs between two checkpoints of one shape: weights, predictions, activations, bounds."""

from transformer_lens_bd3lm.analysis.compare_checkpoints.compare import (
    CheckpointComparison as CheckpointComparison,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.compare import (
    compare_checkpoints as compare_checkpoints,
)
