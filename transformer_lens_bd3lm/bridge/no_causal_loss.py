"""The host's shifted causal loss, refused by name, with the way to the loss that there is.

Position i predicting token i + 1 is what an autoregressive model is trained for. A BD3LM predicts
masked tokens where they stand, from everything its mask lets it read, so that loss would be a
number without a meaning. The host refuses it in its forward; its ``loss_fn`` would compute it.

What is computed from logits outside the bridge (``lm_cross_entropy_loss``) cannot be seen here.
"""

import functools
from typing import Any, NoReturn

from transformer_lens.model_bridge import TransformerBridge

from transformer_lens_bd3lm.errors import LossError


def refuse(asked: str) -> NoReturn:
    """Say what there is instead.

    Raises:
        LossError: always.
    """
    raise LossError(
        f"{asked} is the shifted loss of an autoregressive model, which means nothing in block "
        "diffusion. Call logits = bridge(x_t, clean=x_0) and "
        "bd3lm.diffusion_loss(logits, x_t, x_0, t), or give that loss as reduce=..., a function of "
        "the logits; bd3lm.nelbo and bd3lm.likelihood measure texts"
    )


class WithoutShiftedLoss:
    """Mixed in front of the bridge's class."""

    @functools.wraps(TransformerBridge.forward)
    def forward(
        self: Any, input: Any, return_type: str | None = "logits", *args: Any, **kwargs: Any
    ) -> Any:
        """As the host's, but no loss."""
        if return_type in ("loss", "both"):
            refuse(f"return_type={return_type!r}")
        return super().forward(input, return_type, *args, **kwargs)

    def loss_fn(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused.

        Raises:
            LossError: always.
        """
        refuse("loss_fn")
