"""Casts of a bridge: ``bridge.cfg.dtype`` follows, and the rotary frequencies stay in float32.

In bfloat16 the frequencies alone would cost 1e-4 of every score, and more with the position.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.bridge.mixin import put_in_front
from transformer_lens_bd3lm.model.modules import KeptFrequencies, Rotary


class FollowsCasts:
    """Mixed in front of a bridge's class and its model's: ``cfg.dtype`` follows every cast."""

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        cfg = self.__dict__.get("tl_cfg") or self.cfg
        cfg.dtype = next(self.parameters()).dtype
        return self


def keep_frequencies(rotary: Any) -> None:
    """Put the checkpoint's rotary frequencies out of reach of casts; undo one that was made."""
    there = rotary.inv_freq
    if there.dtype.itemsize < 4:
        exact = Rotary(2 * there.shape[0]).frequencies().to(there.device)
        cast = torch.equal(exact.to(there.dtype), there)
        rotary.inv_freq = exact if cast else there.float()
    if not isinstance(rotary, KeptFrequencies):
        put_in_front(rotary, KeptFrequencies)


def frequencies(model: Any, device: torch.device) -> Float[Tensor, " half"]:
    """The checkpoint's rotary frequencies on a device, whatever the model is cast to."""
    return model.backbone.rotary_emb.inv_freq.to(device)
