"""Add to a bridge what its architecture alone does not give it.

``adapter`` and what it imports are the architecture: one forward with every hook point, weight
processing, the block size. This module is on top of them: rules for texts, keywords and caches, the
autoregressive baseline, saving, and kernels for few rows. So the architecture stands alone, and
could be a part of TransformerLens (``docs/upstream.md``).
"""

from torch import nn

from transformer_lens_bd3lm.bridge.adapter import BD3LMArchitectureAdapter
from transformer_lens_bd3lm.bridge.ar_baseline import WithNextToken
from transformer_lens_bd3lm.bridge.forward_keywords import WithForwardKeywords
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.linear import Linear
from transformer_lens_bd3lm.bridge.mixin import put_in_front
from transformer_lens_bd3lm.bridge.no_causal_loss import WithoutShiftedLoss
from transformer_lens_bd3lm.bridge.run_with_cache import WithCache
from transformer_lens_bd3lm.bridge.save import SavesAsCheckpoint
from transformer_lens_bd3lm.bridge.texts import WithTexts
from transformer_lens_bd3lm.bridge.weight_scores import WithWeightScores


def extend(bridge: Bridge) -> None:
    """Put this package's methods in front of a bridge's own, and ``Linear`` of each linear's."""
    model, causal = bridge.original_model, bridge.cfg.causal
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    put_in_front(model, SavesAsCheckpoint)
    if causal:
        put_in_front(bridge, WithNextToken)
        bridge.adapter.supports_causal_loss = bridge.adapter.supports_generation = True
    for methods in (WithWeightScores, WithCache, WithTexts, WithForwardKeywords):
        put_in_front(bridge, methods)
    if not causal:
        put_in_front(bridge, WithoutShiftedLoss)


BD3LMArchitectureAdapter.extensions.append(extend)
