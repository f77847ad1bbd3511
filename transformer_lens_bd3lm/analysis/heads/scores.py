"""Scores of every head under a rule, and what to hold them against."""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval
from transformer_lens_bd3lm.result import Result, count, plain_values


@dataclass(frozen=True, repr=False)
class HeadScores(Result):
    """Share of masked queries' attention on the keys that a rule names, by head; float64, CPU.

    Attributes:
        model: the checkpoint's name.
        pattern: the rule's name.
        block_size: tokens per block; None without blocks.
        keys: the keys that were counted ``[batch, query, key]``, positions in both views; a query
            counts if it has one.
        attention: share of attention on them, summed over the queries of a text ``[text, layer,
            head]``.
        uniform: share of attention on them if it were spread evenly over all that a query may read,
            summed over the queries of a text ``[text]``.
        beyond: share of attention on them minus the head's mean attention from the same query to
            the same positions in the other texts in which the rule does not name them, summed over
            the queries that can be compared ``[text, layer, head]``.
        compared: number of queries for which there are such other texts ``[text]``.
        off_distribution: number of queries that read a mask in an earlier block, as no block does
            in training.
    """

    model: str
    pattern: str
    block_size: int | None
    keys: Bool[Tensor, "batch query key"] = field(repr=False)
    attention: Float[Tensor, "text layer head"] = field(repr=False)
    uniform: Float[Tensor, " text"] = field(repr=False)
    beyond: Float[Tensor, "text layer head"] = field(repr=False)
    compared: Int[Tensor, " text"] = field(repr=False)
    off_distribution: int

    @property
    def queries(self) -> Int[Tensor, " text"]:
        """Number of masked queries of each text that were scored."""
        return self.keys.any(-1).sum(-1)

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """Mean share of attention on the rule's keys, 0 to 1."""
        return self.attention.sum(0) / self.queries.sum()

    @property
    def base_rate(self) -> float:
        """The score of uniform attention, 0 to 1."""
        return float(self.uniform.sum() / self.queries.sum())

    @property
    def excess(self) -> Float[Tensor, "layer head"]:
        """Scores minus the base rate; below 0 the head attends less than uniform attention does."""
        return self.scores - self.base_rate

    @property
    def content(self) -> Float[Tensor, "layer head"]:
        """Scores minus the attention that the same positions get in other texts, -1 to 1.

        NaN where no query can be compared: where the rule depends on positions alone.
        """
        return self.beyond.sum(0) / self.compared.sum()

    @property
    def title(self) -> str:
        """The checkpoint, the rule and the block size."""
        size = "no blocks" if self.block_size is None else f"block size {self.block_size}"
        return f"{self.model}: {self.pattern}, {size}"

    def interval(
        self, layer: int, head: int, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap an interval of one head's score over texts like these, drawing whole texts.

        The interval of a head that was picked as the best of many lies too high; score it on other
        texts.

        Args:
            layer: the head's layer.
            head: the head's number in its layer.
            level: probability with which such intervals cover the true score.
            resamples: number of draws.
            seed: random seed of the draws.

        Raises:
            InputError: for fewer than two texts that have queries, or a level outside (0, 1).
        """
        of_head = torch.stack([self.attention[:, layer, head], self.queries.double()])
        total, queries = bootstrap_totals(of_head, resamples, seed)
        return middle_interval(total / queries, level)

    def top(self, k: int = 5) -> list[tuple[int, int]]:
        """Return ``(layer, head)`` of the ``k`` best scores, best first."""
        heads = self.scores.shape[1]
        order = self.scores.flatten().argsort(descending=True, stable=True)
        return [divmod(place, heads) for place in order[:k].tolist()]

    def _figures(self) -> str:
        layer, head = self.top(1)[0]
        several = int((self.queries > 0).sum()) > 1
        ends = " [{:.3f}, {:.3f}]".format(*self.interval(layer, head)) if several else ""
        return (
            f"{self.title}: best head {layer}.{head} {float(self.scores[layer, head]):.3f}{ends}, "
            f"uniform {self.base_rate:.3f}, {count(len(self.queries), 'text')}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all scores as plain JSON values, lists by layer and head; None for NaN."""
        return plain_values(
            {
                "model": self.model,
                "pattern": self.pattern,
                "block_size": self.block_size,
                "texts": int((self.queries > 0).sum()),
                "queries": int(self.queries.sum()),
                "compared_queries": int(self.compared.sum()),
                "off_distribution_queries": self.off_distribution,
                "uniform_score": self.base_rate,
                "scores": self.scores,
                "scores_over_same_places": self.content,
            }
        )
