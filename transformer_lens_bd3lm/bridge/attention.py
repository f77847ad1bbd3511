"""Attention with every hook point exact, and none of a mask's empty area computed.

With rotated queries and keys of head h, over the keys that the view's mask lets a query read::

    z = softmax(q k^T / sqrt(d_head)) v

A view's square is mostly empty: n of a dual view's 2n x 2n columns are never read by anyone in
another block. ``Routing`` cuts it into tiles, each a few rows of queries with just the keys that
they can read, so a dual pass costs about a third of the dense square. While nobody looks at scores
or pattern a tile is one fused kernel; as soon as somebody does, the whole square is explicit, with
the same numbers.

Projections own their weights: the checkpoint's joint ``attn_qkv`` is split into q, k and v, which
share its storage as booted, and the joint module is dropped, so no parameter is counted twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast, runtime_checkable

import einops
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import JointQKVAttentionBridge

from transformer_lens_bd3lm.bridge.fused import attend, is_transformed
from transformer_lens_bd3lm.bridge.hook_point import watched
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.inputs import View
from transformer_lens_bd3lm.model.masks import dual_mask, sampling_mask
from transformer_lens_bd3lm.model.modules import rotary_tables

TILE = 128


def read_only(hook: HookPoint, x: Tensor, why: str) -> None:
    """Fire a hook that may look and must not edit; an edit is refused, not lost.

    Raises:
        InputError: if the hook wrote into what it was shown, or returned anything else.
    """
    if not watched(hook):
        return
    shown = x.detach().clone()
    with torch.no_grad():
        untouched = nn.Module.__call__(hook, shown) is shown  # no copy between, to tell by identity
    if not untouched or not bool((shown == x).all()):
        raise InputError(f"an edit at {hook.name} is refused: {why}")


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


class BD3LMAttentionBridge(JointQKVAttentionBridge):
    """Bidirectional block attention over rotated heads, living on the checkpoint's block."""

    def __init__(self, config: Any, submodules: dict[str, Any]):
        super().__init__(
            name=cast(Any, None),  # containerless: the projections lie on the block itself
            config=config,
            split_qkv_matrix=split_joint_projection,
            submodules=submodules,
        )
        del self.hook_hidden_states
        self._hook_registry.pop("hook_hidden_states")

    def set_original_component(self, original_component: nn.Module) -> None:
        """Take q, k and v out of the block's joint projection, and drop the joint module."""
        super().set_original_component(original_component)
        del original_component.attn_qkv
        # The block is reached through its own bridge; as a child here it would be its own
        # descendant.
        self._modules.pop("_original_component", None)

    @property
    def _result_contribution_scale(self) -> float:
        """1: a head writes ``z W_O``; TransformerLens asks before it recomputes that.

        Raises:
            NotExactError: where it does not, as the block knows.
        """
        bridge: Any = self.config._bridge_ref()
        return bridge.blocks[self._layer_idx].residual_contribution_scale

    def forward(
        self,
        h: Float[Tensor, "batch row d_model"],
        routing: Routing,
        gate: Float[Tensor, "batch row_or_1 d_model"] | None = None,
        fork: "Fork | None" = None,
        queries: slice | None = None,
    ) -> Float[Tensor, "batch query d_model"]:
        """What attention adds to the residual, before its gate; after it with ``use_attn_result``.

        Args:
            h: what attention reads, modulated.
            routing: how rows read each other.
            gate: adaLN's ``gate_msa``, for ``use_attn_result`` alone; None is 1.
            fork: the residual and its norm, when the split input hooks are on.
            queries: the only rows whose write is wanted; all are keys. For a pass nobody looks at.
        """
        if fork is None:
            h = self.hook_in(h)
            q, k, v = self.q(h if queries is None else h[:, queries]), self.k(h), self.v(h)
        else:
            q, k, v = self.project_forked(fork)
        q, k, v = (x.view(*x.shape[:2], -1, self.config.d_head) for x in (q, k, v))
        read = slice(None) if queries is None else queries
        q = self.hook_rot_q(rotated(q, routing.cos[read], routing.sin[read]).transpose(1, 2))
        k = self.hook_rot_k(rotated(k, routing.cos, routing.sin).transpose(1, 2))
        v = v.transpose(1, 2)
        if routing.cache is not None:
            k, v = routing.cache.extend(cast(int, self._layer_idx), k, v)
            k, v = k[:, :, routing.first_key :], v[:, :, routing.first_key :]
        # Where queries are given nobody of this pass looks; another thread may have begun to.
        if queries is None and watched(self.hook_attn_scores, self.hook_pattern):
            z = self.explicit(q, k, v, routing.dense())
        else:
            tiles = routing.tiles if queries is None else routing.tiles_of(queries)
            z = routing.fused(q, k, v, tiles)
        z = z.transpose(1, 2).flatten(2)
        if self.config.use_attn_result:
            return self.write_by_head(self.o.hook_in(z), gate)
        return self.hook_out(self.o(z))

    def explicit(
        self, q: Tensor, k: Tensor, v: Tensor, dense: Tensor | None
    ) -> Float[Tensor, "batch head row d_head"]:
        """The same with scores (masked: -inf) and pattern in the open; softmax in float32+."""
        scores = q @ k.transpose(-1, -2) * self.config.d_head**-0.5
        if dense is not None:
            scores = scores.masked_fill(~dense, -torch.inf)
        scores = self.hook_attn_scores(scores)
        wide = torch.promote_types(scores.dtype, torch.float32)
        pattern = scores.softmax(dim=-1, dtype=wide).to(v.dtype)
        return self.hook_pattern(pattern) @ v

    def write_by_head(self, z: Tensor, gate: Tensor | None) -> Float[Tensor, "batch row d_model"]:
        """The write as a sum of gated results by head; ``hook_out`` stays live before the gate."""
        n_heads = self.config.n_heads
        w_o = einops.rearrange(self.o.weight, "d (h e) -> h e d", h=n_heads)
        per_head = torch.einsum("bphe,hed->bphd", z.unflatten(-1, (n_heads, -1)), w_o)
        result = per_head if gate is None else per_head * gate[:, :, None]
        write, bias = self.hook_result(result).sum(dim=2), self.o.original_component.bias
        if bias is not None:
            write = write + (bias if gate is None else gate * bias)
        if watched(self.hook_out):
            ungated = per_head.sum(dim=2)
            ungated = ungated if bias is None else ungated + bias
            edit = self.hook_out(ungated) - ungated
            write = write + (edit if gate is None else gate * edit)
        return write

    def project_forked(self, fork: "Fork") -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v from per-head copies of the residual, hooked before the norm."""
        heads, width = self.config.n_heads, self.config.d_head
        if self.config.use_split_qkv_input:
            hooks = (self.hook_q_input, self.hook_k_input, self.hook_v_input)
            inputs = [fork.per_head(hook, heads) for hook in hooks]
        else:
            inputs = [fork.per_head(self.hook_attn_in, heads)] * 3
        projections = zip((self.q, self.k, self.v), inputs, strict=True)
        q, k, v = (
            self._project_per_head_qkv(linear, x, heads, width).flatten(2)
            for linear, x in projections
        )
        return q, k, v


@dataclass(frozen=True)
class Fork:
    """A residual to copy once a head, and the norm and modulation that each copy goes through."""

    residual: Float[Tensor, "batch row d_model"]
    weight: Float[Tensor, " d_model"]
    shift: Float[Tensor, "batch row_or_1 d_model"] | None
    scale: Float[Tensor, "batch row_or_1 d_model"] | None
    eps: float

    def per_head(self, hook: HookPoint, heads: int) -> Float[Tensor, "batch row head d_model"]:
        """The hooked copies, normalised and modulated."""
        x = hook(einops.repeat(self.residual, "b p d -> b p h d", h=heads).contiguous())
        wide = torch.promote_types(x.dtype, torch.float32)
        normed = F.layer_norm(x.to(wide), x.shape[-1:], eps=self.eps)
        h = (normed * self.weight).to(x.dtype)
        if self.shift is None or self.scale is None:
            return h
        return h * (1 + self.scale[:, :, None]) + self.shift[:, :, None]


def split_joint_projection(block: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """q, k and v as linears over the joint weight's own storage: rows of q, k, then v heads."""
    joint = cast(nn.Linear, block.attn_qkv)
    parts = []
    for weight in joint.weight.detach().chunk(3):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=joint.weight.requires_grad)
        parts.append(linear)
    q, k, v = parts
    return q, k, v
