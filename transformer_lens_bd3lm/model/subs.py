"""SUBS: from logits to log-probabilities.

Two rules (Sahoo et al., 2024; Arriola et al., section 3) turn raw logits into ``log p(x_0 | x_t)``.
The mask token has probability zero, and a token that is already revealed keeps all probability
(carry-over)::

    log p(x_0 | x_t) = log_softmax(logits with logits[mask] = -inf)      where x_t is the mask
                     = 0 at x_t and -inf elsewhere                       where x_t is a token

Which id the mask has is never assumed: it is the last one in released checkpoints, but 103 with
BERT's vocabulary.

No argument is written into: raw logits stay raw logits.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int


def log_probs(
    logits: Float[Tensor, "*dims d_vocab"],
    x_t: Int[Tensor, "*dims"],
    mask_id: Any = None,
) -> Float[Tensor, "*dims d_vocab"]:
    """Compute the SUBS log-probabilities ``log p(x_0 | x_t)``, in nats.

    The mask token gets probability 0, and at a revealed token all probability is on that token
    (Arriola et al., section 3). The result is a new tensor of the logits' shape, dtype and device.

    Args:
        logits: raw logits ``[batch, pos, d_vocab]``.
        x_t: noisy ids that they were computed from ``[batch, pos]``.
        mask_id: id of the mask token, ``bridge.cfg.mask_token_id``. It must be given, for neither
            logits nor ids say which id is the mask.

    Raises:
        InputError: if the mask's id is not given, or is outside the vocabulary.
    """
    mask_id = read_mask_id(mask_id, logits.shape[-1])
    x_t = x_t.to(logits.device)
    is_masked = (x_t == mask_id)[..., None]
    carried_over = torch.full_like(logits, -torch.inf).scatter(-1, x_t[..., None], 0.0)
    return torch.where(is_masked, masked_log_probs(logits, mask_id), carried_over)


def masked_log_probs(
    logits: Float[Tensor, "*dims d_vocab"], mask_id: int
) -> Float[Tensor, "*dims d_vocab"]:
    """Compute ``log p(x_0 | x_t)`` in nats as if x_t were the mask everywhere: no carry-over.

    Args:
        logits: raw logits.
        mask_id: id of the mask token.
    """
    return without_mask(logits, mask_id).log_softmax(-1)


def without_mask(
    logits: Float[Tensor, "*dims d_vocab"], mask_id: int
) -> Float[Tensor, "*dims d_vocab"]:
    """Return logits with the mask token's set to minus infinity."""
    is_mask = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    is_mask[mask_id] = True
    return logits.masked_fill(is_mask, -torch.inf)


def read_mask_id(mask_id: Any, d_vocab: int) -> int:
    """Return the mask token's id, an int of the vocabulary.

    Raises:
        InputError: if it is not given, or is outside the vocabulary.
    """
    rule = (
        f"give the id of the mask token, bridge.cfg.mask_token_id, one of 0..{d_vocab - 1}; it is "
        "not the last one in every vocabulary"
    )
    return check_int("mask_id", mask_id, 0, d_vocab - 1, rule)
