"""Samplers: which mask is revealed next, and as which token, from a block's state and its noise.

Every masked (row, position) has a reveal time tau ~ U(0, 1), and time runs from 1 down to 0.

**First hitting** (Zheng et al. 2024; Arriola et al., section 4.2): the next reveal below t is at
``t * u^(1/n)``, of one of the n masked tokens, each as likely. With the times themselves given, the
masked token with the largest tau is next. Exact, k steps for k tokens.

**Ancestral** (Sahoo et al. 2024): T steps from 1 to 0; from t to s a masked token is revealed with
probability ``1 - s/t``, that is when its tau lies in [s, t). A step in which nothing is revealed
would change nothing, and is not run. With c constant it writes the same tokens as first
hitting unless two taus of a block share a step.

**Confidence**: the most confident tokens first (as LLaDA and Dream decode). No likelihood is known
for it; it is not the model's own sampler.

Tokens are drawn by Gumbel-max: ``argmax(log p + g)`` is a sample from p. Temperature divides log p
first, then the nucleus is taken. The public code keeps tokens while the cumulative probability is
at most p, and so drops the token that crosses p (the top one is always kept); the usual top-p
keeps it. Both are here, by name.

A sampler never sees the network; the loop hands it log-probabilities and does what it says.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from transformer_lens_bd3lm.checks import check_choice, check_int, check_number
from transformer_lens_bd3lm.errors import InputError

LogProbs = Callable[[], Float[Tensor, "masked d_vocab"]]


@runtime_checkable
class Sampler(Protocol):
    """Methods that the denoising loop calls on a sampler; give ``denoise`` any object with them.

    Every method is pure: the same arguments give the same result, and all randomness is in
    ``times`` and ``gumbels``, which the loop takes from :class:`Noise`. So two runs with the same
    noise differ only by what was changed. Tensors are on the CPU, in float64 or bool.

    Time runs from 1, where a block is all masks, to 0. Under the log-linear schedule (Sahoo et al.
    2024) a token is masked at time t with probability ``1 - alpha_t = t``, so that its reveal time
    is uniform on [0, 1); ``times`` are those.

    Raises:
        InputError: from :func:`denoise`, for an object that lacks one of the methods, and for a
            sampler that reveals nothing although masks are left.
    """

    def next_time(
        self, masked: Bool[Tensor, "batch block"], times: Float[Tensor, "batch block"]
    ) -> Float[Tensor, " batch"]:
        """Return the time of the next step, which the network reads as sigma.

        Args:
            masked: positions that are still masked ``[batch, block]``.
            times: reveal time of each position ``[batch, block]``.

        Returns:
            t ``[batch]`` in [0, 1]; 0 in a row that has no mask left.
        """
        ...

    def reveal(
        self,
        masked: Bool[Tensor, "batch block"],
        times: Float[Tensor, "batch block"],
        t: Float[Tensor, " batch"],
        log_p: LogProbs,
    ) -> Bool[Tensor, "batch block"]:
        """Return which masked positions become tokens in a step.

        Args:
            masked: positions that may be revealed ``[batch, block]``.
            times: reveal time of each position ``[batch, block]``.
            t: time of the step ``[batch]``.
            log_p: returns the network's log-probabilities in nats ``[masked, d_vocab]`` of the
                positions in ``masked``, in row-major order; call it only if the choice depends on
                them.

        Returns:
            positions to reveal ``[batch, block]``, at least one in the batch.
        """
        ...

    def end_of(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time at which a step ends: a token masked after it has a smaller reveal time.

        A fork goes on from this time, with new noise scaled by it.

        Args:
            t: time of the step ``[batch]``.

        Returns:
            the time of its end ``[batch]``, at most ``t``.
        """
        ...

    def scores(
        self, log_p: Float[Tensor, "token d_vocab"], gumbels: Float[Tensor, "token d_vocab"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Return the score of each token; a position becomes the token of the largest.

        With ``log_p + gumbels`` the token is a sample from ``exp(log_p)`` (Gumbel-max).

        Args:
            log_p: the network's log-probabilities in nats ``[token, d_vocab]``, a row for each
                position that is revealed.
            gumbels: standard Gumbel variables ``[token, d_vocab]``.

        Returns:
            scores ``[token, d_vocab]``, -inf where a token must not be drawn.
        """
        ...


def nucleus(
    log_p: Float[Tensor, "*dims d_vocab"],
    p: float,
    kind: Literal["usual", "public"] = "usual",
) -> Float[Tensor, "*dims d_vocab"]:
    """Return log-probabilities restricted to the nucleus of mass p, and normalized again.

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


def ancestral_update(
    log_p: Float[Tensor, "*dims d_vocab"], t: float, s: float, mask_id: int
) -> Float[Tensor, "*dims d_vocab"]:
    """Compute ``q(x_s | x_t)`` of a masked token: it stays masked with probability s/t, else p.

    The distribution of one ancestral update from t to s < t (Sahoo et al. 2024, equation 7).

    Args:
        log_p: what a revealed token is drawn from, in nats; the mask has probability 0 in it.
        t: time before the update, in (0, 1].
        s: time after it.
        mask_id: the mask token's id.

    Raises:
        InputError: unless 0 <= s < t <= 1.
    """
    if not 0.0 <= s < t <= 1.0:
        raise InputError(f"t={t}, s={s}: an update goes from t to s, with 0 <= s < t <= 1")
    q = log_p.exp() * (1 - s / t)
    q[..., mask_id] = s / t
    return q


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How a token is drawn once its position is revealed; all samplers share it.

    Attributes:
        temperature: divides log p; 1 is the model's own distribution, 0 its argmax.
        nucleus_p: mass of the nucleus each token is drawn from; 1 keeps everything.
        nucleus: which definition, see :func:`nucleus`.
    """

    temperature: int | float = 1.0
    nucleus_p: int | float = 1.0
    nucleus: Literal["usual", "public"] = "usual"

    def __post_init__(self) -> None:
        rule = "give a finite number >= 0; 0 is the argmax"
        check_number("temperature", self.temperature, 0.0, sys.float_info.max, rule)
        rule = "give a probability mass in (0, 1]"
        check_number("nucleus_p", self.nucleus_p, math.ulp(0.0), 1.0, rule)
        check_choice("nucleus", self.nucleus, ("usual", "public"))

    def distribution(self, log_p: Float[Tensor, "*dims d_vocab"]) -> Float[Tensor, "*dims d_vocab"]:
        """Return log-probabilities after temperature and nucleus, in nats."""
        if self.temperature == 0:
            best = log_p.argmax(-1, keepdim=True)
            return torch.full_like(log_p, -torch.inf).scatter(-1, best, 0.0)
        if self.temperature != 1:
            # From the likeliest token down, so that a tiny temperature divides it as 0, not -inf.
            below = log_p - log_p.amax(-1, keepdim=True)
            log_p = (below / self.temperature).log_softmax(-1)
        return nucleus(log_p, self.nucleus_p, self.nucleus)

    def scores(
        self, log_p: Float[Tensor, "token d_vocab"], gumbels: Float[Tensor, "token d_vocab"]
    ) -> Float[Tensor, "token d_vocab"]:
        """Return ``log p + g`` after temperature and nucleus; log p alone at temperature 0."""
        return log_p if self.temperature == 0 else self.distribution(log_p) + gumbels


@dataclass(frozen=True)
class FirstHitting(Drawing):
    """First-hitting sampler: one token a step in each row, in decreasing order of reveal times.

    Exact: the distribution of the text is that of the model (Zheng et al. 2024; Arriola et al.,
    section 4.2), with k steps for a block of k tokens.

    Attributes:
        temperature: divides log-probabilities; 0 is the argmax.
        nucleus_p: mass that is kept, in (0, 1].
        nucleus: ``"usual"`` keeps the token that crosses the mass, ``"public"`` drops it.

    Raises:
        InputError: for a value outside its range.
    """

    def next_time(
        self, masked: Bool[Tensor, "batch block"], times: Float[Tensor, "batch block"]
    ) -> Float[Tensor, " batch"]:
        """Return the largest reveal time of a masked token; 0 in a row that has none left."""
        return times.masked_fill(~masked, 0.0).amax(-1)

    def reveal(
        self,
        masked: Bool[Tensor, "batch block"],
        times: Float[Tensor, "batch block"],
        t: Float[Tensor, " batch"],
        log_p: LogProbs,
    ) -> Bool[Tensor, "batch block"]:
        """Return the masked position with the largest reveal time, in each row."""
        first = times.masked_fill(~masked, -1.0).argmax(-1, keepdim=True)
        return torch.zeros_like(masked).scatter(-1, first, True) & masked

    def end_of(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time of the reveal itself."""
        return t


@dataclass(frozen=True)
class Ancestral(Drawing):
    """Ancestral sampler: T steps a block, at t = 1, (T-1)/T, ..., 1/T; tokens may share a step.

    From t to s = t - 1/T a masked token is revealed with probability ``1 - s/t`` (Sahoo et al.
    2024, equation 7).

    Attributes:
        steps: T. The smaller, the more tokens of a block are drawn independently of each other.
        temperature: as in :class:`FirstHitting`, and so are ``nucleus_p`` and ``nucleus``.

    Raises:
        InputError: for a value outside its range.
    """

    steps: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("steps", self.steps, 1)

    def _slot(self, times: Float[Tensor, "*dims"]) -> Float[Tensor, "*dims"]:
        return (times * self.steps).floor().clamp(max=self.steps - 1)

    def next_time(
        self, masked: Bool[Tensor, "batch block"], times: Float[Tensor, "batch block"]
    ) -> Float[Tensor, " batch"]:
        """Return the start of the next step that reveals something; 0 in a row with none left."""
        t = (self._slot(times.masked_fill(~masked, 0.0).amax(-1)) + 1) / self.steps
        return t.masked_fill(~masked.any(-1), 0.0)

    def reveal(
        self,
        masked: Bool[Tensor, "batch block"],
        times: Float[Tensor, "batch block"],
        t: Float[Tensor, " batch"],
        log_p: LogProbs,
    ) -> Bool[Tensor, "batch block"]:
        """Return the masked positions whose reveal time lies in the step."""
        latest = times.masked_fill(~masked, 0.0).amax(-1, keepdim=True)
        return masked & (self._slot(times) == self._slot(latest))

    def end_of(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return t - 1/T, the time at which the step ends."""
        return (t - 1 / self.steps).clamp(min=0.0)


@dataclass(frozen=True)
class Confidence(Drawing):
    """Sampler that reveals the most confident tokens first: k a step, or all above a threshold.

    Confidence is computed from the model's own probabilities, before temperature and nucleus. The t
    of a step is the fraction of the block that is masked. No likelihood is known for this order.

    Attributes:
        by: ``"probability"`` of the likeliest token, ``"margin"`` between the two likeliest (in
            probability), or ``"entropy"``: its negative, in nats.
        k: tokens revealed per step in each row.
        threshold: instead of k, every token at least this confident, and always the most confident.
        temperature: as in :class:`FirstHitting`, and so are ``nucleus_p`` and ``nucleus``.

    Raises:
        InputError: for a value outside its range, and ``k`` beside ``threshold``.
    """

    by: Literal["probability", "margin", "entropy"] = "probability"
    k: int = 1
    threshold: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("by", self.by, ("probability", "margin", "entropy"))
        check_int("k", self.k, 1)
        if self.threshold is None:
            return
        if self.k != 1:
            raise InputError(f"k={self.k} and threshold={self.threshold}: give one of the two")
        biggest = sys.float_info.max
        check_number("threshold", self.threshold, -biggest, biggest, "give a finite number")

    def confidence(self, log_p: Float[Tensor, "masked d_vocab"]) -> Float[Tensor, " masked"]:
        """Return the network's confidence at each position, by the rule of ``by``."""
        p = log_p.exp()
        if self.by == "probability":
            return p.amax(-1)
        if self.by == "margin":
            top = p.topk(2, dim=-1).values
            return top[:, 0] - top[:, 1]
        return torch.special.xlogy(p, p).sum(-1)

    def next_time(
        self, masked: Bool[Tensor, "batch block"], times: Float[Tensor, "batch block"]
    ) -> Float[Tensor, " batch"]:
        """Return the fraction of the block that is masked."""
        return masked.sum(-1).to(times.dtype) / masked.shape[-1]

    def reveal(
        self,
        masked: Bool[Tensor, "batch block"],
        times: Float[Tensor, "batch block"],
        t: Float[Tensor, " batch"],
        log_p: LogProbs,
    ) -> Bool[Tensor, "batch block"]:
        """Return the k most confident positions of a row, or those above the threshold."""
        confidence = torch.full(masked.shape, -torch.inf, dtype=torch.float64)
        confidence[masked] = self.confidence(log_p())
        order = confidence.sort(dim=-1, descending=True, stable=True).indices
        rank = order.argsort(-1)
        if self.threshold is None:
            return masked & (rank < self.k)
        return masked & ((rank == 0) | (confidence >= self.threshold))

    def end_of(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return t itself: the order does not come from the reveal times."""
        return t


# Samplers that a saved run holds by name and fields.
SAMPLERS = {kind.__name__: kind for kind in (FirstHitting, Ancestral, Confidence)}
