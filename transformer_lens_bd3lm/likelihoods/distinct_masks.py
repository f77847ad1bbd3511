"""Find equal noisy blocks and equal mask patterns, so that each of them runs once.

Predictions in a noisy block depend on its text, its number in the text, and its own masks. So mask
patterns of a text that agree on a block share that block. This happens at given positions, which no
pattern masks, in a last block that is cut short, and in most draws of an estimate. A *place* is a
position counted within its block.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def distinct_patterns(
    masked: Bool[Tensor, "pattern batch pos"],
) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " pattern"]]:
    """Return the distinct mask patterns, and which of them each pattern equals.

    A distinct pattern is given by the number of the first that equals it, in order. A pattern that
    masks nothing is left out, and equals number -1.
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
    """Return the distinct blocks, by text and block, and which of them each block equals.

    A distinct block is given by the number of the first that equals it.

    Args:
        blocks: which places are masked.
        at: (pattern, text, block) of each block to compare.
    """
    _, mask = blocks[at.unbind(-1)].unique(dim=0, return_inverse=True)
    text_and_block = at[:, 1] * blocks.shape[2] + at[:, 2]
    _, owner = (text_and_block * len(mask) + mask).unique(return_inverse=True)
    return _first(owner), owner


def passes_of(owner: Int[Tensor, " item"], at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield the distinct items of each pass, ``at_once`` of them, and all items that equal them.

    Args:
        owner: for each item, the number of the distinct item that it equals, at least 0.
        at_once: number of distinct items in a pass.
    """
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
