"""Masks of block diffusion: which position may read which.

A token at position p is in block ``p // block_size``. In the **dual view** ``[x_t | x_0]`` a noisy
and a clean stream have the same positions (Arriola et al., section 3.2 and figure 3). A query q may
read a key k by three rules, OR-ed together::

    within_noisy       q noisy, k noisy    block(k) == block(q)    a block denoises itself
    noisy_reads_past   q noisy, k clean    block(k) <  block(q)    given the finished blocks before
    clean_reads_past   q clean, k clean    block(k) <= block(q)    which never see noise

In the **sampling view** there is one stream, finished blocks and then the noisy one, and one rule:
``block(k) <= block(q)``. Block size 1 is causal attention, block size n no mask at all.

True means visible. The fast attention paths do not build these squares; they are tested against
them.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def dual_mask(
    length: int, block_size: int, device: torch.device | str | None = None
) -> Bool[Tensor, "q k"]:
    """Return the ``[2n, 2n]`` mask of the dual view, over ``[noisy | clean]``.

    Args:
        length: n, the tokens of one stream; the last block may be shorter than the others.
        block_size: tokens per block.
        device: device of the mask.
    """
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
    """Return the mask of the sampling view: every block reads itself and all earlier ones.

    Args:
        queries: positions that read, the last of the keys.
        keys: positions that are read.
        block_size: tokens per block.
        device: device of the mask.
        reach: most blocks that a block reads, itself included: a context that slides.
    """
    k_block = torch.arange(keys, device=device) // block_size
    q_block = k_block[keys - queries :, None]
    self_and_earlier = k_block[None, :] <= q_block
    return self_and_earlier if reach is None else self_and_earlier & (k_block > q_block - reach)


def branching_mask(
    queries: tuple[Int[Tensor, " q"], Int[Tensor, " q"]],
    keys: tuple[Int[Tensor, " k"], Int[Tensor, " k"]],
    block_size: int,
    reach: int | None = None,
) -> Bool[Tensor, "q k"]:
    """Return the mask of the sampling view where a text goes on in several ways, in one pass.

    A row reads its block and earlier ones, of the common beginning and of its own branch.

    Args:
        queries: position and branch of each row that reads; branch 0 is the common beginning.
        keys: position and branch of each row that is read.
        block_size: tokens per block.
        reach: most blocks that a block reads, itself included: a context that slides.
    """
    (q_position, q_branch), (k_position, k_branch) = queries, keys
    q_block, k_block = q_position[:, None] // block_size, k_position[None] // block_size
    visible = (k_block <= q_block) & ((k_branch == 0) | (k_branch == q_branch[:, None]))
    return visible if reach is None else visible & (k_block > q_block - reach)


def causal_mask(
    queries: int, keys: int, device: torch.device | str | None = None
) -> Bool[Tensor, "q k"]:
    """Return the mask of the autoregressive baseline: causal, the sampling view's at block size 1.

    Args:
        queries: positions that read, the last of the keys.
        keys: positions that are read.
        device: device of the mask.
    """
    return sampling_mask(queries, keys, 1, device)
