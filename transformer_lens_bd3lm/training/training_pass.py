"""Logits of the masked tokens alone, as the plain model computes them in the dual view.

The plain forward pass (``model.modules``) spends much of its time on what the loss does not need or
what is the same at every position. With one conditioning vector c for all rows, as without time
conditioning, this pass computes the same numbers up to rounding from fewer operations:

- adaLN is linear, so scale and gate are multiplied into the weights, not into the streams.
- The clean stream never reads the noisy one: its queries have half of the keys.
- In the last layer the clean stream is only read, and the loss needs only the masked tokens.
- A rotation is one complex product, on rows of the weights put in pairs.

There is no padding and no time conditioning here.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.model.masks import dual_mask
from transformer_lens_bd3lm.model.modules import NORM_EPS, Block, at_least_float32


def masked_logits(
    model: BD3LM,
    x_t: Int[Tensor, "batch pos"],
    x_0: Int[Tensor, "batch pos"],
    block_size: int,
    masked: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "token d_vocab"]:
    """Compute the raw logits of masked tokens, row by row: ``model(x_t, clean=x_0)[masked]``.

    Args:
        model: model with adaLN and without time conditioning.
        x_t: noisy ids.
        x_0: clean ids.
        block_size: tokens per block.
        masked: True at the positions whose logits are wanted.
    """
    n, backbone = x_0.shape[1], model.backbone
    mask = dual_mask(n, block_size, x_0.device)
    x = backbone.vocab_embed(torch.cat([x_t, x_0], dim=1))
    angles = torch.arange(n, device=x.device)[:, None] * backbone.rotary_emb.inv_freq.to(x.dtype)
    turn = torch.polar(torch.ones_like(angles), angles)
    c = F.silu(backbone.sigma_map(x.new_zeros(1)))
    layers: list[Any] = list(backbone.blocks)
    *blocks, last = layers
    for block in blocks:
        x = _layer(block, c, x, turn, mask)
    x = _layer(last, c, x, turn, mask, masked)
    output = backbone.output_layer
    shift, scale = output.adaLN_modulation(c)[0].to(x.dtype).chunk(2)
    x = F.layer_norm(x, x.shape[-1:], output.norm_final.weight * (1 + scale), shift, NORM_EPS)
    return output.linear(x)


def _layer(
    block: Block,
    c: Float[Tensor, "one cond"],
    x: Float[Tensor, "batch both d_model"],
    turn: Complex[Tensor, "pos half"],
    mask: Bool[Tensor, "q k"],
    masked: Bool[Tensor, "batch pos"] | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """Compute the residual stream after a layer; of the last one, only at the masked tokens."""
    d, n, drop = x.shape[-1], len(turn), block.dropout if block.training else 0.0
    modulation = block.adaLN_modulation(c)[0].to(x.dtype).chunk(6)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
    h = F.layer_norm(x, (d,), block.norm1.weight * (1 + scale_msa), shift_msa, NORM_EPS)
    in_q, in_k, in_v = block.attn_qkv.weight.chunk(3)
    in_q, in_k = (_in_pairs(weight, block.n_heads) for weight in (in_q, in_k))
    k, v = F.linear(h, torch.cat([in_k, in_v])).chunk(2, dim=-1)
    k, v = _rotated(_by_head(k, block.n_heads), turn), _by_head(v, block.n_heads)
    q = F.linear(h if masked is None else h[:, :n], in_q)
    q = _rotated(_by_head(q, block.n_heads), turn)
    attend = F.scaled_dot_product_attention
    z = attend(q[:, :, :n], k, v, attn_mask=mask[:n])
    if masked is None:
        clean = attend(q[:, :, n:], k[:, :, n:], v[:, :, n:], attn_mask=mask[n:, n:])
        z = torch.cat([z, clean], dim=2)
    z = z.transpose(1, 2).flatten(2)
    if masked is not None:
        z, x = z[masked], x[:, :n][masked]
    x = x + F.dropout(F.linear(z, gate_msa[:, None] * block.attn_out.weight), drop)
    h = F.layer_norm(x, (d,), block.norm2.weight * (1 + scale_mlp), shift_mlp, NORM_EPS)
    wide, gelu, narrow = block.mlp
    out = F.linear(gelu(wide(h)), gate_mlp[:, None] * narrow.weight, gate_mlp * narrow.bias)
    return x + F.dropout(out, drop)


def _in_pairs(weight: Float[Tensor, "out d_model"], heads: int) -> Float[Tensor, "out d_model"]:
    """Put the rows of q's or k's weight that rotate together side by side, head by head.

    The scores stay the same, for q and k are reordered alike.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _by_head(x: Float[Tensor, "batch pos d_model"], heads: int) -> Tensor:
    """Split the last axis into heads: ``[batch, head, pos, d_head]``."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _rotated(x: Float[Tensor, "batch head rows d_head"], turn: Tensor) -> Tensor:
    """Rotate pairs of numbers by the angles of their positions, in each stream alike."""
    wide = at_least_float32(x)
    streams = wide.unflatten(2, (-1, len(turn))).unflatten(-1, (-1, 2)).contiguous()
    turned = torch.view_as_real(torch.view_as_complex(streams) * turn)
    return turned.flatten(-2).flatten(2, 3).to(x.dtype)
