"""Random mask patterns of the NELBO's estimates, and the weight of each.

Monte Carlo draws one t a block, from one stratum each, and permutes the strata over blocks. With
the public code's assignment (the j-th stratum always to the j-th block) early blocks always get low
t, and since early blocks are harder the estimate is biased for a given text; it is here by name.

``clip`` names four different things that are called clipping; each changes what is estimated:

- ``Clip("t", a, b)``: t is drawn from U[a, b] (training with less variance), weight 1/t.
- ``Clip("unweighted", a, b)``: as ``"t"``, with weight 1 in place of 1/t.
- ``Clip("resample", a, b)``: as ``"t"``, and at that t the mask is drawn again until the block's
  masked fraction is in [a, b]. It is the public code's ``resample``: BOS is a position like any
  other, drawn and counted in the fraction, and is revealed afterwards. (Beyond a = 1/2 the public
  code also drops the weight.)
- ``Clip("fraction", a, b)``: t is drawn from U[0, 1], and t and mask are drawn again, together,
  until the masked fraction of the block's maskable positions is in [a, b].

It runs no network.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.masked_passes import MaskedPasses


@dataclass(frozen=True)
class Clip:
    """Restriction of the NELBO's draws to times or masked fractions in [low, high]: biased.

    Attributes:
        kind: ``"t"`` draws t from [low, high]; ``"unweighted"`` does so with weight 1 in place of
            1/t; ``"resample"`` does so and redraws the mask until the block's masked fraction is
            in [low, high]; ``"fraction"`` draws t from [0, 1], and redraws t and mask until the
            masked fraction is in [low, high].
        low: lower end of the interval.
        high: upper end of the interval.

    Raises:
        InputError: for another kind, or ends outside 0 <= low < high <= 1.
    """

    kind: Literal["t", "unweighted", "resample", "fraction"]
    low: float
    high: float

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, ("t", "unweighted", "resample", "fraction"))
        if not 0 <= self.low < self.high <= 1:
            raise InputError(f"low={self.low}, high={self.high}: give 0 <= low < high <= 1")


@dataclass(frozen=True)
class MaskDraws:
    """Drawn mask patterns, and the weight of ``-log p`` at each masked position."""

    masked: Bool[Tensor, "pattern batch pos"]
    weight: Float[Tensor, "pattern batch pos"]


def stratified(passes: MaskedPasses, generator: torch.Generator) -> MaskDraws:
    """Draw one mask of m places a block for every number m, weight 1/m."""
    counted = passes.by_block(passes.counted)
    k = counted.sum(-1)
    patterns, shape = int(k.max()), counted.shape
    draw = torch.rand(patterns, *shape, generator=generator, dtype=torch.float64)
    rank = draw.masked_fill(~counted, 2.0).argsort(-1).argsort(-1)
    m = torch.arange(1, patterns + 1)[:, None, None, None]
    masked = (rank < m) & (m <= k[..., None]) & counted
    return _join_blocks(passes, masked, (1.0 / m.double()).expand(masked.shape))


def monte_carlo(
    passes: MaskedPasses,
    generator: torch.Generator,
    strata: str = "permuted",
    clip: Clip | None = None,
) -> MaskDraws:
    """Draw one t a block, each from its own stratum, and a mask of probability t, weight 1/t."""
    counted = passes.by_block(passes.counted)
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
        places = passes.by_block(torch.ones_like(passes.counted))
        masked = resampled_masks(t, places, clip, generator) & counted
    else:
        masked = _draw_mask(t, counted, generator)
    if clip is not None and clip.kind == "fraction":
        masked, t = _redraw(masked, t, counted, clip, generator)
    weight = torch.ones_like(t) if clip is not None and clip.kind == "unweighted" else 1 / t
    return _join_blocks(passes, masked[None], weight.expand(masked.shape)[None])


def _draw_mask(t: Tensor, counted: Tensor, generator: torch.Generator) -> Tensor:
    """Mask each maskable place with probability t."""
    draw = torch.rand(counted.shape, generator=generator, dtype=torch.float64)
    return (draw < t) & counted


def _redraw(
    masked: Bool[Tensor, "batch block place"],
    t: Float[Tensor, "batch block one"],
    counted: Bool[Tensor, "batch block place"],
    clip: Clip,
    generator: torch.Generator,
) -> tuple[Bool[Tensor, "batch block place"], Float[Tensor, "batch block one"]]:
    """Draw blocks again until their masked fraction lies within the clip.

    Raises:
        InputError: if in some block no number of masks lies within the clip.
    """
    k = counted.sum(-1)
    _fitting(k, clip)
    while True:
        share = masked.sum(-1) / k.clamp(min=1)
        out = ((share < clip.low) | (share > clip.high)) & (k > 0)
        if not bool(out.any()):
            return masked, t
        again = 1 - torch.rand(t.shape, generator=generator, dtype=torch.float64)
        t = torch.where(out[..., None], again, t)
        masked = torch.where(out[..., None], _draw_mask(t, counted, generator), masked)


def resampled_masks(
    t: Float[Tensor, "batch block one"],
    places: Bool[Tensor, "batch block place"],
    clip: Clip,
    generator: torch.Generator,
) -> Bool[Tensor, "batch block place"]:
    """Draw masks of probability t, given that their fraction of the block lies within the clip.

    Drawing again at the same t until a mask fits has this distribution: the number m of masks is
    binomial, restricted to those that fit, and the m places are uniform.

    Raises:
        InputError: if in some block no number of masks lies within the clip.
    """
    k = places.sum(-1)
    fits = _fitting(k, clip)
    m = torch.arange(fits.shape[-1], dtype=t.dtype)
    left = (k[..., None] - m).clamp(min=0)
    log_p = torch.xlogy(m, t) + torch.xlogy(left, 1 - t) - (m + 1).lgamma() - (left + 1).lgamma()
    p = log_p.masked_fill(~fits, -torch.inf).softmax(-1)
    number = p.flatten(0, 1).multinomial(1, generator=generator).view(t.shape)
    draw = torch.rand(places.shape, generator=generator, dtype=torch.float64)
    return draw.masked_fill(~places, 2.0).argsort(-1).argsort(-1) < number


def _fitting(k: Int[Tensor, "batch block"], clip: Clip) -> Bool[Tensor, "batch block number"]:
    """Return which numbers of masks, from 0, are a fraction of k places within the clip.

    Raises:
        InputError: if no number above 0 is, for some block.
    """
    m = torch.arange(int(k.max()) + 1)
    fraction = m / k[..., None].clamp(min=1)
    fits = (fraction >= clip.low) & (fraction <= clip.high) & (m <= k[..., None])
    if not bool(fits[..., 1:].any(-1)[k > 0].all()):
        raise InputError(
            f"clip={clip!r}: in some block no number of masks is such a fraction; widen the clip"
        )
    return fits


def _join_blocks(passes: MaskedPasses, masked: Tensor, weight: Tensor) -> MaskDraws:
    """Join blocks into texts, and cut them to the texts' length."""
    n = passes.tokens.shape[1]
    parts = (x.flatten(-2)[..., :n] for x in (masked, weight))
    return MaskDraws(*parts)
