"""Two runs side by side: how many of the tokens that they wrote are the same, with an interval.

A position counts in a row where a run wrote its token and neither was given it. So the prompt does
not count, nor what a fork was given of its run, nor what lies behind the ends of both rows. Where
one row goes on and the other has ended, its tokens count and differ.

Tokens of a row depend on each other, so rows are the unit of the interval. For w_r counted tokens
in row r, of which a share p is the same over all rows, the ends are Wilson's (1927) for p in
``n = (sum w_r)^2 / sum w_r^2`` draws, which is the number of rows if all are of one length. Of all
ways in which the shares of rows can spread about p, rows that agree as a whole or not at all spread
most, with variance p (1 - p): that of a draw. The interval is at least as wide as it has to be.

It does not ask at which step runs part; see :mod:`.replay`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transformer_lens_bd3lm.checks import is_real
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Result, count, plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class RunComparison(Result):
    """Tokens that two runs wrote, and which of them are the same; on the CPU.

    Attributes:
        base: the run, or the runs of many prompts, that the other is compared with.
        other: the other, with the same number of rows.
        counted: positions that a run wrote and neither was given ``[row, pos]``.
        same: counted positions where both wrote the same token ``[row, pos]``.
    """

    base: Run | Runs
    other: Run | Runs
    counted: Bool[Tensor, "row pos"]
    same: Bool[Tensor, "row pos"]

    @property
    def differs(self) -> Bool[Tensor, "row pos"]:
        """Counted positions with another token, or with a token in one run alone."""
        return self.counted & ~self.same

    @property
    def written(self) -> Int[Tensor, " row"]:
        """Number of counted positions, by row."""
        return self.counted.sum(-1)

    @property
    def agreeing(self) -> Int[Tensor, " row"]:
        """Number of counted positions with the same token, by row."""
        return self.same.sum(-1)

    @property
    def rows(self) -> int:
        """Number of rows with a counted position; an interval needs two."""
        return int((self.written > 0).sum())

    @property
    def share(self) -> float:
        """Share of the counted tokens that are the same, over all rows; NaN if there are none."""
        return float(self.agreeing.sum() / self.written.sum())

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Compute Wilson's interval of ``share`` over rows like these; see the module.

        Args:
            level: probability that an interval made this way covers the true share, at least.

        Raises:
            InputError: for fewer than two rows with a written token, or a level outside (0, 1).
        """
        if not is_real(level) or not 0 < level < 1:
            raise InputError(f"level={level!r}: give a share between 0 and 1, as 0.95")
        if self.rows < 2:
            raise InputError(
                f"{count(self.rows, 'row')} with written tokens: an interval is over rows, give "
                "two or more"
            )
        weights = self.written.double()
        n = float(weights.sum().square() / weights.square().sum())
        z, p = NormalDist().inv_cdf((1 + level) / 2), self.share
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return max(middle - half, 0.0), min(middle + half, 1.0)

    @property
    def sentence(self) -> str:
        """How many written tokens agree, and their share with its interval over rows, in words."""
        tokens = (
            f"{int(self.agreeing.sum()):,} of {count(int(self.written.sum()), 'written token')}"
        )
        if not self.rows:
            return f"{tokens} agree"
        ends = " [{:.0%}, {:.0%}]".format(*self.interval()) if self.rows > 1 else ""
        return f"{tokens} agree, {self.share:.0%}{ends}, {count(self.rows, 'row')}"

    def to_dict(self) -> dict[str, Any]:
        """Return counts by row, their share and its interval as plain values for JSON."""
        values = {
            "written_by_row": self.written,
            "agreeing_by_row": self.agreeing,
            "share": self.share,
            "interval_95": self.interval() if self.rows > 1 else None,
        }
        return plain_values(values)

    def _figures(self) -> str:
        return self.sentence


def compare_runs(base: Any, other: Any) -> RunComparison:
    """Compare the tokens that two runs wrote, row by row, whatever their lengths.

    Args:
        base: a run as :func:`denoise`, :func:`fork` or ``Run.load`` returns it, or the runs of
            :func:`denoise_many`.
        other: another with as many rows: of other hooks, noise, prompts, or of another model with
            the same vocabulary.

    Raises:
        InputError: for anything but runs, another number of rows, or another vocabulary.
    """
    rows = []
    for name, runs in (("base", base), ("other", other)):
        if not isinstance(runs, Run | Runs):
            raise InputError(f"{name} is {type(runs).__name__}: give a Run, as denoise returns it")
        rows.append(list(_rows(runs)))
    if len(rows[0]) != len(rows[1]):
        raise InputError(
            f"other has {count(len(rows[1]), 'row')}, base has {len(rows[0])}: give runs with the "
            "same number of rows"
        )
    sizes = [runs.bridge.cfg.d_vocab for runs in map(_first, (base, other)) if runs is not None]
    if len(set(sizes)) > 1:
        raise InputError(
            f"other has a vocabulary of {sizes[1]:,}, base of {sizes[0]:,}: their ids are not the "
            "same tokens, compare runs of one vocabulary"
        )
    counted, same = [], []
    for pair in zip(*rows, strict=True):
        (ids, wrote, given), (ids_2, wrote_2, given_2) = _of_one_length(pair)
        counted.append((wrote | wrote_2) & ~given & ~given_2)
        same.append(counted[-1] & wrote & wrote_2 & (ids == ids_2))
    counted, same = (pad_sequence(x, batch_first=True) for x in (counted, same))
    return RunComparison(base=base, other=other, counted=counted, same=same)


def each_run(runs: Run | Runs) -> Iterator[tuple[Run, int]]:
    """Yield the run and the number in it of each row."""
    for run in [runs] if isinstance(runs, Run) else runs:
        for row in range(len(run.ends)):
            yield run, row


def _first(runs: Run | Runs) -> Run | None:
    return next((run for run, _ in each_run(runs)), None)


def _rows(runs: Run | Runs) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield each row's ids, and which positions it wrote and was given, up to its end."""
    for run, row in each_run(runs):
        end = int(run.ends[row])
        ids, wrote = run.final[row, :end].cpu(), run.commit_step_all[row, :end] >= 0
        yield ids, wrote, ~wrote & (ids != run.canvas.mask_id)


def _of_one_length(pair: Any) -> Iterator[list[Tensor]]:
    """Yield each row's tensors, filled up to the longer row: not written, not given."""
    length = max(len(parts[0]) for parts in pair)
    for parts in pair:
        yield [torch.nn.functional.pad(x, (0, length - len(x))) for x in parts]
