"""Compute log-probabilities of given tokens without the logits of a whole vocabulary in memory.

A likelihood reads one number of ``log_softmax(logits)`` at each position. So the vocabulary is
unembedded in parts that stay in the processor's cache. For each part only the largest logit ``top``
and ``log_sum = log sum exp(logits - top)`` are kept::

    log p(x) = logit(x) - log sum_parts exp(top + log_sum)

All of this is computed in float32 or wider.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from transformer_lens_bd3lm.bridge.linear import Linear
from transformer_lens_bd3lm.bridge.watched import watched, watched_everywhere
from transformer_lens_bd3lm.model.modules import at_least_float32

ROWS, WORDS = 1024, 4096  # positions and tokens of the vocabulary with logits in memory at once


def token_log_probs(
    unembed: Any,
    h: Float[Tensor, "batch pos d_model"],
    where: Int[Tensor, "token 2"],
    tokens: Int[Tensor, " token"],
    mask_id: int,
) -> Float[Tensor, " token"]:
    """Compute ``log p`` in nats of one token at each of some masked positions, float32 or wider.

    Args:
        unembed: the unembedding of a bridge. With hooks it runs whole, so that they see every
            position.
        h: input of the unembedding.
        where: pairs of (batch row, position).
        tokens: the tokens whose log-probability is computed, none of them the mask.
        mask_id: id of the mask token, whose probability is zero.
    """
    linear, at = unembed.original_component, where.unbind(-1)
    if watched_everywhere() or watched(*unembed.modules()):
        logits = unembed(h)[at]
        few = max(ROWS * WORDS // logits.shape[-1], 1)
        chunks = ([part] for part in logits.split(few))
    elif type(linear) is Linear and type(linear.weight) is nn.Parameter:
        few = ROWS
        chunks = (_parts(linear, part) for part in h[at].split(few))
    else:  # a linear of another kind, such as a quantized one
        few = max(ROWS * WORDS // unembed.W_U.shape[1], 1)
        chunks = ([unembed(part[None])[0]] for part in h[at].split(few))
    pairs = zip(chunks, tokens.split(few), strict=True)
    return torch.cat([_log_probs(parts, chosen, mask_id) for parts, chosen in pairs])


def _parts(linear: nn.Linear, h: Tensor) -> Iterator[Float[Tensor, "token part"]]:
    """Yield logits of equal parts of the vocabulary, at least two tokens in each."""
    number = -(-linear.out_features // WORDS)
    parts = (x.tensor_split(number) for x in (linear.weight, linear.bias))
    for weight, bias in zip(*parts, strict=True):
        yield F.linear(h, weight, bias)


def _log_probs(
    parts: Iterable[Float[Tensor, "token part"]], tokens: Int[Tensor, " token"], mask_id: int
) -> Float[Tensor, " token"]:
    """Compute log-probabilities from the logits of one part of the vocabulary after another."""
    true, tops, log_sums, start = [], [], [], 0
    for part in parts:
        logits, width = at_least_float32(part), part.shape[-1]
        if start <= mask_id < start + width:
            logits = logits.index_fill(-1, tokens.new_tensor([mask_id - start]), -torch.inf)
        top, at = logits.max(-1, keepdim=True)
        # The kernel of log_softmax is several times as fast as that of logsumexp.
        log_sums.append(-logits.log_softmax(-1).gather(-1, at)[:, 0])
        tops.append(top[:, 0])
        column = tokens - start
        inside = (column >= 0) & (column < width)
        logit = logits.gather(-1, column.clamp(0, width - 1)[:, None])[:, 0]
        true.append(torch.where(inside, logit, 0.0))
        start += width
    top = torch.stack(tops).detach().amax(0)
    # Relative to the largest logit of all, so that a probability near 1 keeps its digits.
    log_sum = torch.stack([x - top + y for x, y in zip(tops, log_sums, strict=True)]).logsumexp(0)
    return torch.stack(true).sum(0) - top - log_sum
