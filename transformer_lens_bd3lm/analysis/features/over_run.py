"""How often features are active over the steps of a run, text by text.

At each step of a finished run the active block's positions are masked, or were written at an
earlier step of the block, as in :func:`.feature_activity`.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.sae.splice import joined
from transformer_lens_bd3lm.denoising.along import along
from transformer_lens_bd3lm.denoising.run import Run


def rates_over_run(
    run: Run, sae: Any, name: str, numbers: Tensor
) -> Float[Tensor, "text 2 masks feature"]:
    """Compute the share of masked and of written positions at which each feature is active.

    Cells count masks of the row's block before the step, from 1 on; NaN where a text has no such
    positions.
    """
    batch, most = len(run.ends), run.block_size
    active = torch.zeros(batch, 2, most, len(numbers), dtype=torch.float64)
    rows = torch.zeros(batch, 2, most, dtype=torch.float64)
    block, hidden = -1, torch.zeros(0, dtype=torch.bool)
    for step, _, activations in along(run, [name]):
        features = sae.encode(joined(sae, name, activations[name]))[..., numbers]
        on = (features != 0).cpu().double()
        if step.block != block:
            block, hidden = step.block, step.masked
        left = step.masks_left
        running = (left > 0)[:, None]
        for kind, here in enumerate((step.masked, hidden & ~step.masked & running)):
            row, at = here.nonzero().unbind(-1)
            cell = (row, torch.full_like(row, kind), left[row] - 1)
            rows.index_put_(cell, torch.ones(len(row)).double(), accumulate=True)
            active.index_put_(cell, on[row, at], accumulate=True)
    return active / rows[..., None]
