"""Warn of passes that are off-distribution: a block that reads masks in an earlier one.

A block is trained beside clean earlier blocks. In the dual view it reads them from the clean
stream, whatever is masked in the noisy one. The sampling view has one stream, so there only the
last block of a row may have masks: a mask in a block that another follows, masked or clean itself,
is read as it never was in training. At block size 1 that is any mask but one in the last position;
at ``"full"`` there is one block, and no warning. Everything up to the end of the first masked block
is on-distribution all the same.

The warning comes once a bridge. The package's own passes that put masks anywhere say so in their
results, or compare modules and predict nothing: they run within ``masks_anywhere``.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import OffDistributionWarning
from transformer_lens_bd3lm.model.ids import has_values
from transformer_lens_bd3lm.model.inputs import View


def warn_once(model: Any, view: View, mask_id: int, real: Bool[Tensor, "batch pos"] | None) -> None:
    """Warn, once a bridge, of a mask in a block that another block of its row follows.

    Args:
        model: the wrapped model, which remembers whether it has warned.
        view: the pass; only a sampling view of several blocks is checked.
        mask_id: the mask token's id.
        real: True at positions that are not padding; None without padding.
    """
    one_block = view.kind != "block" or view.length <= view.block_size
    if view.dual or one_block or model.warned_off_distribution or not has_values(view.ids):
        return
    block = torch.arange(view.length, device=view.ids.device) // view.block_size
    last = block[-1] if real is None else (real.sum(-1, keepdim=True) - 1) // view.block_size
    early = (view.ids == mask_id) & (block < last)
    if not bool(early.any()):
        return
    model.warned_off_distribution = True
    row, position = early.nonzero()[0].tolist()
    end = (position // view.block_size + 1) * view.block_size
    warnings.warn(
        f"row {row} has a mask at position {position}, and later blocks (block size "
        f"{view.block_size}) that read it; in training earlier blocks are clean, so activations "
        f"and predictions from position {end} on are off-distribution. Put masks into the last "
        "block only (pad_block=True completes it), give the finished text as clean=, or set a "
        "larger block_size. This warning is given once per bridge",
        OffDistributionWarning,
        stacklevel=2,
    )


@contextmanager
def masks_anywhere(bridge: Bridge) -> Iterator[None]:
    """Run passes without the warning, whose results say themselves what is off-distribution."""
    model = bridge.original_model
    before, model.warned_off_distribution = model.warned_off_distribution, True
    try:
        yield
    finally:
        model.warned_off_distribution = before
