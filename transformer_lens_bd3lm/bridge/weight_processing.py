"""Weight processing of a bridge, and what is put together from weights: exact, or refused.

What TransformerLens would get wrong, or fail at halfway, is refused before anything is changed.
"""

import functools
from typing import Any

from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.activation_cache import require_folded
from transformer_lens_bd3lm.bridge.folding import refuse_refactoring
from transformer_lens_bd3lm.bridge.same_processing import require_same_processing


class WithWeightProcessing:
    """Mixed in front of the bridge's class: weight processing, and scores of weights."""

    def tokens_to_residual_directions(self: Any, tokens: Any) -> Tensor:
        """Columns of ``W_U``, where they are what logits are read along.

        Raises:
            NotExactError: before the final norm is folded; ``W_U`` itself can always be read.
        """
        require_folded(self, self.cfg.n_layers)
        return super().tokens_to_residual_directions(tokens)

    def all_composition_scores(self: Any, mode: str) -> Any:
        """As the host's, from weights that have the modulation between two heads in them.

        Raises:
            NotExactError: before it is folded into them.
        """
        for layer, block in enumerate(self.blocks):
            block.require_plain_writes()
            require_folded(self, layer)
        return super().all_composition_scores(mode)

    @functools.wraps(TransformerBridge.enable_compatibility_mode)
    def enable_compatibility_mode(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the host's; what it would fail at is refused before anything is changed."""
        refuse_refactoring(TransformerBridge.enable_compatibility_mode, self, *args, **kwargs)
        super().enable_compatibility_mode(*args, **kwargs)

    @functools.wraps(TransformerBridge.process_weights)
    def process_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        """As the host's; what it would fail at is refused before anything is changed."""
        refuse_refactoring(TransformerBridge.process_weights, self, *args, **kwargs)
        super().process_weights(*args, **kwargs)

    @functools.wraps(TransformerBridge.load_state_dict)
    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """As the host's, of weights that are processed if this bridge's are.

        Raises:
            NotExactError: if they are not, whether ``strict`` or not: gates would then be in the
                weights twice, or not at all, and biases without the weights they belong to.
        """
        require_same_processing(self, state_dict)
        return super().load_state_dict(state_dict, *args, **kwargs)
