"""Process the weights of a bridge: exactly, or not at all.

Calls that TransformerLens would get wrong, or fail at halfway, are refused before anything is
changed.
"""

import functools
from typing import Any

from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.folding import refuse_refactoring
from transformer_lens_bd3lm.bridge.host import Methods


class WithWeightProcessing(Methods):
    """Mixed in front of the bridge's class: weight processing."""

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
