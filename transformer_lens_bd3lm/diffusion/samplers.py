"""Who is revealed next, and as what: pure functions of the block's state and its noise.

**First hitting** (Zheng et al. 2024; Arriola et al., section 4.2): the reveal times of n masked
tokens are iid U(0, 1), so the next reveal below t is at ``t * u^(1/n)``, and which of the masked it
is, is uniform. Handed the times themselves, that is: the masked token with the largest time is
next. Exact, k steps for k tokens.

**Nucleus.** The public code keeps tokens while the cumulative probability is at most p, and so
drops the token that crosses p (the top one is always kept); the usual top-p keeps it. Both are
here, by name.

A sampler never sees the network; the loop hands it log-probabilities and does what it says.
"""

from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError


@runtime_checkable
class Sampler(Protocol):
    """What the denoising loop asks of a sampler; every method is pure."""

    def next_time(
        self, masked: Bool[Tensor, "batch block"], times: Float[Tensor, "batch block"]
    ) -> Float[Tensor, " batch"]:
        """The time of the next reveal; the network sees this t."""
        ...

    def reveal(
        self,
        masked: Bool[Tensor, "batch block"],
        times: Float[Tensor, "batch block"],
        t: Float[Tensor, " batch"],
    ) -> Bool[Tensor, "batch block"]:
        """Which masked positions become tokens in the step at ``t``."""
        ...

    def propose(self, log_p: Float[Tensor, " d_vocab"], gumbels: Float[Tensor, " d_vocab"]) -> int:
        """The token that a position is revealed as."""
        ...


def nucleus(
    log_p: Float[Tensor, "*dims d_vocab"],
    p: float,
    kind: Literal["usual", "public"] = "usual",
) -> Float[Tensor, "*dims d_vocab"]:
    """Log-probabilities restricted to the nucleus of mass p, renormalised.

    Args:
        log_p: log-probabilities in nats.
        p: mass kept, in (0, 1]; 1 keeps everything.
        kind: ``"usual"`` keeps the token that crosses p; ``"public"`` drops it, as the public BD3LM
            code does, and always keeps the top one.
    """
    if p >= 1.0:
        return log_p
    ordered, order = log_p.exp().sort(dim=-1, descending=True)
    cumulative = ordered.cumsum(-1)
    keep = cumulative <= p if kind == "public" else cumulative - ordered < p
    keep[..., 0] = True
    kept = torch.zeros_like(keep).scatter(-1, order, keep)
    return log_p.masked_fill(~kept, -torch.inf).log_softmax(-1)


@dataclass(frozen=True)
class FirstHitting:
    """One token a step a row, in decreasing order of reveal times: exactly the model's sampler.

    Attributes:
        nucleus_p: mass of the nucleus each token is drawn from; 1 draws from the model's own p.
        nucleus: which definition, see :func:`nucleus`.
    """

    nucleus_p: float = 1.0
    nucleus: Literal["usual", "public"] = "usual"

    def __post_init__(self) -> None:
        if not 0.0 < self.nucleus_p <= 1.0:
            raise InputError(f"nucleus_p={self.nucleus_p}: give a probability mass in (0, 1]")
        if self.nucleus not in ("usual", "public"):
            raise InputError(f'nucleus={self.nucleus!r}: give "usual" or "public"')

    def next_time(
        self, masked: Bool[Tensor, "batch block"], times: Float[Tensor, "batch block"]
    ) -> Float[Tensor, " batch"]:
        """The largest time of a masked token; 0 in a row that has none left."""
        return times.masked_fill(~masked, 0.0).amax(-1)

    def reveal(
        self,
        masked: Bool[Tensor, "batch block"],
        times: Float[Tensor, "batch block"],
        t: Float[Tensor, " batch"],
    ) -> Bool[Tensor, "batch block"]:
        """The masked token whose time it is."""
        first = times.masked_fill(~masked, -1.0).argmax(-1, keepdim=True)
        return torch.zeros_like(masked).scatter(-1, first, True) & masked

    def propose(self, log_p: Float[Tensor, " d_vocab"], gumbels: Float[Tensor, " d_vocab"]) -> int:
        """Gumbel-max in float64."""
        return int((nucleus(log_p, self.nucleus_p, self.nucleus) + gumbels).argmax())
