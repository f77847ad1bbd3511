"""Masked positions of a cache, the only ones where its read-out predicts anything.

The loss reads ``log p(x_0 | x_t)`` where ``x_t`` is the mask, and nowhere else, so a prediction at
a clean position is untrained. Every cache keeps which positions of its noisy stream held a mask,
and tools that read predictions out of it are checked against them.

It knows nothing of a stream that was given as embeddings, nor which rows TransformerLens's
``analysis.logit_lens(..., batch_slice=...)`` kept, and causal models are not checked.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.utilities.slice import Slice

from transformer_lens_bd3lm.errors import InputError


def _keeping_axis(where: Any) -> Slice:
    """Read a slice as TransformerLens does, but keep the axis of a single index."""
    where = Slice.unwrap(where)
    return Slice([where.slice]) if where.mode == "int" else where


@dataclass(frozen=True)
class Predicted:
    """Positions of a cache, and which of them held a mask.

    Attributes:
        masked: True where the noisy stream held a mask.
        positions: their positions in the text.
        whole: whether they are all positions of the text.
    """

    masked: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, " pos"]
    whole: bool = True

    @classmethod
    def of(cls, ids: Int[Tensor, "batch pos"], mask_id: int) -> "Predicted":
        """Return every position of a noisy stream."""
        return cls(ids == mask_id, torch.arange(ids.shape[1], device=ids.device))

    def at(self, where: Any) -> "Predicted":
        """Return some of the positions, by anything that slices a cache."""
        where = _keeping_axis(where)
        positions = where.apply(self.positions)
        everything = where.mode in ("identity", "slice") and len(positions) == len(self.positions)
        return Predicted(where.apply(self.masked, dim=1), positions, self.whole and everything)

    def rows(self, where: Any) -> "Predicted":
        """Return the positions of some rows of the batch."""
        return replace(self, masked=_keeping_axis(where).apply(self.masked))

    def clean_stream(self) -> "Predicted":
        """Return the positions of the clean stream, which predicts nothing."""
        return replace(self, masked=torch.zeros_like(self.masked), whole=False)

    def require(self, asked: Any) -> None:
        """Refuse clean positions, unless all are read at once and some are masked.

        Raises:
            InputError: naming the first.
        """
        if bool(self.masked.all()) or (self.whole and bool(self.masked.any())):
            return
        row, i = (~self.masked).nonzero()[0].tolist()
        reason = f"position {int(self.positions[i])} is not masked in row {row}"
        if not bool(self.masked.any()) and asked is None:
            reason = "nothing is masked in this text, or it is the clean stream of a dual pass"
        elif asked is not None:
            reason = f"positions={asked}: {reason}"
        raise InputError(
            f"{reason}. The loss never looks at clean positions, and what is predicted there is "
            "untrained: give masked positions (TransformerLens's default is the last), or put a "
            "mask in their place"
        )
