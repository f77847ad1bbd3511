"""Which passes are the same: noisy blocks with equal masks, and texts with equal mask patterns.

A noisy block depends on its text, its place in it, and which of its own places are masked. So mask
patterns of a text that mask the same of a block share that block: at given positions, which no
pattern masks, in a last block that is cut short, and in most draws of an estimate.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def distinct_patterns(
    masked: Bool[Tensor, "pattern batch pos"],
) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " pattern"]]:
    """Return the first of equal mask patterns, in order, and which of those each pattern equals.

    A pattern that masks nothing is left out, and equals number -1.
    """
    some = masked.flatten(1).any(-1).nonzero()[:, 0]
    _, group = masked[some].flatten(1).unique(dim=0, return_inverse=True)
    first = _first(group)
    order = first.argsort()
    owner = torch.full((len(masked),), -1).index_put((some,), order.argsort()[group])
    return some[first[order]], owner


def distinct_blocks(
    blocks: Bool[Tensor, "pattern batch block place"], at: Int[Tensor, "masked_block 3"]
) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " masked_block"]]:
    """Return the first of equal blocks, by text and block, and which of those each block equals.

    Args:
        blocks: which places are masked.
        at: (pattern, text, block) of the blocks to compare.
    """
    _, mask = blocks[at.unbind(-1)].unique(dim=0, return_inverse=True)
    place = at[:, 1] * blocks.shape[2] + at[:, 2]
    _, owner = (place * len(mask) + mask).unique(return_inverse=True)
    return _first(owner), owner


def passes_of(owner: Int[Tensor, " item"], at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield owners, so many a pass, and the items that are theirs."""
    order = owner.argsort(stable=True)
    ends = torch.bincount(owner).split(at_once)
    first, done = 0, 0
    for counts in ends:
        items = int(counts.sum())
        if items:
            yield slice(first, first + len(counts)), order[done : done + items]
        first, done = first + len(counts), done + items


def _first(group: Int[Tensor, " item"]) -> Int[Tensor, " group"]:
    """Return the first item of each group."""
    number = torch.arange(len(group))
    first = torch.full((int(group.max()) + 1,), len(group))
    return first.scatter_reduce(0, group, number, "amin")
