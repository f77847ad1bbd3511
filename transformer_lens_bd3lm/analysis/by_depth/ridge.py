"""Linear probes in closed form, from sums alone: no activation is kept.

Ridge regression of y on x, both centred on the training part::

    w = (S_xx + a I)^-1 S_xy,     R^2 = 1 - sum (y - w x)^2 / sum (y - mean y)^2  on the test part

Both need only the sums of 1, x, y, x x^T, x y and y^2 over each part, so each batch is added and
dropped. ``a`` is the one of ``PENALTIES`` (times the mean variance) that is best on the validation
part. Labels may have several columns: the true ones, and shuffled ones for control.

It does not say what a probe means: that a line can read depth does not show that the model does.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError

FOLDS = 5  # parts of equally many texts, each of one text at least
PENALTIES = tuple(10.0**k for k in range(-4, 5))
PARTS = ("train", "validation", "test")


def split_of(
    number: int, seed: int, texts: Int[Tensor, " sample"] | None = None
) -> Int[Tensor, " sample"]:
    """Draw the part that each text is in: 0 train, 1 validation, 2 test; 60, 20 and 20 percent.

    Args:
        number: number of texts.
        seed: random seed of the draw.
        texts: number of each sample's text; by default each text is a sample.

    Raises:
        InputError: for too few texts.
    """
    return (fold_of(number, seed, texts) - (FOLDS - len(PARTS))).clamp(min=0)


def fold_of(
    number: int, seed: int, texts: Int[Tensor, " sample"] | None = None
) -> Int[Tensor, " sample"]:
    """Draw the fold that each text is in, 0 to 4; see :func:`rotated`.

    Args:
        number: number of texts.
        seed: random seed of the draw.
        texts: number of each sample's text; by default each text is a sample.

    Raises:
        InputError: for too few texts.
    """
    if number < FOLDS:
        raise InputError(
            f"{number} texts or sentences: a probe needs {FOLDS}, for train, validation and test"
        )
    bounds = torch.arange(1, FOLDS) * number / FOLDS
    rank = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    fold = torch.bucketize(rank.float() + 0.5, bounds)
    return fold if texts is None else fold[texts]


@dataclass
class Sums:
    """Sums over a part's samples x and their labels y, float64 on the CPU."""

    n: int = 0
    x: Float[Tensor, " d"] | None = None
    y: Float[Tensor, " label"] | None = None
    xx: Float[Tensor, "d d"] | None = None
    xy: Float[Tensor, "d label"] | None = None
    yy: Float[Tensor, " label"] | None = None

    def add(self, x: Float[Tensor, "sample d"], y: Float[Tensor, "sample label"]) -> None:
        """Add samples."""
        sums = (x.sum(0), y.sum(0), x.T @ x, x.T @ y, y.square().sum(0))
        self.join(Sums(len(x), *sums))

    def join(self, other: "Sums") -> None:
        """Add the sums over other samples."""
        self.n += other.n
        for name in ("x", "y", "xx", "xy", "yy"):
            before, more = getattr(self, name), getattr(other, name)
            if more is not None:
                setattr(self, name, more if before is None else before + more)

    def about(
        self, x0: Float[Tensor, " d"], y0: Float[Tensor, " label"]
    ) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d label"], Float[Tensor, " label"]]:
        """Compute ``sum (x - x0)(x - x0)^T``, ``sum (x - x0)(y - y0)`` and ``sum (y - y0)^2``."""
        assert self.x is not None and self.y is not None and self.xx is not None
        assert self.xy is not None and self.yy is not None
        cross = torch.outer(self.x, x0)
        xx = self.xx - cross - cross.T + self.n * torch.outer(x0, x0)
        xy = self.xy - torch.outer(self.x, y0) - torch.outer(x0, self.y)
        yy = self.yy - 2 * y0 * self.y + self.n * y0.square()
        return xx, xy + self.n * torch.outer(x0, y0), yy


@dataclass
class Ridge:
    """A ridge regression for each column of labels, from samples that are added batch by batch.

    Attributes:
        parts: sums over the train, validation and test samples.
    """

    parts: list[Sums] = field(default_factory=lambda: [Sums() for _ in PARTS])

    def add(
        self,
        x: Float[Tensor, "sample d"],
        y: Float[Tensor, "sample label"],
        part: Int[Tensor, " sample"],
    ) -> None:
        """Add samples, each to its part."""
        x, y = x.detach().cpu().double(), y.double()
        for number, sums in enumerate(self.parts):
            own = part == number
            if bool(own.any()):
                sums.add(x[own], y[own])

    def r2(self) -> Float[Tensor, " label"]:
        """Compute R^2 on the test part for each column of labels, at its own best penalty."""
        train, validation, test = self.parts
        assert train.x is not None and train.y is not None
        x0, y0 = train.x / train.n, train.y / train.n
        xx, xy, _ = train.about(x0, y0)
        values, vectors = torch.linalg.eigh(xx)
        values, turned = values.clamp(min=0), vectors.T @ xy
        scale = float(values.mean()) or 1.0
        weights = [
            vectors @ (turned / (values + penalty * scale)[:, None]) for penalty in PENALTIES
        ]
        errors = torch.stack([self._squared_error(validation, w, x0, y0) for w in weights])
        best = torch.stack(weights)[errors.argmin(0), :, torch.arange(errors.shape[1])].T
        assert test.y is not None and test.yy is not None
        spread = test.yy - test.y.square() / test.n
        spread = spread.masked_fill(spread <= 1e-12 * test.yy, torch.nan)  # all labels are the same
        return 1 - self._squared_error(test, best, x0, y0) / spread

    @staticmethod
    def _squared_error(
        sums: Sums,
        w: Float[Tensor, "d label"],
        x0: Float[Tensor, " d"],
        y0: Float[Tensor, " label"],
    ) -> Float[Tensor, " label"]:
        """Compute ``sum (y - prediction)^2`` for each column of labels."""
        xx, xy, yy = sums.about(x0, y0)
        return yy - 2 * (w * xy).sum(0) + (w * (xx @ w)).sum(0)


def rotated(folds: list[Sums]) -> Iterator[Ridge]:
    """Yield the probe of each split: every fold is the test part of one, validation of another.

    The first is the split of :func:`split_of`: three folds to train, then validation and test.
    """
    for last in reversed(range(len(folds))):
        train, (validation, test) = Sums(), (folds[last - 1], folds[last])
        for fold in folds:
            if fold is not test and fold is not validation:
                train.join(fold)
        yield Ridge([train, validation, test])
