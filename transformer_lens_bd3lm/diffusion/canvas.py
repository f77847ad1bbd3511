"""What a denoising run fills in: a prompt, the masks after it, and the grid of blocks over both.

Blocks lie on the grid of absolute positions, ``position // block_size``, as in training. So the
block that a prompt ends in keeps the prompt's tokens and denoises the rest, and a mask anywhere in
a prompt makes its block one to fill in. Rows of one length only.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.views import check_ids, read_block_size
from transformer_lens_bd3lm.errors import InputError


@dataclass(frozen=True)
class Canvas:
    """The ids to fill in and the grid of blocks over them.

    Attributes:
        tokens: prompt, then masks ``[batch, pos]``.
        block_size: tokens a block.
        length: positions that were asked for; the rest only completes the last block.
        mask_id: the mask token's id.
    """

    tokens: Int[Tensor, "batch pos"]
    block_size: int
    length: int
    mask_id: int

    def windows(self) -> list[tuple[int, int]]:
        """``start, end`` of every block with a mask that was asked for in some row."""
        total, size = self.tokens.shape[1], self.block_size
        grid = [(start, min(start + size, total)) for start in range(0, total, size)]
        masked = self.tokens == self.mask_id
        masked[:, self.length :] = False
        return [(start, end) for start, end in grid if bool(masked[:, start:end].any())]


def read_canvas(
    bridge: Any, prompt: Any, max_new_tokens: int, block_size: int | str | None, pad_block: bool
) -> Canvas:
    """The canvas of a prompt: a string, strings of one length in tokens, ids, or None (BOS alone).

    Raises:
        InputError: for ids, lengths or a block size that do not fit.
    """
    cfg, config = bridge.cfg, bridge.original_model.config
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it predicts the next "
            "token and has "
            "nothing to denoise"
        )
    if (
        isinstance(max_new_tokens, bool)
        or not isinstance(max_new_tokens, int)
        or max_new_tokens < 0
    ):
        raise InputError(f"max_new_tokens={max_new_tokens!r}: give an int ≥ 0")
    if prompt is None and bridge.tokenizer is None:
        raise InputError(
            "prompt is None, for BOS alone, but this bridge has no tokenizer: give ids"
        )
    if prompt is None:
        ids = torch.tensor([[bridge.tokenizer.bos_token_id]])
    elif isinstance(prompt, str):
        ids = bridge.to_tokens(prompt, truncate=False)
    elif isinstance(prompt, list) and all(isinstance(text, str) for text in prompt):
        encoded = [bridge.to_tokens(text, truncate=False) for text in prompt]
        if len({x.shape[1] for x in encoded}) != 1:
            lengths = [x.shape[1] for x in encoded]
            raise InputError(
                f"prompts of {lengths} tokens: give prompts of one length, or one at a time"
            )
        ids = torch.cat(encoded)
    else:
        ids = prompt
    ids = check_ids(ids, config.vocab_size, "prompt").to(cfg.device)
    length = ids.shape[1] + max_new_tokens
    if length > config.model_length:
        raise InputError(
            f"{ids.shape[1]} prompt tokens and {max_new_tokens} new ones make {length}: the "
            "context is "
            f"{config.model_length}"
        )
    if not config.cross_attn:
        if block_size is not None:
            read_block_size(block_size, config.model_length, has_blocks=False)
        size = total = length
    else:
        size = read_block_size(
            cfg.block_size if block_size is None else block_size, config.model_length
        )
        total = min(-(-length // size) * size, config.model_length) if pad_block else length
    tokens = ids.new_full((ids.shape[0], total), cfg.mask_token_id)
    tokens[:, : ids.shape[1]] = ids
    if not bool((tokens[:, :length] == cfg.mask_token_id).any()):
        raise InputError("nothing is masked: give max_new_tokens > 0, or masks in the prompt")
    return Canvas(tokens, size, length, cfg.mask_token_id)
