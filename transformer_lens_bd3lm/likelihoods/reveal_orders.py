"""Sums over all reveal orders of a block, by a dynamic program over subsets of its places.

Write ``p(x_i | R)`` for the network's probability of the true token at place i when the set R of
the block's k maskable places is revealed and the others are masked. First hitting reveals in a
uniformly random order, so the probability of a block is a mixture over orders::

    F({}) = 1,   F(S) = sum_{i in S} F(S - i) p(x_i | S - i) / (k - |S| + 1),   p(x) = F(all)
    G(all) = 1,  G(R) = sum_{i not in R} p(x_i | R) G(R + i) / (k - |R|)

    gamma(R, i) = F(R) p(x_i | R) G(R + i) / ((k - |R|) p(x))       posterior of revealing i from R

The NELBO (Arriola et al., section 3) is the mean over all orders of the log, in closed form::

    NELBO = sum_m 1/m * mean_{|M| = m} sum_{i in M} -log p(x_i | not M)

It runs no network.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class RevealOrders:
    """Sums over all reveal orders of blocks with k maskable places each.

    Attributes:
        log_p: ``log p(x_i | R)`` for every set R of revealed places (bit i of its number is place
            i) and place i outside it ``[block, 2^k, k]``, nats; anything where i is in R.
    """

    log_p: Float[Tensor, "block set place"]

    @property
    def k(self) -> int:
        """Number of maskable places."""
        return self.log_p.shape[-1]

    def _sets(self, size: int) -> tuple[Int[Tensor, " level"], Int[Tensor, "level member"]]:
        """Return the numbers of all sets of ``size`` places, and the members of each."""
        numbers = torch.arange(2**self.k)
        bits = (numbers[:, None] >> torch.arange(self.k)) & 1
        chosen = numbers[bits.sum(-1) == size]
        return chosen, bits[chosen].nonzero()[:, 1].view(len(chosen), size)

    def log_f(self) -> Float[Tensor, "block set"]:
        """Compute ``log F(R)`` of every set R, nats: the probability of having revealed R."""
        result = torch.zeros_like(self.log_p[..., 0])
        for size in range(1, self.k + 1):
            sets, members = self._sets(size)
            before = sets[:, None] ^ (1 << members)
            terms = result[:, before] + self.log_p[:, before, members]
            result[:, sets] = terms.logsumexp(-1) - math.log(self.k - size + 1)
        return result

    def log_g(self) -> Float[Tensor, "block set"]:
        """Compute ``log G(R)`` of every set R, nats: the probability of the tokens outside R."""
        result = torch.zeros_like(self.log_p[..., 0])
        everything = 2**self.k - 1
        for left in range(1, self.k + 1):
            missing_sets, missing = self._sets(left)
            sets = everything ^ missing_sets
            after = sets[:, None] | (1 << missing)
            terms = result[:, after] + self.log_p[:, sets[:, None], missing]
            result[:, sets] = terms.logsumexp(-1) - math.log(left)
        return result

    def _masked(self) -> Bool[Tensor, "set place"]:
        """Return which places are still masked when a set is revealed."""
        return ((torch.arange(2**self.k)[:, None] >> torch.arange(self.k)) & 1) == 0

    def gamma(self) -> Float[Tensor, "block set place"]:
        """Compute the posterior, given the text, of revealing i from R; 0 where i is in R."""
        log_f, log_g, masked = self.log_f(), self.log_g(), self._masked()
        after = torch.arange(2**self.k)[:, None] | (1 << torch.arange(self.k))
        left = masked.sum(-1, keepdim=True).clamp(min=1).double()
        path = log_f[..., None] + self.log_p + log_g[:, after] - left.log()
        return (path - log_f[:, -1:, None]).exp().masked_fill(~masked, 0.0)

    def bound_weights(self) -> Float[Tensor, "set place"]:
        """Return ``1 / (m C(k, m))``, the weight of each NELBO term, at m masked places; else 0."""
        masked = self._masked()
        m = masked.sum(-1).tolist()
        weights = torch.tensor(
            [1 / (n * math.comb(self.k, n)) if n else 0.0 for n in m], dtype=torch.float64
        )
        return weights[:, None] * masked

    def by_rank(self, terms: Float[Tensor, "block set place"]) -> Float[Tensor, "block place rank"]:
        """Sum terms over all sets of one size: rank r is the reveal from r revealed places."""
        return torch.stack([terms[:, self._sets(size)[0]].sum(1) for size in range(self.k)], -1)
