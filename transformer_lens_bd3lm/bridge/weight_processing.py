"""Process the weights of a bridge, and compute scores from weights: exactly, or not at all.

Calls that TransformerLens would get wrong, or fail at halfway, are refused before anything is
changed.
"""

import functools
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.activation_cache import require_folded
from transformer_lens_bd3lm.bridge.folding import refuse_refactoring
from transformer_lens_bd3lm.bridge.host import Methods
from transformer_lens_bd3lm.bridge.same_processing import require_same_processing


class WithWeightProcessing(Methods):
    """Mixed in front of the bridge's class: weight processing, and scores of weights."""

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Return columns of ``W_U``, where logits are read along them alone.

        Raises:
            NotExactError: before the final norm is folded; ``W_U`` itself can always be read.
        """
        require_folded(self, self.cfg.n_layers)
        return super().tokens_to_residual_directions(tokens)

    def all_composition_scores(self, mode: str) -> Any:
        """Compute composition scores, from weights with the modulation between heads folded in.

        Raises:
            NotExactError: before the modulation is folded into them.
        """
        for layer, block in enumerate(self.blocks):
            block.require_plain_writes()
            require_folded(self, layer)
        return super().all_composition_scores(mode)

    @functools.wraps(TransformerBridge.enable_compatibility_mode)
    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        """Enable compatibility mode; options that cannot be exact are refused first."""
        refuse_refactoring(TransformerBridge.enable_compatibility_mode, self, *args, **kwargs)
        super().enable_compatibility_mode(*args, **kwargs)

    @functools.wraps(TransformerBridge.process_weights)
    def process_weights(self, *args: Any, **kwargs: Any) -> None:
        """Process weights; options that cannot be exact are refused first."""
        refuse_refactoring(TransformerBridge.process_weights, self, *args, **kwargs)
        super().process_weights(*args, **kwargs)

    @functools.wraps(TransformerBridge.load_state_dict)
    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights of the same processing as this bridge's.

        Raises:
            NotExactError: for weights of other processing, whether ``strict`` or not: gates would
                be in the weights twice, or not at all, and biases without their weights.
        """
        require_same_processing(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)
