"""Linear probes with position regressed out, from sums alone.

Activations and labels are taken about their mean at each position of the training texts. Given
samples z = [x, e] with e the one-hot position, all sums that this needs are in those of z::

    x - M e = A z,    A = [I, -M],    M = mean of x at each position

so ``S_xx`` becomes ``A S_zz A^T``, and so on (Frisch, Waugh and Lovell).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.by_depth.ridge import Ridge, Sums

_NOTHING_LEFT = 1e-9  # share of a label's variance that is rounding


def plain_ridge(ridge: Ridge, d: int) -> Ridge:
    """Return the probe without the one-hot positions, which follow the first ``d`` columns."""
    parts = []
    for part in ridge.parts:
        xx, xy, x = _known(part)
        parts.append(Sums(part.n, x[:d], part.y, xx[:d, :d], xy[:d], part.yy))
    return Ridge(parts)


def controlled_ridge(ridge: Ridge, d: int) -> Ridge:
    """Return the probe of activations and labels about their training means at each position.

    Positions that no training text has are taken about the mean over all positions.
    """
    train = ridge.parts[0]
    xx, xy, x = _known(train)
    assert train.y is not None
    count = xx.diagonal()[d:]
    seen = count > 0
    means_x = torch.where(seen, xx[:d, d:] / count, x[:d, None] / train.n)
    means_y = torch.where(seen[:, None], xy[d:] / count[:, None], train.y / train.n)
    change = torch.cat([torch.eye(d, dtype=xx.dtype), -means_x], dim=1)
    parts = []
    for part in ridge.parts:
        xx, xy, x = _known(part)
        assert part.y is not None and part.yy is not None
        at = xx.diagonal()[d:, None]
        parts.append(
            Sums(
                part.n,
                change @ x,
                part.y - (at * means_y).sum(0),
                change @ xx @ change.T,
                change @ (xy - xx[:, d:] @ means_y),
                part.yy - 2 * (means_y * xy[d:]).sum(0) + (at * means_y.square()).sum(0),
            )
        )
    return Ridge(parts)


def controlled_r2(ridge: Ridge, d: int) -> Float[Tensor, " label"]:
    """Compute R^2 on the test part with position regressed out, for each column of labels.

    It is 0 where position alone decides the label, and NaN where all labels are the same.
    """
    controlled = controlled_ridge(ridge, d)
    before, after = _spread(ridge.parts[2]), _spread(controlled.parts[2])
    r2 = torch.where(after <= _NOTHING_LEFT * before, 0.0, controlled.r2())
    same = before <= 1e-12 * (ridge.parts[2].yy if ridge.parts[2].yy is not None else before)
    return r2.masked_fill(same, torch.nan)


def _spread(part: Sums) -> Float[Tensor, " label"]:
    assert part.y is not None and part.yy is not None
    return part.yy - part.y.square() / part.n


def _known(part: Sums) -> tuple[Tensor, Tensor, Tensor]:
    assert part.xx is not None and part.xy is not None and part.x is not None
    return part.xx, part.xy, part.x
