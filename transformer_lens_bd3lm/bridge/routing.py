"""How the rows of a pass read each other: rotary angles, tiles of the mask, stored keys.

A view's square is mostly empty: n of a dual view's 2n x 2n columns are never read by anyone in
another block. ``Routing`` cuts it into tiles, each a few rows of queries with just the keys that
they can read, so a dual pass costs about a third of the dense square. Every tile is checked against
the rules of ``model.masks``.

What goes through a tile is in ``attention``.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.fused import attend, is_transformed
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.model.inputs import View
from transformer_lens_bd3lm.model.masks import dual_mask, sampling_mask
from transformer_lens_bd3lm.model.modules import rotary_tables

TILE = 128


@dataclass(frozen=True)
class Tile:
    """Rows of queries, the rows of keys that they may read, and a mask where not each reads all."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    mask: Bool[Tensor, "*batch q k"] | Float[Tensor, "*batch q k"] | None


def rotated(
    x: Float[Tensor, "batch row head d_head"],
    cos: Float[Tensor, "row d_head"],
    sin: Float[Tensor, "row d_head"],
) -> Float[Tensor, "batch row head d_head"]:
    """Rotary embedding, ``x cos + [x2, x1] sin``, the sign of ``-x2`` in ``sin``'s first half."""
    half = x.shape[-1] // 2
    if is_transformed():  # vmap has no rule for what is written in place
        return x * cos[:, None] + x.roll(half, dims=-1) * sin[:, None]
    out, sin = x * cos[:, None], sin[:, None]
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def signed_tables(
    positions: Int[Tensor, " row"], inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Float[Tensor, "row d_head"], Float[Tensor, "row d_head"]]:
    """Cosines and signed sines at these positions."""
    cos, sin = rotary_tables(positions, inv_freq, dtype)
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat([-first, second], dim=-1)


def additive(tile: Tile, dtype: torch.dtype) -> Tile:
    """The same tile with its mask as what is added to scores: 0 where visible, -inf where not."""
    if tile.mask is None:
        return tile
    zero = torch.zeros_like(tile.mask, dtype=dtype)
    return replace(tile, mask=zero.masked_fill(~tile.mask, -torch.inf))


def rows(x: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The named rows of ``[batch, head, row, d_head]``, in that order.

    Joined in the projections' own layout, ``[batch, row, head, d_head]``: whole rows are copied.
    """
    parts = [x[:, :, part] for part in slices]
    return parts[0] if len(parts) == 1 else joined(parts)


def joined(parts: list[Tensor]) -> Tensor:
    """Rows of ``[batch, head, row, d_head]`` one after another."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def spans(length: int, block_size: int) -> list[tuple[int, int]]:
    """Whole blocks, at most about ``TILE`` tokens together, as ``(start, end)``."""
    step = max(TILE // block_size, 1) * block_size
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def noisy_tiles(length: int, block_size: int, device: torch.device) -> list[Tile]:
    """A noisy stream alone over keys ``[clean | noisy]``: each span's clean past and itself."""
    tiles = []
    for start, end in spans(length, block_size):
        noisy = slice(start, end)
        keys = (slice(0, end), slice(length + start, length + end))
        if end - start <= block_size:
            tiles.append(Tile((noisy,), (slice(0, start), keys[1]), None))
            continue
        block = torch.arange(start, end, device=device) // block_size
        visible = torch.ones(end - start, start, dtype=torch.bool, device=device)
        noisy_reads_past = block[:, None] > block[None, :]
        within_noisy = block[:, None] == block[None, :]
        mask = torch.cat([visible, noisy_reads_past, within_noisy], dim=1)
        tiles.append(Tile((noisy,), keys, mask))
    return tiles


def dual_tiles(length: int, block_size: int, device: torch.device) -> list[Tile]:
    """The dual view: ``[noisy | clean]`` queries, each span over the clean past and itself."""
    tiles = []
    for start, end in spans(length, block_size):
        noisy, clean = slice(start, end), slice(length + start, length + end)
        past = slice(length, length + start)
        if end - start <= block_size:
            tiles.append(Tile((noisy,), (past, noisy), None))
            tiles.append(Tile((clean,), (slice(length, length + end),), None))
            continue
        block = torch.arange(start, end, device=device) // block_size
        visible = torch.ones(end - start, start, dtype=torch.bool, device=device)
        within_noisy = block[:, None] == block[None, :]
        noisy_reads_past = block[:, None] > block[None, :]
        clean_reads_past = block[:, None] >= block[None, :]
        never = torch.zeros_like(within_noisy)
        upper = torch.cat([visible, noisy_reads_past, within_noisy], dim=1)
        lower = torch.cat([visible, clean_reads_past, never], dim=1)
        keys = (slice(length, length + end), noisy)
        tiles.append(Tile((noisy, clean), keys, torch.cat([upper, lower])))
    return tiles


def block_tiles(length: int, block_size: int, device: torch.device) -> list[Tile]:
    """The sampling view: each span over everything up to its own end."""
    tiles = []
    for start, end in spans(length, block_size):
        whole = end - start <= block_size
        mask = None if whole else sampling_mask(end - start, end, block_size, device)
        tiles.append(Tile((slice(start, end),), (slice(0, end),), mask))
    return tiles


@runtime_checkable
class Store(Protocol):
    """Keys and values from outside a pass: a layer's own go in, all that its rows read come out."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Everything up to the end of the pass's rows."""
        ...


@dataclass
class Routing:
    """How the rows of one pass read each other, shared by all its layers.

    Attributes:
        cos: rotary cosines of the pass's rows ``[row, d_head]``.
        sin: rotary sines, signed (see :func:`rotated`).
        tiles: queries and keys of the fused path.
        dense: makes the same rules as one square ``[*batch, row, key]``; None where all is visible.
        cache: where finished blocks' keys and values are kept, if this pass reads them.
        first_key: how many of the stored keys have slid out of everybody's view.
        constants: adaLN's vectors by layer, kept from pass to pass of a run in which c is constant.
    """

    cos: Float[Tensor, "row d_head"]
    sin: Float[Tensor, "row d_head"]
    tiles: list[Tile]
    dense: Callable[[], Bool[Tensor, "*batch row key"] | None]
    cache: Store | None = None
    first_key: int = 0
    constants: dict[int, tuple[Tensor, ...]] | None = None

    @classmethod
    def of_view(
        cls,
        view: View,
        inv_freq: Tensor,
        dtype: torch.dtype,
        padding: Bool[Tensor, "batch pos"] | None = None,
    ) -> "Routing":
        """The routing of a whole view; ``padding`` is False where a key is none."""
        device, n = view.ids.device, view.length
        cos, sin = signed_tables(view.positions(), inv_freq, dtype)
        if padding is not None:
            keys = (padding.repeat(1, 2) if view.dual else padding)[:, None, None, :]
            square = view.mask()
            square = keys if square is None else square & keys
            everything = slice(0, view.ids.shape[1])
            tile = Tile((everything,), (everything,), square)
            return cls(cos, sin, [additive(tile, dtype)], lambda: square)
        if view.kind == "open":
            tiles = block_tiles(n, n, device)
        elif view.kind == "causal":
            tiles = block_tiles(n, 1, device)
        else:
            tiles = (dual_tiles if view.dual else block_tiles)(n, view.block_size, device)
        return cls(cos, sin, [additive(tile, dtype) for tile in tiles], view.mask)

    @classmethod
    def of_window(
        cls,
        start: int,
        end: int,
        block_size: int,
        cache: KVCache,
        inv_freq: Tensor,
        like: Tensor,
        reach: int | None = None,
    ) -> "Routing":
        """Rows ``start:end`` over everything stored before them and themselves.

        With ``reach`` a block reads at most so many blocks, its own included; positions then grow
        without end, and their angles are computed in float64 (in float32 on "mps", which has none).
        """
        if reach is not None and like.device.type != "mps":
            inv_freq = inv_freq.double()
        cos, sin = signed_tables(torch.arange(start, end, device=like.device), inv_freq, like.dtype)
        first_block, last_block = start // block_size, (end - 1) // block_size
        first = 0 if reach is None else max(first_block - reach + 1, 0) * block_size
        dense = None
        if last_block > first_block:
            dense = sampling_mask(end - start, end - first, block_size, like.device, reach)
        tile = Tile((slice(0, end - start),), (slice(0, end - first),), dense)
        return cls(cos, sin, [additive(tile, like.dtype)], lambda: dense, cache, first)

    @classmethod
    def of_noisy(
        cls, length: int, block_size: int, cache: Store, inv_freq: Tensor, like: Tensor
    ) -> "Routing":
        """A whole noisy stream over a clean stream's stored keys and values, and itself."""
        device = like.device
        cos, sin = signed_tables(torch.arange(length, device=device), inv_freq, like.dtype)
        tiles = [additive(t, like.dtype) for t in noisy_tiles(length, block_size, device)]

        def dense() -> Bool[Tensor, "row key"]:
            noisy, clean = dual_mask(length, block_size, device)[:length].chunk(2, dim=1)
            return torch.cat([clean, noisy], dim=1)

        return cls(cos, sin, tiles, dense, cache)

    def tiles_of(self, queries: slice) -> list[Tile]:
        """The tiles of these rows alone, numbered as if no other row were there."""
        narrowed = []
        for tile in self.tiles:
            kept, chosen, passed = [], [], 0
            for part in tile.queries:
                start, stop = max(part.start, queries.start), min(part.stop, queries.stop)
                if start < stop:
                    kept.append(slice(start - queries.start, stop - queries.start))
                    first = passed + start - part.start
                    chosen.append(slice(first, first + stop - start))
                passed += part.stop - part.start
            mask = tile.mask
            if mask is not None and kept:
                mask = torch.cat([mask[..., part, :] for part in chosen], dim=-2)
            if kept:
                narrowed.append(Tile(tuple(kept), tile.keys, mask))
        return narrowed

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile]
    ) -> Float[Tensor, "batch head row d_head"]:
        """``z``, tile by tile, with the scores never in memory."""
        parts: list[tuple[int, Tensor]] = []
        for tile in tiles:
            z = attend(rows(q, tile.queries), rows(k, tile.keys), rows(v, tile.keys), tile.mask)
            sizes = [part.stop - part.start for part in tile.queries]
            starts = [part.start for part in tile.queries]
            parts += zip(starts, z.split(sizes, dim=2), strict=True)
        ordered = [z for _, z in sorted(parts, key=lambda part: part[0])]
        return ordered[0] if len(ordered) == 1 else joined(ordered)
