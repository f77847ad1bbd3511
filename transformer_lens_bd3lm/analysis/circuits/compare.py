"""The same masked inputs at several block sizes: which edges matter, and whether they are others.

Texts differ, so the strongest edges of two halves of the texts differ too. An overlap across block
sizes means something only beside that of two halves at one block size. Both are computed here from
halves without a common text. The p-value is of a test that swaps, text by text, which attribution
is of which block size: if the block size makes no difference, the overlap of the two means is one
of those after swaps.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.circuits.attribute import (
    EdgeAttribution,
    attribute_edges,
    halves,
    jaccard,
)
from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class CircuitComparison(Result):
    """Edges of the same masked inputs at two block sizes, and their overlap beside split halves.

    Attributes:
        first: attribution at the first block size.
        second: attribution at the second block size.
        top: number of strongest edges that are compared.
        within: mean Jaccard overlap of two halves of the texts at one block size ``[2]``.
        across: mean overlap of one half at the first block size and the other at the second.
        overlap: overlap of both block sizes over all texts.
        chance: mean of that overlap when each text's two attributions are swapped at random.
        p: share of swaps with an overlap no larger than ``overlap``: small if the block sizes use
            other edges.
        change: attribution of each node at the second block size minus that at the first, nats,
            with intervals over texts and corrected p-values ``[node]``.
        contract: what was measured, edited and held fixed.
    """

    first: EdgeAttribution
    second: EdgeAttribution
    top: int
    within: Float[Tensor, " 2"]
    across: float
    overlap: float
    chance: float
    p: float
    change: Effects = field(repr=False)
    contract: Contract

    @property
    def block_sizes(self) -> tuple[int | None, int | None]:
        """The two block sizes, in tokens."""
        return self.first.block_size, self.second.block_size

    def _figures(self) -> str:
        a, b = self.block_sizes
        within = " and ".join(f"{float(x):.2f}" for x in self.within)
        return (
            f"{a} → {b}, top {count(self.top, 'edge')}: halves overlap {within} "
            f"within, {self.across:.2f} across, p = {self.p:.4f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain values for JSON, both attributions included."""
        values = {
            "block_sizes": self.block_sizes,
            "top": self.top,
            "within": self.within,
            "across": self.across,
            "overlap": self.overlap,
            "chance": self.chance,
            "p": self.p,
            "nodes": self.first.node_names,
            "change_nats": self.change.to_dict(),
            "first": self.first.to_dict(),
            "second": self.second.to_dict(),
            "contract": vars(self.contract),
        }
        return plain_values(values)


def compare_circuits(
    bridge: Bridge,
    clean: Any,
    corrupted: Any,
    target: Any = None,
    against: Any = None,
    *,
    block_sizes: Any = (4, "full"),
    top: int = 50,
    splits: int = 50,
    swaps: int = 1000,
    seed: int = 0,
    **options: Any,
) -> CircuitComparison:
    """Compare which edges cause a prediction at two block sizes, against a split-half baseline.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        clean: texts, as in :func:`attribute_edges`; several, since texts are the unit.
        corrupted: the same texts with other tokens.
        target: the tokens at the masks.
        against: tokens whose log p is subtracted.
        block_sizes: the two block sizes.
        top: number of strongest edges that are compared.
        splits: number of random halves.
        swaps: number of random swaps of the test.
        seed: random seed of halves and swaps.
        options: further arguments of :func:`attribute_edges`.

    Raises:
        InputError: as :func:`attribute_edges`; for fewer than 2 texts, and other than two block
            sizes.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        NotExactError: in training mode with dropout, or where predictions are NaN.
    """
    bridge = read_bridge(bridge)
    check_int("top", top, 1)
    check_int("swaps", swaps, 1)
    check_int("splits", splits, 1)
    check_int("seed", seed, 0, 2**63 - 1)
    if not isinstance(block_sizes, tuple | list) or len(block_sizes) != 2:
        raise InputError(f'block_sizes={block_sizes!r}: give two, as (4, "full")')
    for size in block_sizes:
        block_size_of(bridge, size, "block_sizes")
    first, second = (
        attribute_edges(
            bridge, clean, corrupted, target, against, block_size=size, **options
        )
        for size in block_sizes
    )  # fmt: skip
    a, b, exists = first.by_text, second.by_text, first.exists
    parts = halves(len(a), splits, seed)

    def mean_overlap(one: Tensor, other: Tensor) -> float:
        each = [jaccard(one[i].mean(0), other[j].mean(0), exists, top) for i, j in parts]
        return sum(each) / len(each)

    overlap = jaccard(a.mean(0), b.mean(0), exists, top)
    generator = torch.Generator().manual_seed(seed)
    swapped = [overlap]  # as they are: one of the swaps, so that p is not 0
    for _ in range(swaps - 1):
        swap = torch.rand(len(a), generator=generator) < 0.5
        one, other = (torch.where(swap[:, None, None], x, y) for x, y in ((b, a), (a, b)))
        swapped.append(jaccard(one.mean(0), other.mean(0), exists, top))
    return CircuitComparison(
        first=first,
        second=second,
        top=top,
        within=torch.tensor([mean_overlap(x, x) for x in (a, b)], dtype=torch.float64),
        across=(mean_overlap(a, b) + mean_overlap(b, a)) / 2,
        overlap=overlap,
        chance=sum(swapped) / len(swapped),
        p=sum(x <= overlap + 1e-12 for x in swapped) / len(swapped),
        change=mean_effects((b - a).sum(-1)),
        contract=Contract(
            target=f"Jaccard overlap of the {top} strongest edges of "
            + first.contract.target.replace(", clean less corrupted, nats", ""),
            edited="the block size",
            fixed=first.contract.fixed,
            masks="the same masked inputs at both block sizes",
        ),
    )
