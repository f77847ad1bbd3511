"""Masked positions of finished runs, or of given texts, as samples with their activations."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.over_run.masked_texts import MaskedTexts, TextMasks
from transformer_lens_bd3lm.analysis.over_run.written import QUARTERS, Predictions, Written
from transformer_lens_bd3lm.bridge.host import Bridge


@dataclass(frozen=True)
class Samples:
    """Masked positions that are probed, one entry each; the argument of a label function.

    Attributes:
        row: row of the runs, or number of the text ``[entry]``.
        text: number of its text ``[entry]``.
        position: absolute position ``[entry]``.
        masks_left: masks in its block ``[entry]``.
        step: index of the step in the run; of texts, number of the time ``[entry]``.
        token: token of the finished text ``[entry]``.
        column: number of its bin of masks left, or of its time ``[entry]``.
    """

    row: Int[Tensor, " entry"]
    text: Int[Tensor, " entry"]
    position: Int[Tensor, " entry"]
    masks_left: Int[Tensor, " entry"]
    step: Int[Tensor, " entry"]
    token: Int[Tensor, " entry"]
    column: Int[Tensor, " entry"]


@dataclass(frozen=True)
class SamplesOfRuns:
    """Predictions of finished runs as samples."""

    written: Written
    columns = QUARTERS
    fixed = "tokens, noise and reveal order of the run"
    masks = "those that the run met, by share of the block's masks that were left"

    @property
    def bridge(self) -> Bridge:
        """The bridge that runs the passes."""
        return self.written.first.bridge

    @property
    def passes(self) -> int:
        """Number of passes."""
        return self.written.steps

    def samples(self) -> Samples:
        """Return the samples, before any pass."""
        parts = []
        for run, rows in self.written.runs:
            for step in run.steps:
                none = torch.empty(int(step.masked.sum()), 0, dtype=torch.float64)
                x = Predictions.of(run, step, none, torch.tensor(rows))
                index = torch.full_like(x.row, x.step)
                text = self.written.texts[x.row]
                parts.append((x.row, text, x.position, x.masks_left, index, x.final, x.quarter))
        return Samples(*map(torch.cat, zip(*parts, strict=True)))

    def activations(
        self, update: Callable[..., None], names: list[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the activations of the samples, in their order."""
        for x, seen in self.written.along(update, names):
            yield {name: value[x.batch_row, x.offset] for name, value in seen.items()}


@dataclass(frozen=True)
class SamplesOfTexts:
    """Masked positions of given texts as samples."""

    given: MaskedTexts
    fixed = "texts and masks"
    masks = "each token masked with probability t, at each of the times"

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the times."""
        return tuple(f"t = {time:g}" for time in self.given.times)

    @property
    def bridge(self) -> Bridge:
        """The bridge that runs the passes."""
        return self.given.bridge

    @property
    def passes(self) -> int:
        """Number of passes."""
        return len(self.given.batches())

    def samples(self) -> Samples:
        """Return the samples, before any pass."""

        def entries(x: TextMasks) -> tuple[Tensor, ...]:
            time = torch.full_like(x.text, x.time)
            return x.text, x.text, x.position, x.masks_left, time, x.token, time

        parts = [entries(self.given.masks(*batch)) for batch in self.given.batches()]
        return Samples(*map(torch.cat, zip(*parts, strict=True)))

    def activations(
        self, update: Callable[..., None], names: list[str]
    ) -> Iterator[dict[str, Tensor]]:
        """Yield the activations of the samples, in their order."""
        for _, _, seen in self.given.passes(update, names):
            yield seen
