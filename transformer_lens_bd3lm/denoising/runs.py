"""Finished runs of many prompts, kept by batch; a prompt's own run is cut out when it is read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.timeline import Timeline
from transformer_lens_bd3lm.result import Result, count


@dataclass(frozen=True, repr=False)
class Runs(Result, Sequence[Run]):
    """Finished runs of many prompts, in the order of the prompts: a sequence of :class:`Run`.

    ``runs[i]`` is the run that ``denoise`` makes of prompt i under noise row i, up to rounding: it
    can be replayed, forked and saved. Its ``passes`` are those of its batch.

    Attributes:
        canvases: canvas of each prompt alone.
        batches: the run of each batch.
        numbers: for each batch, the number of each row's prompt.
        bytes: memory of the largest batch in bytes, as computed before it ran.
    """

    canvases: list[Canvas] = field(repr=False)
    batches: list[Run] = field(repr=False)
    numbers: list[list[int]] = field(repr=False)
    bytes: int

    def __len__(self) -> int:
        return len(self.canvases)

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> list[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | list[Run]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]
        batch, row = self._places()[i]
        return run_of_row(batch, row, self.canvases[i])

    def __iter__(self) -> Iterator[Run]:
        for (batch, row), canvas in zip(self._places(), self.canvases, strict=True):
            yield run_of_row(batch, row, canvas)

    @property
    def text(self) -> list[str]:
        """The finished text of each prompt, special tokens kept; empty without a tokenizer."""
        texts = {id(batch): batch.text for batch in self.batches}
        if not all(texts.values()):
            return []
        return [texts[id(batch)][row] for batch, row in self._places()]

    @property
    def tokens(self) -> list[Int[Tensor, " pos"]]:
        """The finished ids of each text, prompt included, cut at the text's end."""
        return self._cut("tokens")

    @property
    def log_p(self) -> list[Float[Tensor, " pos"]]:
        """Log-probability in nats of each written token when it was revealed; NaN elsewhere."""
        return self._cut("log_p")

    @property
    def lead(self) -> list[Float[Tensor, " pos"]]:
        """By how much, in nats, each token's score beat the runner-up's; NaN elsewhere."""
        return self._cut("lead")

    def _cut(self, name: str) -> list[Tensor]:
        """Return a property of the batches as one tensor per prompt, cut at the text's end."""
        values = {id(batch): getattr(batch, name) for batch in self.batches}
        return [
            values[id(batch)][row, : int(batch.ends[row])].clone() for batch, row in self._places()
        ]

    def _places(self) -> list[tuple[Run, int]]:
        """Return the batch and the row of each prompt."""
        places = {
            number: (batch, row)
            for batch, numbers in zip(self.batches, self.numbers, strict=True)
            for row, number in enumerate(numbers)
        }
        return [places[i] for i in range(len(self))]

    def to_dict(self) -> dict[str, Any]:
        """Return the runs as plain values for JSON, in the order of the prompts."""
        return {
            "batches": self.numbers,
            "bytes": self.bytes,
            "runs": [run.to_dict() for run in self],
        }

    def _figures(self) -> str:
        written = sum(int((batch.commit_step >= 0).sum()) for batch in self.batches)
        return (
            f"{count(len(self), 'prompt')}, {written} tokens written in "
            f"{count(len(self.batches), 'batch')}, "
            f"{count(sum(batch.passes for batch in self.batches), 'pass')}"
        )


def run_of_row(batch: Run, row: int, canvas: Canvas) -> Run:
    """Cut the run of one row out of a batch, as if it had run alone.

    Its steps are those that revealed a token of the row, numbered from 0.

    Args:
        batch: a run without forced reveals or records, and no fork.
        row: row of the batch.
        canvas: the row's canvas alone.
    """
    length, window = canvas.tokens.shape[1], slice(row, row + 1)
    reveals, timeline = batch.commit_step_all[window, :length], batch.timeline
    # The index of a step is its number in the timeline, since the batch is no fork.
    own = reveals[reveals >= 0].unique().tolist()
    renumbered = torch.full((len(timeline.index) + 1,), -1)
    renumbered[own] = torch.arange(len(own))
    blocks = {start: number for number, (start, _) in enumerate(canvas.block_windows())}
    windows = [timeline.window[i] for i in own]
    noise = Noise(batch.noise.seed, rows=[batch.noise.row(row)])
    return replace(
        batch,
        canvas=canvas,
        final=batch.final[window, :length].clone(),
        ends=batch.ends[window].clone(),
        commit_step_all=renumbered[reveals],
        log_p_all=batch.log_p_all[window, :length].clone(),
        lead_all=batch.lead_all[window, :length].clone(),
        timeline=Timeline(
            index=list(range(len(own))),
            block=[blocks[start] for start, _ in windows],
            step=[timeline.step[i] for i in own],
            window=[(start, min(end, length)) for start, end in windows],
            t=[timeline.t[i][window].clone() for i in own],
        ),
        noise=noise,
        request=replace(batch.request, noise=noise),
    )
