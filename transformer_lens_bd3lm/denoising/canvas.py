"""The canvas of a denoising run: prompts, the masks after them, and the grid of blocks over both.

Blocks lie on the grid of absolute positions, ``position // block_size``, as in training, whatever
the length of a prompt. So the block that a prompt ends in keeps the prompt's tokens and denoises
the rest, rows of unequal length share one grid, and a row's text does not depend on its batch. A
mask anywhere in a prompt makes its block one to fill in: tokens given to the right of that block
are invisible to it, since blocks are written from left to right.

Text longer than the context slides: a block reads the last ``context // block_size`` blocks, its
own included. What is stored of them still encodes what has slid out of view, so such a run is no
longer equal to recomputing its last context.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.block_size import own_block_size
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import bos_of, is_ids, padding, tokens_of, without_padding
from transformer_lens_bd3lm.checks import check_int, check_tokenizer
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.ids import check_ids
from transformer_lens_bd3lm.model.inputs import read_block_size


@dataclass(frozen=True)
class Canvas:
    """Token ids of a run before its first step, and the grid of blocks over them.

    Attributes:
        tokens: prompts, then masks ``[batch, pos]``.
        block_size: tokens per block.
        lengths: positions of prompt and new tokens, by row ``[batch]``, on the CPU; positions
            behind them only complete a row's last block, or make rows equally long.
        mask_id: the mask token's id.
        context: positions that the network can read at once.
        writes: positions that the run writes ``[batch, pos]``, on the CPU, of a fork: also those
            that were written before it. By default the masks of every block that holds a mask
            within ``lengths``.
    """

    tokens: Int[Tensor, "batch pos"]
    block_size: int
    lengths: Int[Tensor, " batch"]
    mask_id: int
    context: int
    writes: Bool[Tensor, "batch pos"] | None = None

    @property
    def reach(self) -> int | None:
        """Blocks that a block reads, its own included; None where it reads all before it."""
        slides = self.tokens.shape[1] > self.context
        return self.context // self.block_size if slides else None

    def window(self, block: int) -> tuple[int, int]:
        """Return ``start, end`` of a block of the grid, counted from position 0."""
        start = block * self.block_size
        return start, min(start + self.block_size, self.tokens.shape[1])

    def first_visible(self, position: int) -> int:
        """Return the first position that a block starting at ``position`` reads."""
        if self.reach is None:
            return 0
        return max(position // self.block_size - self.reach + 1, 0) * self.block_size

    def within_lengths(self) -> Bool[Tensor, "batch pos"]:
        """Return the positions within each row's length, on the CPU."""
        return torch.arange(self.tokens.shape[1]) < self.lengths[:, None]

    def masks(self) -> Bool[Tensor, "batch pos"]:
        """Return the positions that hold the mask, on the CPU."""
        return (self.tokens == self.mask_id).cpu()

    def written(self) -> Bool[Tensor, "batch pos"]:
        """Return the positions that the run writes, with those written before a fork."""
        masks = self.masks()
        return masks & self.blocks_of(masks) if self.writes is None else self.writes

    def to_denoise(self) -> Bool[Tensor, "batch pos"]:
        """Return the masks of blocks in which the run writes within ``lengths``, on the CPU.

        A row that ended before a fork writes nothing behind its end.
        """
        return self.masks() & self.blocks_of(self.written())

    def blocks_of(self, which: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Return the whole blocks that hold some of these positions within ``lengths``."""
        length, size = which.shape[1], self.block_size
        within = F.pad(which & self.within_lengths(), (0, -length % size))
        blocks = within.unflatten(1, (-1, size)).any(-1)
        return blocks.repeat_interleave(size, dim=1)[:, :length]

    def block_windows(self) -> list[tuple[int, int]]:
        """Return ``start, end`` of every block written in some row, a fork's past included."""
        written = self.written().any(0)
        grid = (self.window(b) for b in range(-(-written.shape[0] // self.block_size)))
        return [(start, end) for start, end in grid if bool(written[start:end].any())]


def read_prompts(bridge: Bridge, prompt: Any) -> list[Int[Tensor, " pos"]]:
    """Return ids of each row, from a string, strings, ids ``[batch, pos]``, rows of ids, or None.

    None is BOS alone. Padding at a row's end is left out.

    Raises:
        InputError: for anything else.
    """
    size = bridge.original_model.config.vocab_size
    if prompt is None:
        check_tokenizer(bridge, "prompt=None is its BOS; give ids")
        return [torch.tensor([bos_of(bridge)])]
    if isinstance(prompt, str):
        prompt = [prompt]
    if isinstance(prompt, tuple):
        prompt = list(prompt)
    if isinstance(prompt, list) and prompt and all(isinstance(part, str) for part in prompt):
        return [check_ids(row[None], size, "prompt")[0] for row in tokens_of(bridge, prompt)]
    rows: list[Tensor] = []
    if isinstance(prompt, list) and all(isinstance(part, list | Tensor) for part in prompt):
        rows = [torch.as_tensor(part) for part in prompt]
    elif is_ids(prompt):
        padding(torch.atleast_2d(prompt), bridge.cfg.pad_token_id)  # on the left: refused
        rows = list(torch.atleast_2d(prompt))
    if not rows or not all(row.ndim == 1 for row in rows):
        return list(check_ids(prompt, size, "prompt"))
    pad_id = bridge.cfg.pad_token_id
    words = [without_padding(row, pad_id) if is_ids(row) else row for row in rows]
    return [check_ids(row[None], size, "prompt")[0] for row in words]


def _canvas_length(length: int, size: int, context: int, pad_block: bool) -> int:
    """Return the length of a text's canvas: whole blocks with ``pad_block``, within the context."""
    total = -(-length // size) * size if pad_block else length
    return min(total, context) if length <= context else total


def read_canvas(
    bridge: Bridge, prompt: Any, max_new_tokens: int, block_size: int | str | None, pad_block: bool
) -> Canvas:
    """Return the canvas of one or more prompts; see :func:`read_prompts`.

    Raises:
        InputError: for ids, lengths or a block size that do not fit.
    """
    cfg, config = bridge.cfg, bridge.original_model.config
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it predicts the next "
            "token and has nothing to denoise; call bridge.generate"
        )
    check_int("max_new_tokens", max_new_tokens, 0)
    rows = read_prompts(bridge, prompt)
    if any(len(row) == 0 or int(row[0]) == cfg.mask_token_id for row in rows):
        raise InputError(
            "position 0 of the prompt is masked: it is BOS, which is given and never masked in "
            "training. Put BOS before the prompt"
        )
    lengths = torch.tensor([len(row) + max_new_tokens for row in rows])
    length = int(lengths.max())
    if config.cross_attn:
        asked = own_block_size(bridge) if block_size is None else block_size
        size = read_block_size(asked, config.model_length)
    else:
        if block_size is not None:
            read_block_size(block_size, config.model_length, has_blocks=False)
        size = length
    if length > config.model_length and (not config.cross_attn or size > config.model_length // 2):
        raise InputError(
            f"prompt and {max_new_tokens} new tokens make {length}, and the context is "
            f"{config.model_length}: longer texts need blocks of at most half the context"
        )
    total = _canvas_length(length, size, config.model_length, pad_block)
    for each in lengths.tolist():
        alone = _canvas_length(
            each, size if config.cross_attn else each, config.model_length, pad_block
        )
        if min(-(-each // size) * size, total) != alone:
            why = (
                "without blocks every position reads every other"
                if not config.cross_attn
                else "its last block would be longer than alone"
            )
            raise InputError(
                f"the text of the row of {each} positions would depend on the longest row, of "
                f"{length}: {why}. Give rows of one length, or run them one by one"
            )
    tokens = torch.full((len(rows), total), cfg.mask_token_id, device=cfg.device)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    canvas = Canvas(tokens, size, lengths, cfg.mask_token_id, config.model_length)
    if not canvas.block_windows():
        raise InputError("nothing is masked: give max_new_tokens > 0, or masks in the prompt")
    return canvas
