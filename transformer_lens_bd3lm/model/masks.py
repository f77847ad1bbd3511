"""Who may read whom: the block-diffusion masks as named rules.

A token at position p belongs to block ``p // block_size``. In the **dual view** ``[x_t | x_0]`` a
noisy and a clean stream share positions (Arriola et al., section 3.2 and figure 3); in the
**sampling view** there is one stream. A mask is a few rules OR-ed together, each a predicate on
(query, key); True means visible.

Every fast attention path is tested against these dense squares; none of them is needed to run one.
"""

import torch
from jaxtyping import Bool
from torch import Tensor


def dual_mask(
    length: int, block_size: int, device: torch.device | str | None = None
) -> Bool[Tensor, "q k"]:
    """The dual view's ``[2n, 2n]`` square over ``[noisy | clean]``; a ragged last block is fine."""
    index = torch.arange(2 * length, device=device)
    noisy = index < length
    block = (index % length) // block_size
    q_noisy, k_noisy = noisy[:, None], noisy[None, :]
    q_block, k_block = block[:, None], block[None, :]
    within_noisy = q_noisy & k_noisy & (q_block == k_block)
    noisy_reads_past = q_noisy & ~k_noisy & (k_block < q_block)
    clean_reads_past = ~q_noisy & ~k_noisy & (k_block <= q_block)
    return within_noisy | noisy_reads_past | clean_reads_past


def sampling_mask(
    queries: int,
    keys: int,
    block_size: int,
    device: torch.device | str | None = None,
    reach: int | None = None,
) -> Bool[Tensor, "q k"]:
    """Every block reads itself and all earlier ones; the queries are the last of the keys.

    With ``reach`` it reads at most so many blocks, its own included: a context that slides.
    """
    k_block = torch.arange(keys, device=device) // block_size
    q_block = k_block[keys - queries :, None]
    self_and_earlier = k_block[None, :] <= q_block
    return self_and_earlier if reach is None else self_and_earlier & (k_block > q_block - reach)


def causal_mask(
    queries: int, keys: int, device: torch.device | str | None = None
) -> Bool[Tensor, "q k"]:
    """Plain causal attention, for the autoregressive baseline; the same rule at block size 1."""
    return sampling_mask(queries, keys, 1, device)
