"""When the steps of a run happened, and in which block."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.denoising.step import Step


@dataclass(frozen=True)
class Timeline:
    """When each step of a run happened, one entry a step.

    Attributes:
        index: index of each step in the run; a forked run goes on counting.
        block: its block, counted from 0 at the first one denoised.
        step: its number within the block.
        window: absolute positions ``start, end`` of the block.
        t: each row's time ``[batch]``.
    """

    index: list[int]
    block: list[int]
    step: list[int]
    window: list[tuple[int, int]]
    t: list[Float[Tensor, " batch"]]

    @classmethod
    def empty(cls) -> "Timeline":
        """Return the timeline of a run before its first step."""
        return cls([], [], [], [], [])

    @classmethod
    def read(cls, x: dict[str, Tensor]) -> "Timeline":
        """Return the timeline that a run's tensors hold, in a saved run's names."""
        index, block, step = (x[f"steps/{name}"].tolist() for name in ("index", "block", "step"))
        window = [(start, end) for start, end in x["steps/window"].tolist()]
        return cls(index, block, step, window, list(x["steps/t"]))

    def tensors(self) -> dict[str, Tensor]:
        """Return the timeline as tensors, in a saved run's names."""
        return {
            "steps/index": torch.tensor(self.index),
            "steps/block": torch.tensor(self.block),
            "steps/step": torch.tensor(self.step),
            "steps/window": torch.tensor(self.window),
            "steps/t": torch.stack(self.t),
        }

    def add(self, step: Step) -> None:
        """Append a step."""
        for item in fields(self):
            getattr(self, item.name).append(getattr(step, item.name))
