"""Rows of a harvest that a sparse autoencoder is trained on, in a random order, batch by batch.

The rows stay on disk. Each epoch is another permutation of those that were chosen by their columns;
it depends on the seed and the number of the epoch alone, so a batch can be read again at any time.
"""

from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.harvest import Harvest
from transformer_lens_bd3lm.errors import InputError

_EPOCH, _SAMPLE = 5, 6  # set these streams apart from others of the same seed
_AT_ONCE = 32  # batches that are read from disk at once


class TrainingRows:
    """Chosen rows of one part of a harvest, at one hook point.

    Args:
        harvest: the harvest.
        part: ``"train"`` or ``"validation"``.
        name: the hook point.
        masks_left: least and greatest number of masks in the row's block.
        masked: whether the row is itself a mask; None takes both.
        seed: random seed of the order.

    Attributes:
        numbers: numbers of the chosen rows in the part ``[row]``.
    """

    def __init__(
        self,
        harvest: Harvest,
        part: str,
        name: str,
        masks_left: tuple[int, int],
        masked: bool | None,
        seed: int,
    ):
        whole = harvest.dataset(part)
        columns: Any = whole.select_columns(["masks_left", "masked"]).with_format("numpy")[:]
        low, high = masks_left
        wanted = (columns["masks_left"] >= low) & (columns["masks_left"] <= high)
        if masked is not None:
            wanted &= columns["masked"] == masked
        self.name, self.seed, self.numbers = name, seed, wanted.nonzero()[0]
        self._blocks = _matrices(whole, name)
        self._starts = np.cumsum([0, *(len(block) for block in self._blocks[:-1])])
        self._stretch: tuple[int, int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.numbers)

    def batch(self, step: int, size: int) -> Float[Tensor, "row d"]:
        """Return the rows of a step; a batch never spans two epochs."""
        a_epoch = len(self) // size
        epoch, index = divmod(step, a_epoch)
        start = index - index % _AT_ONCE
        if self._stretch is None or self._stretch[:2] != (epoch, start):
            order = np.random.default_rng([self.seed, _EPOCH, epoch]).permutation(self.numbers)
            rows = self._read(order[start * size : min(start + _AT_ONCE, a_epoch) * size])
            self._stretch = epoch, start, rows
        at = (index - start) * size
        return self._stretch[2][at : at + size]

    def sample(self, most: int) -> Float[Tensor, "row d"]:
        """Return at most ``most`` rows, drawn without replacement."""
        drawn = np.random.default_rng([self.seed, _SAMPLE]).permutation(self.numbers)[:most]
        return self._read(drawn)

    def _read(self, numbers: np.ndarray) -> Float[Tensor, "row d"]:
        """Read rows from disk, in the order of their numbers.

        Raises:
            InputError: for activations that are not finite.
        """
        rows = np.empty((len(numbers), self._blocks[0].shape[1]), np.float32)
        block = np.searchsorted(self._starts, numbers, side="right") - 1
        for each in np.unique(block):
            own = block == each
            rows[own] = self._blocks[each][numbers[own] - self._starts[each]]
        if not np.isfinite(rows).all():
            raise InputError(f"the harvest holds activations of {self.name} that are not finite")
        return torch.from_numpy(rows)


def _matrices(dataset: Dataset, name: str) -> list[np.ndarray]:
    """Return an activation as matrices ``[row, width]`` that stay on disk, one a batch of a file.

    ``datasets`` itself would build each row in Python, which takes longer than the training.
    """
    width = dataset.features[name].shape[1]
    return [
        batch.storage.flatten().flatten().to_numpy(zero_copy_only=True).reshape(-1, width)
        for batch in dataset.data.column(name).chunks
    ]
