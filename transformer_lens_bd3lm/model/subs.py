"""From logits to probabilities: the SUBS parameterisation.

Two rules (Sahoo et al. 2024; Arriola et al., section 3) turn raw logits into ``log p(x_0 | x_t)``:
the mask token has probability zero, and a token that is already revealed keeps all probability
(carry-over)::

    log p = log_softmax(logits with logits[mask] = -inf)      where x_t is the mask
    log p = 0 at x_t, -inf elsewhere                          where it is not

Raw logits and these log-probabilities are kept apart: nothing here writes into its input. Which id
the mask has is never assumed: it is the last one in released checkpoints, 103 with BERT's words.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int


def without_mask(
    logits: Float[Tensor, "*dims d_vocab"], mask_id: int
) -> Float[Tensor, "*dims d_vocab"]:
    """Logits with the mask token's at minus infinity."""
    blocked = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
    blocked[mask_id] = True
    return logits.masked_fill(blocked, -torch.inf)


def masked_log_probs(
    logits: Float[Tensor, "*dims d_vocab"], mask_id: int
) -> Float[Tensor, "*dims d_vocab"]:
    """``log p(x_0)`` in nats as if every position were masked: no mask, no carry-over.

    Args:
        logits: raw logits.
        mask_id: the mask token's id.
    """
    return without_mask(logits, mask_id).log_softmax(-1)


def log_probs(
    logits: Float[Tensor, "*dims d_vocab"],
    x_t: Int[Tensor, "*dims"],
    mask_id: Any = None,
) -> Float[Tensor, "*dims d_vocab"]:
    """Compute SUBS log-probabilities ``log p(x_0 | x_t)`` in nats, as a new tensor.

    Args:
        logits: raw logits ``[batch, pos, d_vocab]``.
        x_t: the noisy ids they were computed from ``[batch, pos]``.
        mask_id: the mask token's id, ``bridge.cfg.mask_token_id``. It must be given: logits and ids
            do not say which id is the mask.

    Raises:
        InputError: if the mask's id is not given, or is outside the vocabulary.
    """
    mask_id = read_mask_id(mask_id, logits.shape[-1])
    x_t = x_t.to(logits.device)
    carried = torch.full_like(logits, -torch.inf).scatter(-1, x_t[..., None], 0.0)
    return torch.where((x_t == mask_id)[..., None], masked_log_probs(logits, mask_id), carried)


def read_mask_id(mask_id: Any, d_vocab: int) -> int:
    """Check that the mask token's id was given, and is one of the vocabulary.

    Raises:
        InputError: otherwise.
    """
    rule = (
        f"give the id of the mask token, bridge.cfg.mask_token_id, one of 0..{d_vocab - 1}; it is "
        "not the last one in every vocabulary"
    )
    return check_int("mask_id", mask_id, 0, d_vocab - 1, rule)
