"""The written positions of finished runs, at every step before their reveal.

A *prediction* is one position at one step at which it was masked. A step counts for a row if it
reveals a token of that row, so a row's numbers do not depend on the rest of its batch. Positions
behind a row's end are left out. *Masks left* are those of the row's block before the step; their
share is of the masks that the block had at its first step.

Rows of one prompt are one text: they are draws of the same model from the same beginning. Prompts
of one token, which is BOS, begin a text of their own in each row.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.denoising.along import along
from transformer_lens_bd3lm.denoising.replay import require_run
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.denoising.samplers import Sampler
from transformer_lens_bd3lm.denoising.step import RevealedStep
from transformer_lens_bd3lm.errors import InputError

QUARTERS = ("more than 3/4", "1/2 to 3/4", "1/4 to 1/2", "up to 1/4")
"""Bins of the share of masks left, in the order of a run."""


@dataclass(frozen=True)
class Written:
    """Finished runs, with the number of each row and of each row's text.

    Attributes:
        runs: the runs, each with the numbers of its rows.
        texts: number of each row's text ``[row]``.
    """

    runs: list[tuple[Run, list[int]]]
    texts: Int[Tensor, " row"]

    @property
    def first(self) -> Run:
        """The first run."""
        return self.runs[0][0]

    @property
    def steps(self) -> int:
        """Number of steps of all runs."""
        return sum(len(run.steps) for run, _ in self.runs)

    def tokens(self) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
        """Return every written token, and the number of its text."""
        parts = []
        for run, rows in self.runs:
            row, at = (run.commit_step >= 0).nonzero().unbind(-1)
            parts.append((run.final.cpu()[row, at], self.texts[torch.tensor(rows)[row]]))
        ids, texts = zip(*parts, strict=True)
        return torch.cat(ids), torch.cat(texts)

    def along(
        self, update: Callable[..., None], names: Sequence[str] = ()
    ) -> Iterator[tuple["Predictions", dict[str, Tensor]]]:
        """Yield the predictions of each step, and its activations by name; see :func:`along`.

        Args:
            update: called with ``advance=1`` after each step.
            names: hook points whose activations are wanted.
        """
        for run, rows in self.runs:
            numbers = torch.tensor(rows)
            for step, log_probs, activations in along(run, names):
                predictions = Predictions.of(run, step, log_probs, numbers)
                if len(predictions.row):
                    yield predictions, activations
                update(advance=1)


@dataclass(frozen=True)
class Predictions:
    """Predictions of one step, one entry a masked position; all on the CPU.

    Attributes:
        log_probs: log-probabilities in nats ``[entry, d_vocab]``.
        row: number of the row over all runs ``[entry]``.
        batch_row: row in the run's batch ``[entry]``.
        offset: position within the block ``[entry]``.
        position: absolute position ``[entry]``.
        final: token that was written in the end ``[entry]``.
        masks_left: masks of the row's block before the step ``[entry]``.
        masks: masks that the block had at its first step ``[entry]``.
        step: index of the step in the run.
    """

    log_probs: Float[Tensor, "entry d_vocab"]
    row: Int[Tensor, " entry"]
    batch_row: Int[Tensor, " entry"]
    offset: Int[Tensor, " entry"]
    position: Int[Tensor, " entry"]
    final: Int[Tensor, " entry"]
    masks_left: Int[Tensor, " entry"]
    masks: Int[Tensor, " entry"]
    step: int

    @classmethod
    def of(
        cls,
        run: Run,
        step: RevealedStep,
        log_probs: Float[Tensor, "masked d_vocab"],
        numbers: Int[Tensor, " row"],
    ) -> "Predictions":
        """Return the predictions of a step that count."""
        row, offset = step.masked.nonzero().unbind(-1)
        position = step.window[0] + offset
        counts = (position < run.ends[row]) & step.revealed.any(-1)[row]
        row, offset, position = row[counts], offset[counts], position[counts]
        masks = (run.commit_step_all[:, slice(*step.window)] >= 0).sum(-1)
        return cls(
            log_probs=log_probs[counts],
            row=numbers[row],
            batch_row=row,
            offset=offset,
            position=position,
            final=run.final.cpu()[row, position],
            masks_left=step.masks_left[row],
            masks=masks[row],
            step=step.index,
        )

    @property
    def quarter(self) -> Int[Tensor, " entry"]:
        """Bin of each entry's share of masks left, an index into ``QUARTERS``."""
        return quarter_of(self.masks_left, self.masks)


def quarter_of(
    masks_left: Int[Tensor, " entry"], masks: Int[Tensor, " entry"]
) -> Int[Tensor, " entry"]:
    """Return the bin of a share of masks left, an index into ``QUARTERS``."""
    most = len(QUARTERS)
    return most - (masks_left * most + masks - 1).div(masks, rounding_mode="floor")


def read_written(run: Any, texts: Any = None) -> Written:
    """Return finished runs with numbers of rows and texts.

    Args:
        run: a ``Run``, the ``Runs`` of ``denoise_many``, or a list of runs of one bridge.
        texts: number of each row's text ``[row]``; rows of one prompt by default.

    Raises:
        InputError: for anything else, numbers that do not fit, and runs that wrote no token of
            their texts.
        NotExactError: where a bridge is no longer what its run was made with.
    """
    if isinstance(run, Runs):
        runs = list(zip(run.batches, run.numbers, strict=True))
    else:
        several = [run] if isinstance(run, Run) else list(run) if isinstance(run, list) else []
        if not several or not all(isinstance(each, Run) for each in several):
            raise InputError(
                f"run is {type(run).__name__}: give a Run as denoise returns it, the Runs of "
                "denoise_many, or a list of runs"
            )
        ends = [0]
        for each in several:
            ends.append(ends[-1] + len(each.ends))
        runs = [(each, list(range(ends[i], ends[i + 1]))) for i, each in enumerate(several)]
    for each, _ in runs:
        require_run(each)
        if each.bridge is not runs[0][0].bridge:
            raise InputError("run: the runs are of several bridges: give those of one")
    if not any(bool((each.commit_step >= 0).any()) for each, _ in runs):
        raise InputError(
            "run: it wrote no token of its text (a fork of a row that had ended, for example): "
            "give one that did"
        )
    rows = sum(len(numbers) for _, numbers in runs)
    if texts is None:
        return Written(runs, _texts_of(runs, rows))
    numbers = torch.as_tensor(texts).cpu()
    if numbers.shape != (rows,) or numbers.is_floating_point() or bool((numbers < 0).any()):
        raise InputError(
            f"texts={tuple(numbers.shape)}: give an int for each of {rows} rows, 0 or more"
        )
    return Written(runs, numbers.long())


def _texts_of(runs: list[tuple[Run, list[int]]], rows: int) -> Int[Tensor, " row"]:
    """Number the texts by row: rows of one prompt are one, unless it is a single token."""
    texts: list[Any] = [None] * rows
    for run, numbers in runs:
        canvas = run.canvas
        given = canvas.tokens.tolist()
        for ids, length, number in zip(given, canvas.lengths.tolist(), numbers, strict=True):
            prompt = tuple(ids[:length])
            alone = sum(each != canvas.mask_id for each in prompt) <= 1
            texts[number] = prompt, number if alone else -1
    known = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([known[text] for text in texts])


def order_of(written: Written) -> str:
    """Return what decides the reveal order: ``"forced"``, ``"drawn"``, or the ``"model"``.

    Of several runs, the first of these that one of them has.

    A drawn order is decided by noise alone, before any pass: it is independent of the model.
    """
    if any(each.request.force is not None and each.request.force.order is not None
           for each, _ in written.runs):  # fmt: skip
        return "forced"
    return "drawn" if any(_ignores_the_model(each.sampler) for each, _ in written.runs) else "model"


class _Asked(Exception):
    """A sampler asked for probabilities."""


def _ignores_the_model(sampler: Sampler) -> bool:
    """Return whether a sampler chooses among two masks without the network's probabilities."""

    def ask() -> Tensor:
        raise _Asked

    times = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    masked = torch.ones(1, 2, dtype=torch.bool)
    try:
        sampler.reveal(masked, times, sampler.next_time(masked, times), ask)
    except _Asked:
        return False
    return True


def effects_by_quarter(
    values: Float[Tensor, "*measure entry"],
    quarter: Int[Tensor, " entry"],
    texts: Int[Tensor, " entry"],
    **options: Any,
) -> Effects:
    """Compute mean effects over texts ``[*measure, quarter]`` from values of single predictions.

    A text's value is the mean over its predictions in the bin; NaN where it has none.
    """
    bins = len(QUARTERS)
    numbers, of = texts.unique(return_inverse=True)
    cell = of * bins + quarter
    flat = values.reshape(-1, len(cell)).double()
    sums = flat.new_zeros(len(flat), len(numbers) * bins).index_add(1, cell, flat.nan_to_num())
    counts = torch.zeros_like(sums).index_add(1, cell, flat.isfinite().double())
    means = (sums / counts).view(*values.shape[:-1], len(numbers), bins)
    return mean_effects(means.movedim(-2, 0), **options)
