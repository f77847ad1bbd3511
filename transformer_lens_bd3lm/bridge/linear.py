"""Linear layer that runs the fastest kernel for the few rows of a denoising step.

``few_rows`` measures which kernel that is on this machine. Within ``bd3lm.packed`` it may read a
second copy of the weight. A linear layer with hooks of its own runs ``F.linear``, and so does every
call for which ``few_rows.rows_of`` returns 0.
"""

from collections.abc import MutableMapping
from typing import Protocol
from weakref import WeakKeyDictionary

from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_bd3lm.bridge.few_rows import choose, rows_of
from transformer_lens_bd3lm.bridge.watched import watched


class Pack(Protocol):
    """Second copy of a linear's weight."""

    def __call__(
        self, x: Float[Tensor, "row width"], weight: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "row out"]:
        """Compute ``x W^T + bias``."""
        ...


packs: MutableMapping[nn.Linear, Pack] = WeakKeyDictionary()
"""Second copies in use, kept outside of their layers, so that copies of layers lack them."""


class Linear(nn.Linear):
    """Linear layer with the fastest kernel for few rows on a CPU."""

    def forward(self, input: Float[Tensor, "*dims width"]) -> Float[Tensor, "*dims out"]:
        """Compute ``input W^T + bias``."""
        weight, bias = self.weight, self.bias
        rows = rows_of(input, weight, bias)
        if not rows or watched(self):
            return super().forward(input)
        x = input.reshape(rows, -1)
        pack = packs.get(self) if packs else None
        compute = choose(rows, x.dtype).kernel.run if pack is None else pack
        return compute(x, weight, bias).reshape(*input.shape[:-1], -1)
