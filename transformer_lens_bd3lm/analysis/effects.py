"""Mean effects over texts, with intervals and with p-values corrected for the number of cells.

Texts are the unit: rows of one text (seeds, windows, positions) are averaged first, since they
depend on each other. For the values v_1 .. v_n of n texts in a cell, with mean m and standard
deviation s::

    t = m / (s / sqrt n)                                      the statistic of a cell
    [m - q_hi s / sqrt n, m - q_lo s / sqrt n]                interval: q are quantiles of the same
                                                              statistic, about m, over texts drawn
                                                              with replacement (bootstrap-t)
    p = share of sign flips with max over cells |t'| >= |t|   max-T: every text's values keep or
                                                              change their sign together

The interval is about one cell. The best of many cells looks better than it is: the p-values are
corrected for that (Westfall and Young 1993), and hold in any family of dependent cells.

Where most texts have the same value, as the share of a rare word, many resamples hold that value
alone, and their statistic is infinite. If an end of the interval would be, there is no interval.

It does not ask whether the texts are a sample of anything, nor whether rows are independent.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Result, count, plain_values

FEWEST = 5
"""Smallest number of texts for an interval: with fewer, resamples often repeat one text."""

_AT_ONCE = 2**22  # values resampled at once


@dataclass(frozen=True, kw_only=True, repr=False)
class Effects(Result):
    """Mean effects over texts by cell, with intervals and corrected p-values; float64, CPU.

    Attributes:
        mean: mean over texts ``[*cell]``, in the unit of the values; NaN where no text has one.
        low: lower end of each cell's interval ``[*cell]``; NaN with fewer than 5 texts.
        high: upper end of each cell's interval ``[*cell]``.
        p: two-sided p-value of "the mean is 0" ``[*cell]``, corrected for all cells together
            (max-T over sign flips of whole texts); NaN where fewer than 2 texts have a value.
        texts: number of texts with a value ``[*cell]``.
        level: probability that an interval made this way covers its cell's true mean.
    """

    mean: Float[Tensor, "*cell"] = field(repr=False)
    low: Float[Tensor, "*cell"] = field(repr=False)
    high: Float[Tensor, "*cell"] = field(repr=False)
    p: Float[Tensor, "*cell"] = field(repr=False)
    texts: Tensor = field(repr=False)
    level: float

    @property
    def significant(self) -> Bool[Tensor, "*cell"]:
        """Cells that differ from 0 with all cells corrected for: ``p <= 1 - level``."""
        return self.p <= 1 - self.level + 1e-12

    @property
    def largest(self) -> tuple[int, ...]:
        """Cell with the largest absolute mean; the first one where no text has a value."""
        size = self.mean.abs().nan_to_num(-1)
        return tuple(int(i) for i in torch.unravel_index(size.argmax(), size.shape))

    def text(self, *cell: int) -> str:
        """Return a cell as text: ``+0.123 [+0.050, +0.196]``; without ends where there are none.

        Three decimals, and more where the interval (or the mean, without one) is narrower.
        """
        mean, low, high = (float(x[cell]) for x in (self.mean, self.low, self.high))
        if math.isnan(mean):
            return "–"
        size = abs(mean) if math.isnan(low + high) else high - low
        digits = min(max(3, 1 - math.floor(math.log10(size))), 6) if size > 0 else 3
        if math.isnan(low) and math.isnan(high):
            return f"{mean:+.{digits}f}"
        return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"

    def _figures(self) -> str:
        texts = count(int(self.texts.max()) if self.texts.numel() else 0, "text")
        if not self.mean.isfinite().any():
            return f"{count(self.mean.numel(), 'cell')} without a value, {texts}"
        best = self.largest
        p = float(self.p[best])
        value = f"{self.text(*best)}{'' if math.isnan(p) else f', p = {p:.4f}'}"
        if self.mean.numel() == 1:
            return f"{value}, {texts}"
        differ = f"{int(self.significant.sum())} of {self.mean.numel()} cells differ from 0"
        return f"{differ}, {texts}; largest {value} at {best}"

    def to_dict(self) -> dict[str, Any]:
        """Return means, intervals, p-values and counts as plain values for JSON."""
        return plain_values(dict(vars(self)))


@torch.no_grad()
def mean_effects(
    values: Any,
    texts: Any = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Effects:
    """Compute mean effects over texts, bootstrap-t intervals, and max-T corrected p-values.

    Args:
        values: an effect a row and cell ``[row, *cell]``, as a difference of two arms; NaN where a
            row has none.
        texts: number of each row's text ``[row]``: rows of one text are averaged. By default each
            row is a text of its own.
        level: probability that an interval covers its cell's true mean, between 0 and 1.
        resamples: number of bootstrap resamples, and of sign flips; all ``2^n`` flips of n texts
            are used where they are fewer. The smallest p-value is ``2 / 2^n``, so it can be below
            0.05 from 6 texts on.
        seed: random seed of the resamples and flips.

    Raises:
        InputError: for values that are not floating point or have no row, texts that do not fit, a
            level outside (0, 1), or fewer than one resample.
    """
    values = _read_values(values)
    check_int("resamples", resamples, 1, 10**7, "give 2000 or more")
    check_int("seed", seed, 0, 2**63 - 1, "give an int in 0..2**63 - 1")
    if not 0 < level < 1:
        raise InputError(f"level={level}: give a share between 0 and 1, as 0.95")
    flat = values.reshape(len(values), -1)
    if texts is not None:
        flat = _by_text(flat, texts)
    count = flat.isfinite().sum(0)
    mean = flat.nansum(0) / count
    low, high = (torch.full_like(mean, torch.nan) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)
    enough = count >= FEWEST
    if bool(enough.any()):
        low[enough], high[enough] = _bootstrap_t(flat[:, enough], level, resamples, generator)
    shape = values.shape[1:]
    return Effects(
        mean=mean.view(shape),
        low=low.view(shape),
        high=high.view(shape),
        p=_max_t(flat, resamples, generator).view(shape),
        texts=count.view(shape),
        level=level,
    )


def _read_values(values: Any) -> Float[Tensor, "row *cell"]:
    values = torch.as_tensor(values)
    if not values.is_floating_point() or values.dim() < 1 or not len(values):
        raise InputError(
            f"values are {tuple(values.shape)} of {values.dtype}: give floats, a row a text or more"
        )
    if bool(values.isinf().any()):
        raise InputError("values hold infinities, which have no mean: leave them out as NaN")
    return values.detach().cpu().double()


def read_text_numbers(name: str, texts: Any, rows: int) -> Int[Tensor, " row"]:
    """Return the number of each row's text, on the CPU.

    Raises:
        InputError: for anything but one number for each row.
    """
    try:
        numbers = torch.as_tensor(texts).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name}={texts!r}: give one number for each of {rows} rows") from error
    if numbers.shape != (rows,):
        raise InputError(f"{name}={tuple(numbers.shape)}: give one number for each of {rows}")
    return numbers


def _by_text(flat: Float[Tensor, "row cell"], texts: Any) -> Float[Tensor, "text cell"]:
    """Average the rows of each text; NaN where none of them has a value."""
    numbers = read_text_numbers("texts", texts, len(flat))
    kept, of = numbers.unique(return_inverse=True)
    sums = flat.new_zeros(len(kept), flat.shape[1]).index_add(0, of, flat.nan_to_num())
    counts = flat.new_zeros(sums.shape).index_add(0, of, flat.isfinite().double())
    return sums / counts


def _bootstrap_t(
    flat: Float[Tensor, "text cell"], level: float, resamples: int, generator: torch.Generator
) -> tuple[Float[Tensor, " cell"], Float[Tensor, " cell"]]:
    """Compute the ends of each cell's interval from whole texts drawn with replacement."""
    texts, cells = flat.shape
    drawn = torch.randint(texts, (resamples, texts), generator=generator)
    times = torch.zeros(resamples, texts, dtype=flat.dtype)
    times.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=flat.dtype))
    low, high = (torch.empty(cells, dtype=flat.dtype) for _ in range(2))
    tails = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=flat.dtype)
    for part in torch.arange(cells).split(max(_AT_ONCE // resamples, 1)):
        present = flat[:, part].isfinite().double()
        n = present.sum(0)
        mean = flat[:, part].nansum(0) / n
        about = torch.where(present > 0, flat[:, part] - mean, 0.0)
        about = about.masked_fill(about.abs() <= 1e-12 * mean.abs(), 0.0)  # rounding
        error = (about.square().sum(0) / (n - 1) / n).sqrt()
        m = times @ present
        shift = times @ about / m
        spread = (times @ about.square() / m - shift.square()).clamp(min=0) * m / (m - 1)
        size = about.square().mean(0)
        # Where a resample's values are all the same, t is infinite, unless they are the mean.
        t = torch.where(spread > 1e-12 * size, shift / (spread / m).sqrt(), shift.sign() / 0.0)
        t = t.masked_fill(shift.square() <= 1e-12 * size, 0.0).masked_fill(m < 2, torch.nan)
        lower, upper = t.nanquantile(tails, dim=0)
        known = lower.isfinite() & upper.isfinite()
        low[part] = (mean - upper * error).where(known, torch.nan)
        high[part] = (mean - lower * error).where(known, torch.nan)
    return low, high


def _max_t(
    flat: Float[Tensor, "text cell"], flips: int, generator: torch.Generator
) -> Float[Tensor, " cell"]:
    """Compute p-values of all cells together from sign flips of whole texts.

    A sum of squares does not change with signs, so |t| of a flip depends on its sum alone.
    """
    texts, cells = flat.shape
    present = flat.isfinite()
    n, values = present.sum(0).double(), flat.nan_to_num()
    size = values.square().sum(0).sqrt()
    if 2**texts <= flips:
        signs = 1.0 - 2.0 * ((torch.arange(2**texts)[:, None] >> torch.arange(texts)) & 1).double()
    else:
        signs = 2.0 * torch.randint(2, (flips, texts), generator=generator).double() - 1
        signs[0] = 1.0  # the values as they are count among the flips, so no p-value is 0
    tested = (n > 1) & (size > 0)
    largest = torch.zeros(len(signs), dtype=flat.dtype)
    own = torch.full((cells,), torch.nan, dtype=flat.dtype)
    if not bool(tested.any()):
        return torch.ones_like(own).masked_fill(n < 2, torch.nan)
    for part in tested.nonzero()[:, 0].split(max(_AT_ONCE // len(signs), 1)):
        share = (signs @ values[:, part] / size[part]).square()  # n where all texts are alike
        t = (share * (n[part] - 1) / (n[part] - share).clamp(min=1e-9)).sqrt()
        own[part] = t[0]
        largest = torch.maximum(largest, t.amax(1))
    p = (largest[:, None] >= own[tested] * (1 - 1e-9)).double().mean(0)
    result = torch.ones_like(own).masked_fill(n < 2, torch.nan)
    result[tested] = p
    return result
