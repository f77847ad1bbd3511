"""Sort canvases into batches that need few passes and stay within a memory budget.

A row is one canvas. A batch runs a block for all of its rows as soon as one of them has masks
there, so rows that write the same blocks belong together. Rows are sorted by the blocks that they
write. Each joins the batch before it if that is less work than running apart, and if the batch
stays within the budget::

    work  = steps x (fixed part of a pass + rows x positions of a pass)
    bytes = rows x (stored keys and values + the larger of activations and draws + logits) x 8/7

Both depend on sizes alone, so the same prompts under the same budget make the same batches.

Rows never share a batch if their texts would then depend on each other: rows of unequal length
without blocks, or with a last block that is cut short; and rows longer than the context with rows
that are not.
"""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.samplers import Drawing, FirstHitting
from transformer_lens_bd3lm.errors import InputError

# How many positions' arithmetic takes as long as the fixed part of a pass: weights, and calls.
FIXED_ON_CPU, FIXED_ELSEWHERE = 64, 512

# What is in memory at once, at most. For a position in a layer: how many vectors of d_model and of
# d_mlp, and how many scores of a query and key by head, where they are computed. For a token that
# is drawn: how many float64 vectors of d_vocab (log p, Gumbels, their sum; with a temperature or a
# nucleus also those that sort and normalize it).
D_MODELS, D_MLPS, SCORES = 6, 2, 4
DRAWN, DRAWN_FROM_NUCLEUS = 4, 12
# For a position of the text: numbers of 8 bytes (ids, reveal steps, log p, lead), and copies.
NUMBERS = 12
# Added for what is not counted: Python's objects, workspaces of libraries, the allocator's margins.
UNCOUNTED = 1 / 7


@dataclass(frozen=True)
class Extent:
    """Size of one row or of a batch of rows, from which its work and its memory follow.

    Attributes:
        rows: number of rows.
        positions: positions of the longest row.
        masks: number of masks in each block that is written, by the block's first position; the
            largest over the rows.
        block_size: tokens per block.
    """

    rows: int
    positions: int
    masks: dict[int, int]
    block_size: int

    @classmethod
    def of(cls, canvas: Canvas) -> "Extent":
        """Return the extent of a canvas of one row."""
        masks = canvas.to_denoise()[0]
        by_block = {start: int(masks[start:end].sum()) for start, end in canvas.block_windows()}
        return cls(1, canvas.tokens.shape[1], by_block, canvas.block_size)

    def beside(self, other: "Extent") -> "Extent":
        """Return the extent of a batch of both."""
        masks = {
            start: max(self.masks.get(start, 0), other.masks.get(start, 0))
            for start in {**self.masks, **other.masks}
        }
        rows, positions = self.rows + other.rows, max(self.positions, other.positions)
        return Extent(rows, positions, masks, self.block_size)

    def largest_cached_pass(self) -> int:
        """Count the positions of the largest pass with the cache.

        The first pass of a block begins with the block before it, which it stores, and the very
        first at position 0.
        """
        starts = sorted(self.masks)
        ends = [min(start + self.block_size, self.positions) for start in starts]
        return max(end - first for first, end in zip([0, *starts], ends, strict=False))


@dataclass(frozen=True)
class Cost:
    """Work and memory of batches in one model, under one sampler.

    Attributes:
        bridge: a BD3LM bridge.
        sampler: chooses what is revealed, and as which token.
        cached: whether finished blocks are stored.
        hooked: whether there are hooks, which may need attention scores.
    """

    bridge: Bridge
    sampler: Any
    cached: bool
    hooked: bool

    def work(self, extent: Extent) -> int:
        """Return the work of a batch, in positions."""
        on_cpu = self.bridge.embed.weight.device.type == "cpu"
        width = extent.block_size if self.cached else extent.positions
        fixed = FIXED_ON_CPU if on_cpu else FIXED_ELSEWHERE
        return sum(extent.masks.values()) * (fixed + extent.rows * width)

    def bytes(self, extent: Extent) -> int:
        """Return the most bytes that a batch takes beside the weights."""
        cfg, size = self.bridge.cfg, self.bridge.embed.weight.dtype.itemsize
        d_model, wide = cfg.n_heads * cfg.d_head, max(size, 4)
        text = NUMBERS * 8 * extent.positions
        # Keys and values of each position, and six vectors of adaLN by layer.
        stored = cfg.n_layers * d_model * (2 * extent.positions + 6) * size if self.cached else 0
        largest = min(extent.positions, cfg.n_ctx)
        if self.cached:
            largest = extent.largest_cached_pass()
        layer = largest * (D_MODELS * d_model + D_MLPS * int(cfg.d_mlp or 0)) * wide
        if self.hooked:
            layer += SCORES * cfg.n_heads * largest * extent.positions * wide
        masks = max(extent.masks.values())
        logits = 2 * masks * cfg.d_vocab * size
        drawn = (1 if isinstance(self.sampler, FirstHitting) else masks) * self._drawn()
        row = text + stored + max(layer, drawn) + logits
        return extent.rows * int(row * (1 + UNCOUNTED))

    def _drawn(self) -> int:
        """Return the bytes that drawing one token takes."""
        sampler = self.sampler
        plain = isinstance(sampler, Drawing) and sampler.nucleus_p == 1
        plain = plain and sampler.temperature in (0, 1)
        return 8 * self.bridge.cfg.d_vocab * (DRAWN if plain else DRAWN_FROM_NUCLEUS)


@dataclass
class Batch:
    """Rows that run together.

    Attributes:
        numbers: the number of each row's canvas.
        extent: size of the batch.
    """

    numbers: list[int]
    extent: Extent


def batches_of(
    canvases: list[Canvas], cost: Cost, max_bytes: int | float, same_blocks: bool
) -> list[Batch]:
    """Sort canvases of one row each into batches.

    Args:
        canvases: canvas of each row.
        cost: work and memory of batches.
        max_bytes: most bytes that a batch may take.
        same_blocks: whether all rows of a batch must write the same blocks, so that each block has
            the same number in the batch as in the row alone.

    Raises:
        InputError: for a row that takes more than ``max_bytes`` by itself.
    """
    rows = [Extent.of(canvas) for canvas in canvases]
    last: dict[Hashable, Batch] = {}
    batches: list[Batch] = []
    for i in sorted(range(len(rows)), key=lambda i: (sorted(rows[i].masks), i)):
        row, kind = rows[i], _kind(canvases[i], rows[i], same_blocks)
        if cost.bytes(row) > max_bytes:
            raise InputError(
                f"max_bytes={max_bytes}: prompts[{i}] takes {cost.bytes(row)} bytes by itself. "
                "Raise max_bytes, or write fewer tokens"
            )
        batch = last.get(kind)
        if batch is not None:
            joined = batch.extent.beside(row)
            apart = cost.work(batch.extent) + cost.work(row)
            if cost.bytes(joined) <= max_bytes and cost.work(joined) <= apart:
                batch.numbers.append(i)
                batch.extent = joined
                continue
        last[kind] = Batch([i], row)
        batches.append(last[kind])
    return batches


def _kind(canvas: Canvas, row: Extent, same_blocks: bool) -> Hashable:
    """Return a key that is equal for rows which may share a batch."""
    length, size = canvas.tokens.shape[1], canvas.block_size
    cut_short = length if length % size else None
    blocks = tuple(sorted(row.masks)) if same_blocks else None
    return size, canvas.reach is not None, cut_short, blocks
