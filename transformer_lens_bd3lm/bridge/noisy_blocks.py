"""Run noisy blocks of any texts side by side in one pass; each reads its clean past and itself.

A noisy block of the dual view reads the clean blocks before it and its own positions, and no other
noisy block. So blocks of any texts, under any mask patterns, can be rows of one pass. They share
the keys and values of the clean stream, which are computed once and not repeated for each pattern.
Only the blocks that are asked for are computed. Masked rows come first, so that the last layer and
the read-out take a slice of them::

    rows   masked of block 0, masked of block 1, ... | revealed of block 0, revealed of block 1, ...
    keys   clean of each text                        | rows

Such a pass has none of the axes that hooks expect, so passes with hooks have a batch row for each
text and mask pattern instead. A *place* is a position counted within its block.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.kv_cache import CleanStream
from transformer_lens_bd3lm.bridge.routing import TILE, Routing, Tile


@dataclass(frozen=True)
class NoisyBlocks:
    """Noisy blocks of one pass, sorted by text and start. All tensors are on the CPU.

    Attributes:
        length: number of positions of each text.
        text: number of each block's text.
        start: first position of each block.
        masked: which places of each block are masked; none after the end of the text.
    """

    length: int
    text: Int[Tensor, " block"]
    start: Int[Tensor, " block"]
    masked: Bool[Tensor, "block place"]

    @cached_property
    def rows(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Block and place of each row: masked ones first, each part sorted by block."""
        places = torch.arange(self.masked.shape[1])
        revealed = ~self.masked & (self.start[:, None] + places < self.length)
        block, place = torch.cat([self.masked.nonzero(), revealed.nonzero()]).T.contiguous()
        return block, place

    @property
    def masked_rows(self) -> slice:
        """The rows that hold a mask."""
        return slice(0, int(self.masked.sum()))

    @property
    def sources(self) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
        """Text and position of each row."""
        block, place = self.rows
        return self.text[block], self.start[block] + place

    @property
    def _clean(self) -> tuple[slice, slice]:
        """Texts and positions with clean keys in the pass: up to the start of the last block."""
        first, last = int(self.text[0]), int(self.text[-1])
        return slice(first, last + 1), slice(0, int(self.start.max()))

    def routing(self, stream: CleanStream, inv_freq: Tensor, like: Tensor) -> Routing:
        """Return the routing of the pass over the clean stream's stored keys and its own."""
        texts, past = self._clean
        owner = torch.arange(texts.start, texts.stop).repeat_interleave(past.stop)
        position = torch.arange(past.stop).repeat(texts.stop - texts.start)

        def dense() -> Bool[Tensor, "row key"]:
            block, _ = self.rows
            clean = (owner == self.text[block, None]) & (position < self.start[block, None])
            return torch.cat([clean, block[:, None] == block], dim=1).to(like.device)

        return Routing.of_rows(
            self.sources[1].to(like.device),
            list(self._tiles(like.device)),
            dense,
            stream.joined(texts, past),
            inv_freq,
            like,
        )

    def _tiles(self, device: torch.device) -> Iterator[Tile]:
        """Yield tiles of the pass: a few blocks of one text, their clean past, and themselves.

        A tile has at least one whole block, and a tile of one block needs no mask.
        """
        (texts, past), (block, _), size = self._clean, self.rows, self.masked.shape[1]
        clean, start = (texts.stop - texts.start) * past.stop, self.start.to(device)
        masked, every = self.masked_rows.stop, torch.arange(len(self.text) + 1)
        bounds = [torch.searchsorted(part, every) for part in (block[:masked], block[masked:])]
        edges = [bounds[0].tolist(), (bounds[1] + masked).tolist()]
        for first, last in _spans(self.text.tolist(), max(TILE // size, 1)):
            parts = [slice(edge[first], edge[last]) for edge in edges]
            queries = tuple(part for part in parts if part.start < part.stop)
            end, before = int(self.start[last - 1]), int(self.text[first]) - texts.start
            own = tuple(slice(clean + part.start, clean + part.stop) for part in queries)
            keys = (slice(before * past.stop, before * past.stop + end), *own)
            mask = None
            if last - first > 1:
                of = torch.cat([block[part] for part in queries]).to(device)
                reads = torch.arange(end, device=device) < start[of, None]
                mask = torch.cat([reads, of[:, None] == of], dim=1)
            yield Tile(queries, keys if end else own, mask)


def _spans(texts: list[int], blocks: int) -> Iterator[tuple[int, int]]:
    """Yield spans ``(first, last)`` of at most ``blocks`` blocks of one text."""
    last = 0
    for _, group in itertools.groupby(texts):
        first, last = last, last + len(list(group))
        for at in range(first, last, blocks):
            yield at, min(at + blocks, last)
