"""Means of a quantity of tokens by dependency depth, with intervals over sentences."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.by_depth.tokens import ParsedText
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval
from transformer_lens_bd3lm.result import plain_values


@dataclass(frozen=True)
class MeanByDepth:
    """A mean over tokens of each depth, kept by sentence so that sentences can be drawn again.

    Attributes:
        sums: sum of the quantity over a sentence's tokens ``[depth, sentence]``.
        counts: number of those tokens ``[depth, sentence]``.
        about: name of the quantity, and a fingerprint of the tokens and their depths.
    """

    sums: Float[Tensor, "depth sentence"] = field(repr=False)
    counts: Float[Tensor, "depth sentence"] = field(repr=False)
    about: str = ""

    @property
    def tokens(self) -> Int[Tensor, " depth"]:
        """Number of tokens of each depth."""
        return self.counts.sum(1).long()

    @property
    def mean(self) -> Float[Tensor, " depth"]:
        """Mean over the tokens of each depth; NaN without tokens."""
        return self.sums.sum(1) / self.counts.sum(1)

    def interval(
        self, level: float = 0.95, resamples: int = 2000
    ) -> list[tuple[float, float] | None]:
        """Bootstrap an interval of each mean over sentences like these.

        Args:
            level: probability with which such intervals cover the true mean.
            resamples: number of draws.

        Returns:
            An interval for each depth; None where fewer than two sentences have a token.
        """
        intervals: list[tuple[float, float] | None] = []
        for sums, counts in zip(self.sums, self.counts, strict=True):
            if int((counts > 0).sum()) < 2:
                intervals.append(None)
                continue
            total, tokens = bootstrap_totals(torch.stack([sums, counts]), resamples)
            intervals.append(middle_interval(total / tokens, level))
        return intervals

    def less(self, other: "MeanByDepth") -> "MeanByDepth":
        """Subtract the same tokens' values under another model, so that intervals are of pairs.

        Raises:
            InputError: if the other is another quantity, or about other tokens.
        """
        if self.about != other.about:
            raise InputError(
                "these are different quantities, or about different tokens: give both models the "
                "same parses, and compare nats with nats"
            )
        return MeanByDepth(self.sums - other.sums, self.counts, self.about)

    def to_dict(self) -> dict[str, Any]:
        """Return tokens, means and intervals by depth as plain JSON values; None for NaN."""
        return plain_values(
            {"tokens": self.tokens, "mean": self.mean, "interval_95": self.interval()}
        )


def mean_by_depth(
    parsed: ParsedText, values: Iterator[tuple[list[int], Float[Tensor, "batch pos"]]], what: str
) -> MeanByDepth:
    """Add values of tokens up by depth and sentence.

    Args:
        parsed: the sentences.
        values: numbers of sentences, and the values of their tokens; NaN for tokens that have none.
        what: name of the quantity.
    """
    shape = (parsed.deepest + 1, len(parsed.tokens))
    sums, counts = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
    for part, value in values:
        depth, sentence = parsed.depth(part), torch.tensor(part)[:, None].expand_as(value)
        known = (depth >= 0) & ~value.isnan()
        at = (depth[known], sentence[known])
        sums.index_put_(at, value[known].double(), accumulate=True)
        counts.index_put_(at, torch.ones_like(value[known]).double(), accumulate=True)
    return MeanByDepth(sums, counts, f"{what} {parsed.fingerprint()}")
