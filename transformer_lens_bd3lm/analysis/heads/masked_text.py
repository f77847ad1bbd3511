"""Texts with masks as their masked queries read them: what a rule is a function of.

In the dual view ``[x_t | x_0]`` a query reads each position from one stream alone: its own block
from the noisy stream, all earlier blocks from the clean one. So keys are positions, ``[batch,
query, key]``, in both views.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.block_size import own_block_size
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import read_ids
from transformer_lens_bd3lm.checks import check_bos_given, check_finished, check_noised
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.inputs import read_input
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.result import brief


@dataclass(frozen=True)
class MaskedText:
    """Texts with masks, and what their masked queries may read; the argument of a rule function.

    Attributes:
        x_t: token ids with masks ``[batch, pos]``.
        clean: token ids without masks, x_0 ``[batch, pos]``; None in the sampling view.
        mask_id: id of the mask token.
        columns: which columns of a pattern each query may read ``[query, column]``: n columns in
            the sampling view, 2n ``[noisy | clean]`` in the dual view.
    """

    x_t: Int[Tensor, "batch pos"]
    clean: Int[Tensor, "batch pos"] | None
    mask_id: int
    columns: Bool[Tensor, "query column"]

    __repr__ = brief

    @cached_property
    def masked(self) -> Bool[Tensor, "batch pos"]:
        """Which positions are masked: the queries."""
        return self.x_t == self.mask_id

    @cached_property
    def readable(self) -> Bool[Tensor, "query key"]:
        """Which positions a query may read, in either stream."""
        return self.columns.unflatten(-1, (-1, len(self.columns))).any(1)

    @cached_property
    def read(self) -> Int[Tensor, "batch query key"]:
        """The id that the query reads at a key, a token's or the mask's; -1 where it reads none."""
        noisy = self.x_t[:, None].expand(-1, len(self.columns), -1)
        if self.clean is not None:
            past = self.columns.chunk(2, dim=-1)[1]
            noisy = torch.where(past, self.clean[:, None], noisy)
        return noisy.masked_fill(~self.readable, -1)

    @cached_property
    def legal(self) -> Bool[Tensor, "batch query key"]:
        """The keys that a rule may name: those where a masked query reads a token, not a mask."""
        return self.masked[:, :, None] & self.readable & (self.read != self.mask_id)

    def at(self, offset: int | Int[Tensor, "batch query"]) -> Bool[Tensor, "batch query key"]:
        """Return booleans, True at the key at an offset from its query, if that key is legal.

        Args:
            offset: number of positions to the right of the query; negative to the left.
        """
        place = torch.arange(len(self.columns), device=self.x_t.device)
        return self.legal & (place == (place + offset)[..., None])

    def attention(self, pattern: Float[Tensor, "batch head row column"]) -> Float[Tensor, "..."]:
        """Return the attention of masked queries by position ``[masked query, head, key]``.

        Args:
            pattern: a layer's ``attn.hook_pattern``; returned in float32 or wider.
        """
        n = len(self.columns)
        rows = at_least_float32(pattern[:, :, :n].transpose(1, 2)[self.masked])
        readable = self.columns[self.masked.nonzero()[:, 1]]
        return (rows * readable[:, None]).unflatten(-1, (-1, n)).sum(-2)


def read_masked_text(bridge: Bridge, tokens: Any, clean: Any, block_size: Any) -> MaskedText:
    """Read the texts and the block size that are given to ``detect_heads``; run nothing.

    Raises:
        InputError: for the autoregressive baseline, for texts that do not fit each other or the
            checkpoint, and for masks at BOS or nowhere.
        BlockSizeError: for a value that is not a block size of this checkpoint.
    """
    config, mask_id = bridge.original_model.config, bridge.cfg.mask_token_id
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it has never seen a "
            "mask; transformer_lens.head_detector is for such models"
        )
    x_t = read_ids(bridge, tokens)
    x_0 = None if clean is None else read_ids(bridge, clean, "clean")
    if block_size is None and config.cross_attn:
        block_size = own_block_size(bridge)
    alone = True if x_0 is None else None
    view = read_input(config, x_t, clean=x_0, sample_mode=alone, block_size=block_size)
    columns = view.mask()
    if columns is None:
        columns = torch.ones(view.length, view.length, dtype=torch.bool, device=view.ids.device)
    text = MaskedText(view.ids[:, : view.length], x_0, mask_id, columns[: view.length])
    _check_masks(text)
    return text


def _check_masks(text: MaskedText) -> None:
    """Check that some position after BOS is masked, and that the clean text is the same text.

    Raises:
        InputError: with the first position that does not fit.
    """
    check_bos_given("tokens", text.x_t, text.mask_id)
    if not bool(text.masked.any()):
        raise InputError(
            "tokens hold no mask: mask some position after the first, only masked queries are "
            "trained to predict"
        )
    if text.clean is not None:
        way_out = "give the finished text, and masks in tokens"
        check_finished("clean", text.clean, text.mask_id, way_out)
        check_noised("tokens", text.x_t, "clean", text.clean, text.mask_id)
