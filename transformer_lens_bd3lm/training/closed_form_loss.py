"""Training loss of the embedded models: the NELBO, its integral over time in closed form.

For a block of k maskable tokens, draw the number of masks m uniformly from 1..k and a subset of
that size uniformly. Then::

    loss = sum over blocks of  (k / m) * sum over masked i of  -log p(x_i | x_t, clean earlier
    blocks)

The expectation is the NELBO (Arriola et al., equation 8 with the log-linear schedule), because the
integral of t^(m-1) (1-t)^(k-m) over t is 1 / (m C(k, m)). At block size 1 it is the exact
autoregressive NLL. The numbers of masks are stratified over the blocks of a batch, the strata
permuted, for less variance.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.training.loss import masked_nll
from transformer_lens_bd3lm.training.training_pass import masked_logits


def draw_masks(
    rows: int, context: int, block_size: int, generator: torch.Generator
) -> tuple[Bool[Tensor, "batch pos"], Float[Tensor, "batch pos"]]:
    """Draw the masked positions, and return them with the weight ``k / m`` of each position's loss.

    Position 0 (BOS) is never masked.

    Args:
        rows: rows of the batch.
        context: tokens of a row.
        block_size: tokens per block; it divides the context.
        generator: source of all randomness.
    """
    blocks = context // block_size
    maskable = torch.full((rows, blocks), block_size)
    maskable[:, 0] -= 1
    count = rows * blocks
    strata = (
        torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)
    ) / count
    m = (strata.view(rows, blocks) * maskable).long().clamp(max=maskable - 1) + 1
    m = torch.where(maskable > 0, m, 0)
    order = torch.rand(rows, blocks, block_size, generator=generator)
    order[:, 0, 0] = 2.0
    masked = order.argsort(-1).argsort(-1) < m[..., None]
    weight = (maskable / m.clamp(min=1))[..., None].expand_as(masked)
    return masked.reshape(rows, context), weight.reshape(rows, context)


def nelbo_loss(
    model: BD3LM,
    x_0: Int[Tensor, "batch pos"],
    block_size: int,
    generator: torch.Generator,
) -> Float[Tensor, ""]:
    """Draw one unbiased estimate of the NELBO, in nats a token (BOS not counted).

    Args:
        model: model that is trained, with adaLN and without time conditioning.
        x_0: clean rows.
        block_size: tokens per block; it divides the length of the rows.
        generator: source of the masks.
    """
    rows, context = x_0.shape
    mask_id = model.config.vocab_size - 1
    masked, weight = (
        drawn.to(x_0.device) for drawn in draw_masks(rows, context, block_size, generator)
    )
    x_t = torch.where(masked, mask_id, x_0)
    logits = masked_logits(model, x_t, x_0, block_size, masked)
    nll = masked_nll(logits, x_0[masked], mask_id)
    return (weight[masked] * nll).sum() / (rows * (context - 1))
