"""The NELBO of texts by number of masks left, and by ranges of t, under hooks.

The NELBO of a block of k maskable tokens (Arriola et al., section 3) is an integral over t; a
pattern of m masks has the weight t^m (1 - t)^(k - m) / t. Over all t, and from a to b::

    L = sum_m L_m,    L_m = 1/m * mean_{|M| = m} sum_{i in M} -log p(x_i | not M)
    L[a, b] = sum_m L_m * (P(m or more of k are masked at b) - P(m or more of k are masked at a))

The second line is exact: the weight of m masks over [a, b] is an incomplete beta integral, whose
share of the whole is a difference of two binomial tails.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.mask_draws import stratified
from transformer_lens_bd3lm.likelihoods.masked_passes import read_masked_passes


@dataclass(frozen=True)
class MaskLosses:
    """NELBO of texts of one length by block and number of masks left, nats, float64.

    Attributes:
        by_masks: ``L_m`` of each block, from one mask on ``[batch, block, masks]``.
        nll: exact NLL of each text ``[batch]``; None for an estimate.
        maskable: k of each block ``[block]``; 0 where all is given.
        trained_at: as in :class:`.Exact`.
    """

    by_masks: Float[Tensor, "batch block masks"]
    nll: Float[Tensor, " batch"] | None
    maskable: Int[Tensor, " block"]
    trained_at: tuple[int, ...]

    def by_time(self, times: Sequence[float]) -> Float[Tensor, "batch range"]:
        """Return the NELBO over each range between successive times, nats a text."""
        tails = torch.stack([binomial_tails(self.maskable, t) for t in times])
        shares = tails.diff(dim=0)
        return torch.einsum("bkm,rkm->br", self.by_masks[..., : shares.shape[-1]], shares)


def binomial_tails(k: Int[Tensor, " block"], t: float) -> Float[Tensor, "block masks"]:
    """Return P(m or more of k tokens are masked) at time t, for m = 1 .. the largest k."""
    most = max(int(k.max()), 1)
    m, n = torch.arange(most + 1, dtype=torch.float64), k.double()[:, None]
    left = (n - m).clamp(min=0)
    time = torch.tensor(t, dtype=torch.float64)
    log_p = torch.xlogy(m, time) + torch.xlogy(left, 1 - time)
    log_p = log_p + (n + 1).lgamma() - (m + 1).lgamma() - (left + 1).lgamma()
    p = log_p.exp().masked_fill(m > n, 0.0)
    return p.flip(-1).cumsum(-1).flip(-1)[:, 1:]


def mask_losses(
    bridge: Bridge,
    ids: Int[Tensor, "batch pos"],
    block_size: Any,
    hooks: list[Any],
    scope: str,
    method: str,
    replicates: int,
    seed: int,
    max_states: int,
    rows: int,
) -> MaskLosses:
    """Compute the losses of texts of one length; the arguments of :func:`.exact` and `nelbo`.

    Raises:
        InputError, HookNameError, HookReturnError, NotExactError: as :func:`.exact`.
    """
    if method == "exact":
        result = exact(
            bridge, ids, block_size, hooks, scope=scope, max_states=max_states, rows=rows
        )
        size, counted = result.block_size, result.counted
        by_rank = cut_blocks(result.nelbo_by_rank.transpose(1, 2), size).sum(-1).transpose(1, 2)
        maskable = cut_blocks(counted[0], size).sum(-1)
        rank = maskable[:, None] - torch.arange(1, size + 1)
        by_masks = by_rank.gather(-1, rank.clamp(min=0).expand_as(by_rank))
        by_masks = by_masks.masked_fill(rank < 0, 0.0)
        return MaskLosses(by_masks, result.nll, maskable, result.trained_at)
    passes = read_masked_passes(bridge, ids, block_size, hooks, scope, rows)
    generator = torch.Generator().manual_seed(seed)
    draws = [stratified(passes, generator) for _ in range(replicates)]
    masked, weight = (torch.cat([getattr(x, n) for x in draws]) for n in ("masked", "weight"))
    loss = cut_blocks(-weight * passes.log_probs(masked), passes.block_size).sum(-1)
    by_masks = loss.unflatten(0, (replicates, -1)).mean(0).permute(1, 2, 0)
    by_masks = F.pad(by_masks, (0, passes.block_size - by_masks.shape[-1]))
    maskable = passes.by_block(passes.counted[0]).sum(-1)
    return MaskLosses(by_masks, None, maskable, passes.trained_at)


def cut_blocks(x: Tensor, size: int) -> Tensor:
    """Cut the last axis into blocks; the last one is filled up with zeros."""
    return F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
