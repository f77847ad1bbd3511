"""Where the read-out of a cache predicts anything: at masked positions.

The loss looks at ``log p(x_0 | x_t)`` where ``x_t`` is the mask, and nowhere else, so what the
network says at a clean position is untrained. A run notes which positions of its noisy stream held
a mask, whatever it caches; tools that read predictions out of the cache ask here.

It knows nothing of a stream that was given as embeddings, nor which rows the host's own
``analysis.logit_lens(..., batch_slice=...)`` kept, and it does not look at a causal model.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.utilities import Slice

from transformer_lens_bd3lm.errors import InputError


def keeping(where: Any) -> Slice:
    """As the host reads what is asked for, but a single index leaves its axis there."""
    where = Slice.unwrap(where)
    return Slice([where.slice]) if where.mode == "int" else where


@dataclass(frozen=True)
class Predicted:
    """The positions of a cache.

    Attributes:
        masked: where the noisy stream held a mask.
        positions: which positions of the text these are.
        whole: whether they are all there were, and not some that were asked for.
    """

    masked: Bool[Tensor, "batch pos"]
    positions: Int[Tensor, " pos"]
    whole: bool = True

    @classmethod
    def of(cls, ids: Int[Tensor, "batch pos"], mask_id: int) -> "Predicted":
        """Every position of a noisy stream."""
        return cls(ids == mask_id, torch.arange(ids.shape[1], device=ids.device))

    def at(self, where: Any) -> "Predicted":
        """Some of the positions, asked for as one would of a cache."""
        where = keeping(where)
        positions = where.apply(self.positions)
        all_of = where.mode in ("identity", "slice") and len(positions) == len(self.positions)
        return Predicted(where.apply(self.masked, dim=1), positions, self.whole and all_of)

    def rows(self, where: Any) -> "Predicted":
        """Some rows of the batch."""
        return replace(self, masked=keeping(where).apply(self.masked))

    def clean_stream(self) -> "Predicted":
        """The clean stream beside it, which predicts nothing."""
        return replace(self, masked=torch.zeros_like(self.masked), whole=False)

    def require(self, asked: Any) -> None:
        """Refuse clean positions, unless all are read at once and some are masked.

        Raises:
            InputError: naming the first.
        """
        if bool(self.masked.all()) or (self.whole and bool(self.masked.any())):
            return
        row, i = (~self.masked).nonzero()[0].tolist()
        told = f"position {int(self.positions[i])} is not masked in row {row}"
        if not bool(self.masked.any()) and asked is None:
            told = "nothing is masked in this text, or it is the clean stream of a dual pass"
        elif asked is not None:
            told = f"positions={asked}: {told}"
        raise InputError(
            f"{told}. The loss never looks at clean positions, and what is predicted there is "
            "untrained: give masked positions (the host's default is the last), or put a mask in "
            "their place"
        )
