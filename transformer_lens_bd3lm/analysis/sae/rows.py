"""Sums over the rows of a hook point while a likelihood runs, by masks left.

A row is a counted position of a text under a mask pattern. Rows are weighted as under a uniform t,
given that their block has a mask: each number m of masks left in a block, 1..k, is equally likely,
and so is each pattern of m masks. Rows of blocks without a mask are not counted. A random pattern
that is drawn twice for all texts of a pass runs once, and its rows count once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.sae.losses import cut_blocks

Values = dict[str, Tensor]
Seen = Callable[[Tensor, Any], tuple[Tensor | None, Values]]


@dataclass
class RowReader:
    """Reader of the rows of one hook point, over passes of texts of one length after another.

    Attributes:
        name: the hook point.
        mask_id: id of the mask token.
        seen: function of ``(activation, hook)`` that returns what replaces the activation, or None,
            and values of its rows ``[batch, pos, value]``. Of features, ``"active"``, their number
            is added up.
        most: largest number of masks in a block.
        totals: weighted sums of each value ``[masks left - 1, revealed or masked, value]``,
            float64; ``"weight"`` is the sum of the weights.
        ever: which features, the values ``"active"``, were ever not 0; None without them.
    """

    name: str
    mask_id: int
    seen: Seen
    most: int
    totals: Values = field(default_factory=dict)
    ever: Bool[Tensor, " d_sae"] | None = None
    _size: int = 0
    _masked: Bool[Tensor, "row pos"] | None = None
    _cell: Int[Tensor, "row pos"] | None = None
    _k: Tensor = field(default_factory=lambda: torch.zeros(0))
    _of: Tensor = field(default_factory=lambda: torch.zeros(0))
    _patterns: Tensor = field(default_factory=lambda: torch.zeros(0))
    _sums: Values = field(default_factory=dict)

    @property
    def ever_active(self) -> Bool[Tensor, " d_sae"]:
        """Which features were active at some counted row."""
        return torch.zeros(0, dtype=torch.bool) if self.ever is None else self.ever

    def hooks(self, size: int, length: int) -> list[tuple[str, Any]]:
        """Return hooks ``[(name, fn)]`` of passes over texts of one length, in blocks of a size."""
        counted = cut_blocks(torch.arange(length) > 0, size).sum(-1)
        self._size, (self._k, self._of) = size, counted.unique(return_inverse=True)
        self._patterns = torch.zeros(len(self._k), size + 1, dtype=torch.float64)
        self._sums = {}
        return [("embed.hook_in", self._see_ids), (self.name, self._see)]

    def _see_ids(self, ids: Tensor, hook: Any) -> None:
        """Note which cell each row of the pass belongs to; a clean stream has no masks."""
        masked, size = (ids == self.mask_id).cpu(), self._size
        self._masked = masked if bool(masked.any()) else None
        if self._masked is None:
            return
        left = cut_blocks(masked, size).sum(-1)
        block = self._of * (size + 1) + left
        self._patterns.view(-1).index_add_(0, block.flatten(), torch.ones(block.numel()).double())
        self._cell = 2 * block.repeat_interleave(size, 1)[:, : ids.shape[1]] + masked

    def _see(self, activation: Tensor, hook: Any) -> Tensor | None:
        edited, values = self.seen(activation, hook)
        if self._masked is None or self._cell is None:
            return edited
        cell = self._cell[:, 1:].flatten()
        counted = cell % (2 * (self._size + 1)) > 1  # at least one mask left
        for name, value in values.items():
            rows = value[:, 1:].flatten(0, 1).cpu()
            if name == "active":
                rows = rows != 0
                ever = rows[counted].flatten(0, -2).any(0)
                self.ever = ever if self.ever is None else self.ever | ever
                rows = rows.flatten(1).sum(-1, keepdim=True)
            shape = (self._patterns.numel() * 2, rows.shape[-1])
            sums = self._sums.setdefault(name, torch.zeros(shape, dtype=torch.float64))
            sums.index_add_(0, cell, rows.double())
        return edited

    def close(self, batch: int) -> None:
        """Weight the sums of these texts, ``batch`` of them, and add them to the totals."""
        blocks = torch.bincount(self._of, minlength=len(self._k)).double()
        weight = (batch * blocks / self._k)[:, None] / self._patterns
        fits = (self._patterns > 0) & (torch.arange(self._size + 1) > 0) & (self._k > 0)[:, None]
        weight = weight.masked_fill(~fits, 0.0)[..., None, None]
        for name, sums in self._sums.items():
            cells = sums.view(len(self._k), self._size + 1, 2, -1)
            total = (weight * cells).sum(0)[1:]
            total = F.pad(total, (0, 0, 0, 0, 0, self.most - len(total)))
            self.totals[name] = self.totals.get(name, torch.zeros_like(total)) + total


def spread(totals: Values, cells: Any) -> Float[Tensor, ""]:
    """Return the sum of squared distances to the mean of the rows in some cells; NaN if none."""
    weight, x, square = (totals[name][cells].flatten(0, -2).sum(0) for name in _MOMENTS)
    about = (square - x.square().sum() / weight)[0]
    return about.where(about > 1e-12 * square[0], torch.nan)


def mean_row(totals: Values) -> Float[Tensor, " d"]:
    """Return the mean activation over all rows."""
    return totals["x"].sum((0, 1)) / totals["weight"].sum()


def moments(x: Float[Tensor, "batch pos *head d"]) -> Values:
    """Return what the variance of rows is computed from; heads are rows of their own."""
    rows = x.double().flatten(2, -2) if x.ndim > 3 else x.double()[:, :, None]
    ones = torch.full((*x.shape[:2], 1), rows.shape[2], dtype=torch.float64, device=x.device)
    return {"weight": ones, "x": rows.sum(2), "square": rows.square().sum((2, 3))[..., None]}


_MOMENTS = ("weight", "x", "square")
