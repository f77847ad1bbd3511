"""Refuse TransformerLens's shifted causal loss, and name the loss to use.

Position i predicting token i + 1 is what an autoregressive model is trained for. A BD3LM predicts
masked tokens where they stand, from everything its mask lets it read, so that loss would be a
number without a meaning. TransformerLens refuses it in its forward, but not in ``loss_fn``.

A loss computed from logits outside the bridge (``lm_cross_entropy_loss``) cannot be refused here.
"""

import functools
from typing import Any, NoReturn

from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.bridge.host import Methods
from transformer_lens_bd3lm.errors import LossError


def _refuse(asked: str) -> NoReturn:
    """Refuse the shifted loss, and name the losses to use.

    Raises:
        LossError: always.
    """
    raise LossError(
        f"{asked} is the shifted loss of an autoregressive model, which means nothing in block "
        "diffusion. Call logits = bridge(x_t, clean=x_0) and "
        "bd3lm.diffusion_loss(logits, x_t, x_0, t), or give that loss as reduce=..., a function of "
        "the logits; bd3lm.nelbo and bd3lm.likelihood measure texts"
    )


class WithoutShiftedLoss(Methods):
    """Mixed in front of the bridge's class: no shifted loss."""

    @functools.wraps(TransformerBridge.forward)
    def forward(
        self, input: Any, return_type: str | None = "logits", *args: Any, **kwargs: Any
    ) -> Any:
        """Run the forward; refuse a return type that asks for the loss."""
        if return_type in ("loss", "both"):
            _refuse(f"return_type={return_type!r}")
        return super().forward(input, return_type, *args, **kwargs)

    def loss_fn(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse the shifted loss.

        Raises:
            LossError: always.
        """
        _refuse("loss_fn")
