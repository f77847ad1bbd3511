"""The NELBO of the same texts under two checkpoints, from the same mask draws.

A mask pattern that is hard for a is hard for b as well, so the difference is surer than either
bound. Intervals are over texts like these; see ``likelihoods.statistics``.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformer_lens_bd3lm.analysis.compare_checkpoints.predictions import paired_interval
from transformer_lens_bd3lm.analysis.compare_checkpoints.texts import NoisedRows
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo
from transformer_lens_bd3lm.likelihoods.statistics import Nats
from transformer_lens_bd3lm.result import plain_values

_PATTERNS = 256  # mask patterns of a block that is summed exactly


@dataclass(frozen=True)
class BoundComparison:
    """NELBO of the same texts under two checkpoints, from the same mask draws.

    Attributes:
        method: method of :func:`nelbo`.
        a: NELBO under a.
        b: NELBO under b; replicate i of both has the same masks.
    """

    method: str
    a: Nats
    b: Nats

    @property
    def difference(self) -> float:
        """NELBO of b minus that of a, nats a token; above 0: the texts are less likely under b."""
        return float((self.b.nats - self.a.nats).sum()) / self.a.total_tokens

    @property
    def standard_error(self) -> float:
        """Standard error of ``difference``, nats a token, from paired replicates; 0 if exact."""
        if self.a.kind == "exact":
            return 0.0
        off = (self.b.replicates - self.a.replicates).sum(-1) / self.a.total_tokens
        return float(off.std()) / math.sqrt(len(off))

    def interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float] | None:
        """Compute the interval of ``difference`` over texts like these; None for a single text.

        Args:
            level: probability that an interval made this way covers the true value.
            resamples: number of bootstrap resamples.
            seed: random seed of the resamples.
        """
        values = torch.stack([self.b.nats - self.a.nats, self.a.token_counts.double()])
        return paired_interval(values, level, resamples, seed)

    def to_dict(self) -> dict[str, Any]:
        """Return the bounds and their difference as plain values for JSON, nats a token."""
        values = {
            "method": self.method,
            "kind": self.a.kind,
            "nats_per_token": [self.a.nats_per_token, self.b.nats_per_token],
            "difference": self.difference,
            "standard_error": self.standard_error,
            "interval_95": self.interval(),
        }
        return plain_values(values)


def bound_method(size: int | None, method: str | None) -> str:
    """Return the method asked for, else exact for few mask patterns a block, else Monte Carlo."""
    if method is not None:
        return method
    return "exact" if size is not None and 2**size <= _PATTERNS else "monte_carlo"


def compare_bounds(
    models: tuple[Any, Any],
    rows: NoisedRows,
    size: int | None,
    method: str,
    replicates: int,
    seed: int,
) -> BoundComparison:
    """Compute the NELBO of the same texts under both models, from the same mask draws.

    Raises:
        NotExactError: where it cannot be computed, as with time conditioning.
    """
    a, b = (
        _add_to_texts(list(_bounds(bridge, rows, size, method, replicates, seed)), rows)
        for bridge in models
    )
    return BoundComparison(method, a, b)


def _bounds(
    bridge: Bridge, rows: NoisedRows, size: int | None, method: str, replicates: int, seed: int
) -> Iterator[tuple[Tensor, Nats]]:
    """Yield the rows of each batch and their NELBO."""
    for number, batch in enumerate(rows.batches):
        draws = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        bound = nelbo(
            bridge, batch.ids, size, method, replicates=replicates, seed=draws, max_states=_PATTERNS
        )
        yield batch.rows, bound


def _add_to_texts(bounds: list[tuple[Tensor, Nats]], rows: NoisedRows) -> Nats:
    """Add the nats of rows to their texts."""
    numbers = torch.cat([numbers for numbers, _ in bounds])
    owner, size = rows.texts[numbers], 1 + int(rows.texts.max())
    values = torch.cat([nats.replicates for _, nats in bounds], dim=1)
    tokens = torch.cat([nats.token_counts for _, nats in bounds])
    return Nats(
        kind=bounds[0][1].kind,
        replicates=torch.zeros(len(values), size, dtype=values.dtype).index_add_(1, owner, values),
        token_counts=torch.zeros(size, dtype=tokens.dtype).index_add_(0, owner, tokens),
    )
