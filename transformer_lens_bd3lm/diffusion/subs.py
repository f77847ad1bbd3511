"""From logits to probabilities: the SUBS parameterisation.

Two rules (Sahoo et al. 2024; Arriola et al., section 3) turn raw logits into ``log p(x_0 | x_t)``:
the mask token has probability zero, and a token that is already revealed keeps all probability
(carry-over)::

    log p = log_softmax(logits with logits[mask] = -inf)      where x_t is the mask
    log p = 0 at x_t, -inf elsewhere                          where it is not

Raw logits and these log-probabilities are kept apart: nothing here writes into its input.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def without_mask(
    logits: Float[Tensor, "*dims d_vocab"], mask_id: int | None = None
) -> Float[Tensor, "*dims d_vocab"]:
    """Logits with the mask token's (the last id's by default) at minus infinity."""
    blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    blocked[-1 if mask_id is None else mask_id] = True
    return logits.masked_fill(blocked, -torch.inf)


def masked_log_probs(
    logits: Float[Tensor, "*dims d_vocab"], mask_id: int | None = None
) -> Float[Tensor, "*dims d_vocab"]:
    """``log p(x_0)`` in nats as if every position were masked: no mask, no carry-over.

    Args:
        logits: raw logits.
        mask_id: the mask token's id; the last id, as in the released checkpoints, by default.
    """
    return without_mask(logits, mask_id).log_softmax(-1)


def log_probs(
    logits: Float[Tensor, "*dims d_vocab"],
    x_t: Int[Tensor, "*dims"],
    mask_id: int | None = None,
) -> Float[Tensor, "*dims d_vocab"]:
    """SUBS log-probabilities ``log p(x_0 | x_t)`` in nats, as a new tensor.

    Args:
        logits: raw logits ``[batch, pos, d_vocab]``.
        x_t: the noisy ids they were computed from ``[batch, pos]``.
        mask_id: the mask token's id; the last id by default.
    """
    mask_id = logits.shape[-1] - 1 if mask_id is None else mask_id
    x_t = x_t.to(logits.device)
    carried = torch.full_like(logits, -torch.inf).scatter(-1, x_t[..., None], 0.0)
    return torch.where((x_t == mask_id)[..., None], masked_log_probs(logits, mask_id), carried)
