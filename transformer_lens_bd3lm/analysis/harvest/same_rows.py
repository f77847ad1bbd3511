"""Rows whose activation is the same in every text, by construction.

An activation is a function of the tokens that reach it. Before the first attention that is the
token at its own position alone: a mask has the same activation there whatever surrounds it, and so
has BOS. After it, it is the tokens that its row reads: where every token of the first block is
masked, these are BOS and masks, and the activation depends on the position alone.
"""

import torch
from jaxtyping import Bool
from torch import Tensor

from transformer_lens_bd3lm.bridge.hook_points import lookup, split_layer

# Patterns of the hook-point table that the first layer computes before its attention.
_BEFORE_ATTENTION = (
    "hook_embed",
    "blocks.{i}.ln1.hook_in",
    "blocks.{i}.ln1.hook_scale",
    "blocks.{i}.ln1.hook_normalized",
    "blocks.{i}.ln1.hook_out",
    "blocks.{i}.hook_modulated_msa",
    "blocks.{i}.attn.hook_in",
    "blocks.{i}.attn.{q,k,v}.hook_in",
    "blocks.{i}.attn.hook_{q,k,v}_input",
    "blocks.{i}.attn.hook_attn_in",
    "blocks.{i}.attn.hook_{q,k}",
    "blocks.{i}.attn.hook_v",
    "blocks.{i}.attn.hook_rot_{q,k}",
)


def before_attention(name: str) -> bool:
    """Return whether a hook point depends on the token at its own position alone."""
    layer, point = split_layer(name)
    if layer is None:
        return lookup(name).pattern == "hook_embed"
    if layer > 0:
        return False
    return point in ("hook_resid_pre", "hook_in") or lookup(name).pattern in _BEFORE_ATTENTION


def own_token_is_text(masked: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """Return at which positions the token itself is of the text: neither a mask nor BOS."""
    text = ~masked
    text[:, 0] = False
    return text


def text_is_read(masked: Bool[Tensor, "batch pos"], block_size: int) -> Bool[Tensor, "batch pos"]:
    """Return which rows read a token of their text: in their block, or before it.

    Blocks before a row's own are read from the clean stream, or are finished. In the clean stream
    nothing is masked. With a block size of 1, that of autoregressive models, BOS reads itself.
    """
    block = torch.arange(masked.shape[1]) // block_size
    counts = torch.zeros(len(masked), int(block[-1]) + 1, dtype=torch.long)
    counts.index_add_(1, block, own_token_is_text(masked).long())
    return (counts > 0)[:, block] | (block * block_size > 1)
