"""Complete the last block of a text with mask tokens, as every block is in training."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.block_size import ConfigAtBlockSize
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.inputs import read_input


def complete_block(
    config: ConfigAtBlockSize, input_ids: Any, clean: Any, attention_mask: Any, block_size: Any
) -> tuple[Int[Tensor, "batch pos"], None, None]:
    """Fill the last block up with mask tokens, at most to the context.

    Raises:
        InputError: beside ``clean`` or padding, whose streams it would tear apart.
    """
    padded = attention_mask is not None and not bool(torch.as_tensor(attention_mask).all())
    if clean is not None or padded:
        raise InputError(
            "pad_block=True is for one stream of equal lengths: drop clean, and pass rows of one "
            "length"
        )
    view = read_input(config, input_ids, sample_mode=True, block_size=block_size)
    size = view.block_size if view.kind == "block" else view.length
    target = min(-(-view.length // size) * size, config.model_length)
    return F.pad(view.ids, (0, target - view.length), value=config.mask_id), None, None
