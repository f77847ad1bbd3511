"""Noise: all the randomness of a denoising run, as one object that two runs can share.

Under the log-linear schedule every token of a block is masked at time t with probability t, so a
token is revealed at a time tau ~ U(0, 1) on the way from t = 1 to 0, independently. Given tau, and
a Gumbel vector g for what is drawn (``argmax(log p + g)`` is a sample from p), a run is
deterministic. Here tau and g belong to a (row, absolute position), counter-based from the seed:
they do not depend on batch, device, sampler, number of steps or block size, nor on the edits of a
hook. Two runs with the same noise differ only by what was changed.

``sigma`` is the network's name for time; its schedule is here too. Nothing here depends on logits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import one_line

TIME, GUMBEL = 0, 1
LAST_TIME = 1e-3


def sigma_of(t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return sigma, the noise level that the network reads, at time t.

    The log-linear schedule (Sahoo et al. 2024): a token is masked at time t with probability
    ``1 - alpha_t = t``, and ``sigma = -log(alpha_t) = -log(1 - t)``. It is at most ``-log(1e-3)``,
    that of t = 0.999. A checkpoint without time conditioning reads 0 whatever sigma is.

    Args:
        t: times in [0, 1], ``[batch]``.

    Returns:
        sigma ``[batch]``, from 0 at t = 0 up to 6.9, of the dtype of ``t``.
    """
    return -(1 - t).clamp(min=LAST_TIME).log()


@dataclass(frozen=True)
class Noise:
    """Reveal times and Gumbel vectors by row and absolute position, float64, on the CPU.

    Attributes:
        seed: any int from 0 to 2**64 - 1; the same seed is the same noise, everywhere.
        rows: the noise row of each batch row: ``[0, 0, 1, 1]`` gives rows in pairs the same noise.
            By default batch row i has noise row i.

    Raises:
        InputError: for a seed or rows of another type or range; and from :func:`denoise`, for fewer
            rows than the batch has.
    """

    seed: int = 0
    rows: Sequence[int] | None = None

    def __repr__(self) -> str:
        rows = "" if self.rows is None else f", rows={list(self.rows)}"
        return one_line(f"Noise(seed={self.seed}{rows})")

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0, 2**64 - 1, "give an int in 0..2**64 - 1")
        if isinstance(self.rows, Iterator):
            object.__setattr__(self, "rows", tuple(self.rows))
        if self.rows is not None and not isinstance(self.rows, Sequence):
            raise InputError(f"rows={self.rows!r}: give a list of noise rows, one per batch row")
        rows = () if self.rows is None else self.rows
        if any(type(row) is not int or not 0 <= row < 2**64 for row in rows):
            raise InputError(f"rows={list(rows)}: noise rows are ints that count from 0")

    def row(self, batch_row: int) -> int:
        """Return the noise row of a batch row.

        Raises:
            InputError: if ``rows`` names fewer rows than the batch has.
        """
        if self.rows is None:
            return batch_row
        if batch_row >= len(self.rows):
            raise InputError(
                f"rows names {len(self.rows)} rows, the batch has more: give one for each"
            )
        return self.rows[batch_row]

    def _uniforms(
        self, places: Sequence[tuple[int, int]], kind: int, size: int
    ) -> Float[np.ndarray, "place size"]:
        """Return the uniform variables of some (batch row, position), each a stream of its own.

        A stream is ``Philox(key=seed, counter=[0, kind, position, noise row])``. One generator is
        set to each in turn, since making a generator takes as long as drawing a thousand numbers.
        """
        bits = np.random.Philox(key=self.seed)
        generator, state = np.random.Generator(bits), bits.state
        uniforms = torch.empty(len(places), size, dtype=torch.float64).numpy()
        for (row, position), out in zip(places, uniforms, strict=True):
            counter = [0, kind, position, self.row(row)]
            state["state"]["counter"] = np.array(counter, np.uint64)
            bits.state = state
            generator.random(out=out)
        return uniforms

    def times(self, batch: int, start: int, end: int) -> Float[Tensor, "batch pos"]:
        """Return reveal times of positions ``start:end``, uniform on [0, 1), float64.

        Raises:
            InputError: if ``rows`` names fewer rows than the batch has.
        """
        places = [(row, position) for row in range(batch) for position in range(start, end)]
        return torch.from_numpy(self._uniforms(places, TIME, 1)).reshape(batch, end - start)

    def gumbels(self, batch_row: int, position: int, size: int) -> Float[Tensor, " d_vocab"]:
        """Return the Gumbel vector of one batch row and absolute position, float64.

        Raises:
            InputError: if ``rows`` names fewer rows than the batch has.
        """
        return self.gumbels_at([(batch_row, position)], size)[0]

    def gumbels_at(
        self, places: Sequence[tuple[int, int]], size: int
    ) -> Float[Tensor, "place d_vocab"]:
        """Return the Gumbel vectors of some (batch row, absolute position), float64.

        Raises:
            InputError: if ``rows`` names fewer rows than the batch has.
        """
        # random() is in [0, 1); 1 - u is in (0, 1], whose log is finite.
        x = self._uniforms(places, GUMBEL, size)
        np.log1p(np.negative(x, out=x), out=x)
        np.subtract(np.finfo(np.float64).tiny, x, out=x)
        return torch.from_numpy(np.negative(np.log(x, out=x), out=x))
