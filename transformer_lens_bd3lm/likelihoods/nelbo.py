"""The bound on a text's likelihood: exact, or estimated, and always by its name.

The NELBO of a block of k maskable tokens (Arriola et al., section 3) is an integral over t of the
loss of a random mask, each token masked with probability t, at weight 1/t. Three ways to it::

    exact        sum over all 2^k - 1 masks, in closed form                          no error
    stratified   sum_m 1/m * sum_{i in M} -log p(x_i | not M), one random |M| = m    unbiased
    monte_carlo  one t a block, one mask, weight 1/t                                 unbiased

Monte Carlo spreads its t over strata, one a block, and permutes the strata over blocks: with the
public code's assignment (the j-th stratum always to the j-th block) early blocks always get low t,
and since early blocks are harder the estimate is biased for a given text. It is here by name.

``clip`` names four different things that are called clipping; each changes what is estimated:

- ``Clip("t", a, b)``: t is drawn from U[a, b] (training with less variance), weight 1/t.
- ``Clip("unweighted", a, b)``: as ``"t"``, with weight 1 in place of 1/t.
- ``Clip("resample", a, b)``: as ``"t"``, and at that t the mask is drawn again until the block's
  masked fraction is in [a, b]. It is the public code's ``resample``: BOS is a position like any
  other, drawn and counted in the fraction, and is given back afterwards. (Beyond a = 1/2 the public
  code also drops the weight.)
- ``Clip("fraction", a, b)``: t is drawn from U[0, 1], and t and mask are drawn again, together,
  until the masked fraction of the block's maskable positions is in [a, b].

Draws of one replicate depend on each other; standard errors come from independent replicates.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.exact import read_states, summed
from transformer_lens_bd3lm.likelihoods.masked_passes import NoisyText, read_noisy_text
from transformer_lens_bd3lm.likelihoods.statistics import Nats


@dataclass(frozen=True)
class Clip:
    """A named way to leave out extreme masks; every one of them is no longer the bound.

    Attributes:
        kind: see the module.
        low: a.
        high: b.
    """

    kind: Literal["t", "unweighted", "resample", "fraction"]
    low: float
    high: float

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("t", "unweighted", "resample", "fraction"))
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"low={self.low}, high={self.high}: give 0 <= low < high <= 1")


@dataclass(frozen=True, kw_only=True, repr=False)
class Nelbo(Nats):
    """The NELBO of some texts, or an estimate of it, in nats.

    Attributes:
        method: how it was made; ``kind`` says what that makes of it.
        tokens: the texts ``[batch, pos]``.
        block_size: the dial.
        counted: positions that have a likelihood ``[batch, pos]``: all but those given.
        by_token: what each token adds ``[batch, pos]``, mean over replicates.
    """

    method: str
    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    block_size: int
    counted: Bool[Tensor, "batch pos"] = field(repr=False)
    by_token: Float[Tensor, "batch pos"] = field(repr=False)

    def __repr__(self) -> str:
        return f"Nelbo(block_size={self.block_size}, {self.method}: {self.figures()})"


@dataclass(frozen=True)
class Masks:
    """Masks to look under, and the weight of each masked position's ``-log p``."""

    masked: Bool[Tensor, "pattern batch pos"]
    weight: Float[Tensor, "pattern batch pos"]


def by_block(counted: Bool[Tensor, "batch pos"], size: int) -> Bool[Tensor, "batch block place"]:
    """Maskable places block by block; the last block filled up with places that are none."""
    missing = -counted.shape[1] % size
    return torch.nn.functional.pad(counted, (0, missing)).unflatten(1, (-1, size))


def stratified(text: NoisyText, generator: torch.Generator) -> Masks:
    """One random mask of every number m, weight 1/m: pattern m - 1 has m in every block."""
    counted = by_block(text.counted, text.block_size)
    k = counted.sum(-1)
    patterns, shape = int(k.max()), counted.shape
    draw = torch.rand(patterns, *shape, generator=generator, dtype=torch.float64)
    rank = draw.masked_fill(~counted, 2.0).argsort(-1).argsort(-1)
    m = torch.arange(1, patterns + 1)[:, None, None, None]
    masked = (rank < m) & (m <= k[..., None]) & counted
    return whole(text, masked, (1.0 / m).expand(masked.shape))


def monte_carlo(
    text: NoisyText,
    generator: torch.Generator,
    strata: str = "permuted",
    clip: Clip | None = None,
) -> Masks:
    """One t a block from one stratum each, one mask of probability t, weight 1/t."""
    counted = by_block(text.counted, text.block_size)
    shape = counted.shape[:2]
    number = shape.numel()
    if strata == "none":
        u = 1 - torch.rand(shape, generator=generator, dtype=torch.float64)
    else:
        order = torch.arange(number)
        if strata == "permuted":
            order = torch.randperm(number, generator=generator)
        within = 1 - torch.rand(number, generator=generator, dtype=torch.float64)
        u = ((order + within) / number).view(shape)
    low, high = (clip.low, clip.high) if clip and clip.kind != "fraction" else (0.0, 1.0)
    t = (low + (high - low) * u)[..., None]
    if clip is not None and clip.kind == "resample":
        places = by_block(torch.ones_like(text.counted), text.block_size)
        masked = resampled(t, places, clip, generator) & counted
    else:
        masked = draw_mask(t, counted, generator)
    if clip is not None and clip.kind == "fraction":
        masked, t = redraw(masked, t, counted, clip, generator)
    weight = torch.ones_like(t) if clip is not None and clip.kind == "unweighted" else 1 / t
    return whole(text, masked[None], weight.expand(masked.shape)[None])


def draw_mask(t: Tensor, counted: Tensor, generator: torch.Generator) -> Tensor:
    """Each maskable place with probability t."""
    draw = torch.rand(counted.shape, generator=generator, dtype=torch.float64)
    return (draw < t) & counted


def redraw(
    masked: Bool[Tensor, "batch block place"],
    t: Float[Tensor, "batch block one"],
    counted: Bool[Tensor, "batch block place"],
    clip: Clip,
    generator: torch.Generator,
) -> tuple[Bool[Tensor, "batch block place"], Float[Tensor, "batch block one"]]:
    """Draw blocks again until their masked fraction lies within the clip.

    Raises:
        InputError: if some block has no number of masks whose fraction does.
    """
    k = counted.sum(-1)
    fitting(k, clip)
    while True:
        share = masked.sum(-1) / k.clamp(min=1)
        out = ((share < clip.low) | (share > clip.high)) & (k > 0)
        if not bool(out.any()):
            return masked, t
        again = 1 - torch.rand(t.shape, generator=generator, dtype=torch.float64)
        t = torch.where(out[..., None], again, t)
        masked = torch.where(out[..., None], draw_mask(t, counted, generator), masked)


def resampled(
    t: Float[Tensor, "batch block one"],
    places: Bool[Tensor, "batch block place"],
    clip: Clip,
    generator: torch.Generator,
) -> Bool[Tensor, "batch block place"]:
    """Draw masks of probability t, given that their fraction of the block lies within the clip.

    It is what drawing again at the same t ends in, without doing it: the number m of masks is
    binomial, cut to those that fit, and which m places it is does not matter.

    Raises:
        InputError: if some block has no number of masks whose fraction does.
    """
    k = places.sum(-1)
    fits = fitting(k, clip)
    m = torch.arange(fits.shape[-1], dtype=t.dtype)
    left = (k[..., None] - m).clamp(min=0)
    log_p = torch.xlogy(m, t) + torch.xlogy(left, 1 - t) - (m + 1).lgamma() - (left + 1).lgamma()
    p = log_p.masked_fill(~fits, -torch.inf).softmax(-1)
    number = p.flatten(0, 1).multinomial(1, generator=generator).view(t.shape)
    draw = torch.rand(places.shape, generator=generator, dtype=torch.float64)
    return draw.masked_fill(~places, 2.0).argsort(-1).argsort(-1) < number


def fitting(k: Int[Tensor, "batch block"], clip: Clip) -> Bool[Tensor, "batch block number"]:
    """Which numbers of masks, from 0, have a fraction of a block's k places within the clip.

    Raises:
        InputError: if some block has none beyond 0.
    """
    m = torch.arange(int(k.max()) + 1)
    fraction = m / k[..., None].clamp(min=1)
    fits = (fraction >= clip.low) & (fraction <= clip.high) & (m <= k[..., None])
    if not bool(fits[..., 1:].any(-1)[k > 0].all()):
        raise InputError(
            f"clip to {clip.low}..{clip.high}: no number of masks of some block has such a "
            "fraction; widen it"
        )
    return fits


def whole(text: NoisyText, masked: Tensor, weight: Tensor) -> Masks:
    """Blocks put together again, cut to the text."""
    n = text.tokens.shape[1]
    parts = (x.flatten(-2)[..., :n] for x in (masked, weight))
    return Masks(*parts)


def check_choices(method: str, strata: str, clip: Clip | None, replicates: int, seed: int) -> None:
    """Refuse a method that is none, and choices that it does not have.

    Raises:
        InputError: and says which there are.
    """
    check_choice("method", method, ("exact", "stratified", "monte_carlo"))
    check_choice("strata", strata, ("permuted", "none", "public"))
    if method != "monte_carlo" and (clip is not None or strata != "permuted"):
        raise InputError(f'clip and strata are choices of method="monte_carlo", not {method!r}')
    if method != "exact" and replicates < 2:
        raise InputError(f"replicates={replicates}: a standard error needs at least 2")
    if seed < 0:
        raise InputError(f"seed={seed}: give 0 or more")


@torch.no_grad()
def nelbo(
    bridge: Any,
    tokens: Any,
    block_size: int | str | None = None,
    method: str = "exact",
    *,
    replicates: int = 8,
    seed: int = 0,
    strata: str = "permuted",
    clip: Clip | None = None,
    hooks: Any = None,
    scope: str = "active",
    given: int = 1,
    max_states: int = 256,
    rows: int = 2048,
) -> Nelbo:
    """The NELBO of finished texts (Arriola et al., section 3), exactly or by an estimate.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``; position 0 is
            BOS, given and not counted.
        block_size: the dial; the bridge's by default.
        method: ``"exact"``, ``"stratified"`` or ``"monte_carlo"``; see the module.
        replicates: independent estimates, at least 2.
        seed: of all the draws.
        strata: for Monte Carlo: ``"permuted"`` over blocks, ``"none"``, or ``"public"``: biased.
        clip: for Monte Carlo: a named clipping; biased.
        hooks: TransformerLens's ``[(name or filter, fn), ...]`` or ``StepHooks``, as in
            :func:`exact`.
        scope: how far they reach, as in :func:`exact`.
        given: leading positions that are given, as in :func:`exact`.
        max_states: for the exact sum, as in :func:`exact`.
        rows: rows of a pass; memory grows with it.

    Raises:
        InputError: for what does not fit.
        NotExactError: with time conditioning.
    """
    check_choices(method, strata, clip, replicates, seed)
    bridge = read_bridge(bridge)
    if method == "exact":
        limits = (max_states, rows, given)
        states = read_states(bridge, tokens, block_size, hooks, scope, None, *limits)
        found = summed(states, states.table(states.text.clean()))
        return told(states.text, method, "exact", found.nelbo_by_token, found.nelbo[None])
    text = read_noisy_text(bridge, tokens, block_size, hooks, scope, rows, given)
    generator = torch.Generator().manual_seed(seed)
    stream = text.clean()
    if method == "stratified":
        drawn = [stratified(text, generator) for _ in range(replicates)]
    else:
        drawn = [monte_carlo(text, generator, strata, clip) for _ in range(replicates)]
    owner = torch.arange(replicates).repeat_interleave(len(drawn[0].masked))
    masked, weight = (
        torch.cat(x) for x in zip(*((m.masked, m.weight) for m in drawn), strict=True)
    )
    by_token = torch.zeros(replicates, *text.tokens.shape, dtype=torch.float64)
    for part in torch.arange(len(owner)).split(text.together):
        log_p = text.log_p(stream, masked[part])
        by_token.index_add_(0, owner[part], -weight[part] * log_p)
    kind = "biased" if clip is not None or strata == "public" else "estimate"
    return told(text, method, kind, by_token.mean(0), by_token.sum(-1))


def told(
    about: NoisyText,
    method: str,
    kind: Literal["exact", "estimate", "biased"],
    by_token: Float[Tensor, "batch pos"],
    replicates: Float[Tensor, "replicate batch"],
) -> Nelbo:
    """The result, about these texts."""
    characters = None if about.characters is None else torch.tensor(about.characters)
    return Nelbo(
        kind=kind,
        replicates=replicates,
        token_counts=about.counted.sum(-1),
        characters=characters,
        method=method,
        tokens=about.tokens,
        block_size=about.block_size,
        counted=about.counted,
        by_token=by_token,
    )
