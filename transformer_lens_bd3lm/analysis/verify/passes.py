"""The passes of a verification: random texts, and the ways of calling both models on them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.verify.report import name_pass
from transformer_lens_bd3lm.model.inputs import read_block_size

_ROWS = 2


@dataclass(frozen=True)
class RandomText:
    """Random tokens of both streams and a sigma a row, on the models' device.

    Attributes:
        x_t: x_0 with about half of the positions masked, never position 0, always position 1.
        x_0: tokens other than the mask.
        sigma: noise levels that are not zero.
    """

    x_t: Int[Tensor, "batch pos"]
    x_0: Int[Tensor, "batch pos"]
    sigma: Float[Tensor, " batch"]

    def start(self, length: int) -> "RandomText":
        """Return the first ``length`` positions."""
        return RandomText(self.x_t[:, :length], self.x_0[:, :length], self.sigma)


def draw_text(config: Any, mask_id: int, length: int, seed: int, device: Any) -> RandomText:
    """Draw a random text for a checkpoint of this config."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(config.vocab_size - 1, (_ROWS, length), generator=generator)
    x_0 = x_0 + (x_0 >= mask_id)
    masked = torch.rand(_ROWS, length, generator=generator) < 0.5
    masked[:, 0], masked[:, 1] = False, True
    sigma = 0.1 + 2 * torch.rand(_ROWS, generator=generator)
    x_t = x_0.masked_fill(masked, mask_id)
    return RandomText(x_t.to(device), x_0.to(device), sigma.to(device))


@dataclass(frozen=True)
class Pass:
    """A view and a block size.

    Attributes:
        view: ``"sampling"``, ``"dual"`` or ``"single"``.
        block_size: tokens per block.
        given: the keyword ``block_size`` of both forwards; None leaves each model its own.
    """

    view: str
    block_size: int | None
    given: int | None

    def __str__(self) -> str:
        return name_pass(self.view, self.block_size)

    def keywords(self, text: RandomText) -> dict[str, Any]:
        """Return the keywords of either model's forward for a text."""
        keywords: dict[str, Any] = {"timesteps": text.sigma}
        if self.view == "dual":
            keywords["clean"] = text.x_0
        return keywords if self.given is None else keywords | {"block_size": self.given}


def list_passes(config: Any, block_sizes: Sequence[int | str]) -> list[Pass]:
    """List the passes: each model's own block size, then the others, in every view.

    Raises:
        BlockSizeError: for a value that is not a block size of this config.
    """
    if not config.cross_attn:
        return [Pass("single", None, None)]
    own, n = config.block_size, config.model_length
    given = [read_block_size(size, n) for size in block_sizes]
    sizes = [None, *dict.fromkeys(size for size in given if size != own)]
    return [Pass(view, size or own, size) for size in sizes for view in ("sampling", "dual")]
