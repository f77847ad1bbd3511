"""Casts of a bridge: ``bridge.cfg.dtype`` follows, and the rotary frequencies stay in float32.

In bfloat16 the frequencies alone would cost 1e-4 of every score, and more with the position.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_bd3lm.bridge.mixin import put_in_front
from transformer_lens_bd3lm.model.modules import KeptFrequencies, Rotary


class FollowsCasts(nn.Module):
    """Mixed in front of the classes of a bridge and its model: ``cfg.dtype`` follows every cast."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        cfg: Any = self.__dict__.get("tl_cfg") or self.cfg
        cfg.dtype = next(self.parameters()).dtype
        return self


def keep_frequencies(rotary: Any) -> None:
    """Keep casts away from the rotary frequencies, and undo one that has happened."""
    inv_freq = rotary.inv_freq
    if inv_freq.dtype.itemsize < 4:
        exact = Rotary(2 * inv_freq.shape[0]).frequencies().to(inv_freq.device)
        was_cast = torch.equal(exact.to(inv_freq.dtype), inv_freq)
        rotary.inv_freq = exact if was_cast else inv_freq.float()
    if not isinstance(rotary, KeptFrequencies):
        put_in_front(rotary, KeptFrequencies)


def frequencies(model: Any, device: torch.device) -> Float[Tensor, " half"]:
    """Return the checkpoint's rotary frequencies on a device, whatever the model is cast to."""
    return model.backbone.rotary_emb.inv_freq.to(device)
