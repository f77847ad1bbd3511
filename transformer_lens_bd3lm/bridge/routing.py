"""Route the rows of a pass to the keys that they read: angles, tiles of the mask, stored keys.

A view's mask is mostly empty: the n noisy columns of a dual view are read only within their block.
``Routing`` cuts it into tiles, each a few rows of queries with just the keys that they can read, so
a dual pass costs about a third of the dense square. The tests compare the tiles with the masks of
``model.masks``.

Queries, keys and values come from ``attention``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from transformer_lens_bd3lm.bridge.fused import attend, is_transformed
from transformer_lens_bd3lm.bridge.watched import modules_of, watched
from transformer_lens_bd3lm.model.inputs import View
from transformer_lens_bd3lm.model.masks import branching_mask, dual_mask, sampling_mask
from transformer_lens_bd3lm.model.modules import rotary_tables

TILE = 128


@dataclass(frozen=True)
class Tile:
    """Rows of queries, rows of keys, and a mask unless every query reads every key."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    mask: Bool[Tensor, "*batch q k"] | Float[Tensor, "*batch q k"] | None


def rotated(
    x: Float[Tensor, "batch row head d_head"],
    cos: Float[Tensor, "row d_head"],
    sin: Float[Tensor, "row d_head"],
) -> Float[Tensor, "batch row head d_head"]:
    """Rotate, ``x cos + [x2, x1] sin``, with the sign of ``-x2`` in the first half of ``sin``."""
    half = x.shape[-1] // 2
    if is_transformed():  # vmap has no rule for what is written in place
        return x * cos[:, None] + x.roll(half, dims=-1) * sin[:, None]
    out, sin = x * cos[:, None], sin[:, None]
    out[..., :half].addcmul_(x[..., half:], sin[..., :half])
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def _signed_tables(
    positions: Int[Tensor, " row"], inv_freq: Tensor, dtype: torch.dtype
) -> tuple[Float[Tensor, "row d_head"], Float[Tensor, "row d_head"]]:
    """Return cosines and signed sines at these positions."""
    cos, sin = rotary_tables(positions, inv_freq, dtype)
    first, second = sin.chunk(2, dim=-1)
    return cos, torch.cat([-first, second], dim=-1)


def _additive(tile: Tile, dtype: torch.dtype) -> Tile:
    """Return the tile with an additive mask: 0 where visible, -inf where not."""
    if tile.mask is None:
        return tile
    zero = torch.zeros_like(tile.mask, dtype=dtype)
    return replace(tile, mask=zero.masked_fill(~tile.mask, -torch.inf))


def _rows(x: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """Return slices of the rows of ``[batch, head, row, d_head]``, in order.

    They are joined in the projections' layout, ``[batch, row, head, d_head]``, to copy whole rows.
    """
    parts = [x[:, :, part] for part in slices]
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: list[Tensor]) -> Tensor:
    """Join rows of ``[batch, head, row, d_head]``."""
    return torch.cat([part.transpose(1, 2) for part in parts], dim=1).transpose(1, 2)


def _spans(length: int, block_size: int) -> list[tuple[int, int]]:
    """Return spans ``(start, end)`` of whole blocks, about ``TILE`` tokens at most."""
    step = max(TILE // block_size, 1) * block_size
    return [(start, min(start + step, length)) for start in range(0, length, step)]


def _noisy_tiles(length: int, block_size: int, device: torch.device) -> list[Tile]:
    """Tile a noisy stream over ``[clean | noisy]``: each span reads its clean past and itself."""
    tiles = []
    for start, end in _spans(length, block_size):
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
    """Tile the dual view ``[noisy | clean]``: each span reads the clean past and itself."""
    tiles = []
    for start, end in _spans(length, block_size):
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
    """Tile the sampling view: each span reads everything up to its own end."""
    tiles = []
    for start, end in _spans(length, block_size):
        whole = end - start <= block_size
        mask = None if whole else sampling_mask(end - start, end, block_size, device)
        tiles.append(Tile((slice(start, end),), (slice(0, end),), mask))
    return tiles


@runtime_checkable
class Store(Protocol):
    """Stored keys and values: a layer adds its own, and gets all that its rows read."""

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values; return all that the rows of the pass read."""
        ...


@dataclass
class Routing:
    """Rotary angles, mask and stored keys of one pass, shared by all its layers.

    Attributes:
        cos: rotary cosines of the pass's rows ``[row, d_head]``.
        sin: rotary sines, signed (see :func:`rotated`).
        tiles: queries and keys of the fused path.
        dense: returns the mask as one ``[*batch, row, key]``; None where everything is visible.
        cache: where finished blocks' keys and values are kept, if this pass reads them.
        first_key: number of stored keys that have slid out of view of all rows.
        constants: outputs of the conditioning's components, kept between the passes of a run whose
            time is the same in all of them to the network.
    """

    cos: Float[Tensor, "row d_head"]
    sin: Float[Tensor, "row d_head"]
    tiles: list[Tile]
    dense: Callable[[], Bool[Tensor, "*batch row key"] | None]
    cache: Store | None = None
    first_key: int = 0
    constants: dict[nn.Module, Any] | None = None

    @classmethod
    def of_view(
        cls,
        view: View,
        inv_freq: Tensor,
        dtype: torch.dtype,
        padding: Bool[Tensor, "batch pos"] | None = None,
    ) -> "Routing":
        """Return the routing of a whole view; ``padding`` is True at real tokens."""
        device, n = view.ids.device, view.length
        cos, sin = _signed_tables(view.positions(), inv_freq, dtype)
        if padding is not None:
            keys = (padding.repeat(1, 2) if view.dual else padding)[:, None, None, :]
            square = view.mask()
            square = keys if square is None else square & keys
            everything = slice(0, view.ids.shape[1])
            tile = Tile((everything,), (everything,), square)
            return cls(cos, sin, [_additive(tile, dtype)], lambda: square)
        if view.kind == "open":
            tiles = block_tiles(n, n, device)
        elif view.kind == "causal":
            tiles = block_tiles(n, 1, device)
        else:
            tiles = (dual_tiles if view.dual else block_tiles)(n, view.block_size, device)
        return cls(cos, sin, [_additive(tile, dtype) for tile in tiles], view.mask)

    @classmethod
    def of_window(
        cls,
        start: int,
        end: int,
        block_size: int,
        cache: Store,
        inv_freq: Tensor,
        like: Tensor,
        reach: int | None = None,
        branches: Sequence[tuple[int, int]] = (),
    ) -> "Routing":
        """Return the routing of rows ``start:end`` over all stored before them and themselves.

        Rows of ``branches`` follow, each a window of positions from the last block on: another
        state of that block, maybe with blocks after it. A branch reads itself and what is before
        that block. With ``reach`` a block reads at most ``reach`` blocks, its own included;
        positions then grow without end, and their angles are computed in float64 (in float32 on
        "mps", which has none).
        """
        if reach is not None and like.device.type != "mps":
            inv_freq = inv_freq.double()
        windows, device = [(start, end), *branches], like.device
        positions = torch.cat([torch.arange(*window, device=device) for window in windows])
        cos, sin = _signed_tables(positions, inv_freq, like.dtype)
        first_block, last_block = start // block_size, (end - 1) // block_size
        first = 0 if reach is None else max(first_block - reach + 1, 0) * block_size
        dense = None
        if branches:
            number = torch.cat(
                [positions.new_full((high - low,), i) for i, (low, high) in enumerate(windows, 1)]
            )
            number = number.where(positions >= branches[0][0], 0)
            stored = torch.arange(first, start, device=device)
            keys = torch.cat([stored, positions]), torch.cat([torch.zeros_like(stored), number])
            dense = branching_mask((positions, number), keys, block_size, reach)
        elif last_block > first_block:
            dense = sampling_mask(end - start, end - first, block_size, device, reach)
        rows = len(positions)
        tile = Tile((slice(0, rows),), (slice(0, start - first + rows),), dense)
        return cls(cos, sin, [_additive(tile, like.dtype)], lambda: dense, cache, first)

    @classmethod
    def of_noisy(
        cls, length: int, block_size: int, cache: Store, inv_freq: Tensor, like: Tensor
    ) -> "Routing":
        """Return the routing of a noisy stream over a clean stream's stored keys, and itself."""
        device = like.device
        cos, sin = _signed_tables(torch.arange(length, device=device), inv_freq, like.dtype)
        tiles = [_additive(t, like.dtype) for t in _noisy_tiles(length, block_size, device)]

        def dense() -> Bool[Tensor, "row key"]:
            noisy, clean = dual_mask(length, block_size, device)[:length].chunk(2, dim=1)
            return torch.cat([clean, noisy], dim=1)

        return cls(cos, sin, tiles, dense, cache)

    @classmethod
    def of_rows(
        cls,
        positions: Int[Tensor, " row"],
        tiles: list[Tile],
        dense: Callable[[], Bool[Tensor, "*batch row key"] | None],
        cache: Store,
        inv_freq: Tensor,
        like: Tensor,
    ) -> "Routing":
        """Return the routing of rows at any positions, by tiles whose masks are boolean."""
        cos, sin = _signed_tables(positions, inv_freq, like.dtype)
        return cls(cos, sin, [_additive(tile, like.dtype) for tile in tiles], dense, cache)

    def tiles_of(self, queries: slice) -> list[Tile]:
        """Return the tiles of these query rows alone, with queries numbered from 0."""
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

    def of_constant(self, component: nn.Module, given: Tensor) -> Any:
        """Return what a component of the conditioning computes; once a run where it is constant."""
        if self.constants is None or watched(*modules_of(component)):
            return component(given)
        if component not in self.constants:
            self.constants[component] = component(given)
        return self.constants[component]

    def stored(
        self, layer: Any, k: Tensor, v: Tensor
    ) -> tuple[Float[Tensor, "batch head key d_head"], Float[Tensor, "batch head key d_head"]]:
        """Store a layer's keys and values where the pass has a cache; return all that it reads."""
        if self.cache is None:
            return k, v
        k, v = self.cache.extend(layer, k, v)
        return k[:, :, self.first_key :], v[:, :, self.first_key :]

    def fused(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile]
    ) -> Float[Tensor, "batch head row d_head"]:
        """Compute ``z`` tile by tile, without scores in memory."""
        if len(tiles) == 1 and len(tiles[0].queries) == 1:
            return attend(q, _rows(k, tiles[0].keys), _rows(v, tiles[0].keys), tiles[0].mask)
        parts: list[tuple[int, Tensor]] = []
        for tile in tiles:
            z = attend(_rows(q, tile.queries), _rows(k, tile.keys), _rows(v, tile.keys), tile.mask)
            sizes = [part.stop - part.start for part in tile.queries]
            starts = [part.start for part in tile.queries]
            parts += zip(starts, z.split(sizes, dim=2), strict=True)
        ordered = [z for _, z in sorted(parts, key=lambda part: part[0])]
        return ordered[0] if len(ordered) == 1 else _joined(ordered)
