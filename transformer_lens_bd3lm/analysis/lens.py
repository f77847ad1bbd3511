"""What each layer would predict at a masked position: the logit lens, read through the modulation.

The residual after layer l goes through the checkpoint's own read-out, as its forward does::

    log p_l = SUBS(unembed(ln_final(resid_l) * (1 + scale) + shift))

Only masked positions are trained to predict, so only they are read. Nothing is folded or
approximated: at the last layer this is the model's own prediction.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.diffusion.subs import masked_log_probs
from transformer_lens_bd3lm.errors import InputError


@torch.no_grad()
def logit_lens(
    bridge: Any, cache: Any, ids: Int[Tensor, "batch pos"], position: int
) -> Float[Tensor, "layer batch d_vocab"]:
    """Log-probabilities in nats at one masked position, after the embedding and after each layer.

    Args:
        bridge: the bridge that made the cache.
        cache: an ``ActivationCache`` with the residuals (and ``final_adaln.*``, with adaLN).
        ids: the ids it was made from.
        position: a position that is masked in every row.

    Raises:
        InputError: if the position is not masked: clean positions are not trained to predict.
    """
    mask_id = bridge.cfg.mask_token_id
    if not bool((ids[:, position] == mask_id).all()):
        raise InputError(
            f"position {position} is not masked: the loss never looks at clean positions, so what "
            "the "
            "network predicts there is untrained"
        )
    residuals = [cache["blocks.0.hook_resid_pre"]]
    residuals += [cache[f"blocks.{i}.hook_resid_post"] for i in range(bridge.cfg.n_layers)]
    stream = torch.stack([x[:, position] for x in residuals])
    h = bridge.ln_final(stream)
    if "final_adaln.hook_scale" in cache:
        scale, shift = (cache[f"final_adaln.hook_{v}"][:, 0] for v in ("scale", "shift"))
        h = h * (1 + scale) + shift
    return masked_log_probs(bridge.unembed(h), mask_id)
