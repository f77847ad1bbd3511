"""The result by dependency depth: nats, order of reveal, and the probe."""

from dataclasses import dataclass, field
from typing import Any

from transformer_lens_bd3lm.analysis.by_depth.means import MeanByDepth
from transformer_lens_bd3lm.analysis.by_depth.probe import Probe
from transformer_lens_bd3lm.result import Result


@dataclass(frozen=True)
class DependencyDepths(Result):
    """Likelihood, order of reveal and a linear probe of parsed sentences by dependency depth.

    Attributes:
        model: the checkpoint's name.
        block_size: tokens a block.
        kind: how the nats were computed: ``"exact"`` or ``"estimate"``.
        order_by: ``"posterior"`` or ``"confidence"``; None for an autoregressive model.
        nats: what a token adds to the NELBO, in nats.
        order: when a token is revealed in its block, 0 first to 1 last; None for an autoregressive
            model.
        probe: linear probes for depth; None if left out.
        sentences: number of sentences that were read.
        too_long: number of sentences that were left out, as longer than the context.
        straddling: number of tokens that were left out, with characters of several words.
        outside: number of tokens that were left out, with characters of no word.
    """

    model: str
    block_size: int
    kind: str
    order_by: str | None
    nats: MeanByDepth = field(repr=False)
    order: MeanByDepth | None = field(repr=False)
    probe: Probe | None = field(repr=False)
    sentences: int
    too_long: int
    straddling: int
    outside: int

    @property
    def labels(self) -> list[str]:
        """Name of each depth; the last counts all that are deeper."""
        last = len(self.nats.sums) - 1
        return [*map(str, range(last)), f"{last}+"]

    @property
    def title(self) -> str:
        """The checkpoint and the block size."""
        return f"{self.model} by dependency depth, block size {self.block_size}"

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers as plain JSON values, lists by depth; None for what is not finite.

        Order and probe are left out where they were not measured.
        """
        values: dict[str, Any] = {
            "model": self.model, "block_size": self.block_size, "sentences": self.sentences,
            "too_long": self.too_long, "straddling": self.straddling, "outside": self.outside,
            "depths": self.labels, "kind": self.kind, "order_by": self.order_by,
        }  # fmt: skip
        for name in ("nats", "order", "probe"):
            part = getattr(self, name)
            if part is not None:
                values[name] = part.to_dict()
        return values
