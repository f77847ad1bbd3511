"""Tables of single tokens and of pairs: how well a text is predicted without a network.

Counted on the training tokens::

    unigram   p(x)     = (c(x) + 1) / (N + V)
    bigram    p(x | h) = (c(h, x) + T(h) p(x)) / (c(h) + T(h))     Witten and Bell (1991)

c counts, N is the number of tokens, V the size of the vocabulary without the mask, T(h) the number
of different tokens that followed h.
"""

import torch
from jaxtyping import Int
from torch import Tensor


def unigram_nats(
    train: Int[Tensor, " train"], valid: Int[Tensor, " valid"], vocab_size: int
) -> float:
    """Return the cross-entropy of a table of single tokens on other tokens, nats a token."""
    return -float(_unigram(train, vocab_size)[valid].log().mean())


def bigram_nats(
    train: Int[Tensor, " train"], valid: Int[Tensor, " valid"], vocab_size: int
) -> float:
    """Return the cross-entropy of a table of pairs on other tokens, nats a token.

    The token before the first one is BOS, id 0.
    """
    single = _unigram(train, vocab_size)
    pairs = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    before = torch.cat([train.new_zeros(1), train[:-1]])
    pairs.index_put_((before, train), torch.ones(len(train), dtype=torch.float64), accumulate=True)
    kinds, total = (pairs > 0).sum(1), pairs.sum(1)
    h = torch.cat([valid.new_zeros(1), valid[:-1]])
    # After a token that is nowhere followed by another, the pair says nothing: c = T = 0.
    weight = torch.where(total[h] > 0, kinds[h].double(), 1.0)
    p = (pairs[h, valid] + weight * single[valid]) / (total[h] + weight)
    return -float(p.log().mean())


def _unigram(train: Int[Tensor, " train"], vocab_size: int) -> Tensor:
    """Return the smoothed frequency of each token; that of the mask, the last id, is not used."""
    counts = torch.bincount(train, minlength=vocab_size).double()
    return (counts + 1) / (len(train) + vocab_size - 1)
