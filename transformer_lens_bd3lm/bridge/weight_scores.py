"""Compute scores from weights, and load weights of the same processing: exactly, or not at all."""

import functools
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.activation_cache import require_folded
from transformer_lens_bd3lm.bridge.host import Methods
from transformer_lens_bd3lm.bridge.same_processing import require_same_processing


class WithWeightScores(Methods):
    """Mixed in front of the bridge's class: scores of weights, and loading them."""

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

    @functools.wraps(TransformerBridge.load_state_dict)
    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Load weights of the same processing as this bridge's.

        Raises:
            NotExactError: for weights of other processing, whether ``strict`` or not: gates would
                be in the weights twice, or not at all, and biases without their weights.
        """
        require_same_processing(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)
