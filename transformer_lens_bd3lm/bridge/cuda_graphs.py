"""Replay the layers of a cached pass as a CUDA graph: one launch in place of hundreds.

On a GPU a pass of a few rows takes as long as launching its kernels one by one. A CUDA graph
launches all of them at once, on the memory that they had when it was captured. So all that changes
from pass to pass is copied into buffers of fixed size. Keys are read up to a multiple of ``SPAN``
with a mask that hides those not stored yet, and not as a slice that grows.

A graph belongs to the stored keys and values of one run. It holds the weights that it reads, and a
run refuses weights that change. Passes with hooks, of many rows, or without stored keys run without
a graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.conditioning import autocasts
from transformer_lens_bd3lm.bridge.host import Bridge, require_bridge
from transformer_lens_bd3lm.bridge.kv_cache import KVCache
from transformer_lens_bd3lm.bridge.routing import Routing, Tile
from transformer_lens_bd3lm.errors import InputError

SPAN, MOST_GRAPH_ROWS, WARM_UP = 128, 128, 3


@contextmanager
def cuda_graphs(bridge: Bridge) -> Iterator[None]:
    """Replay the layers of cached passes as CUDA graphs within a ``with`` block.

    It is for :func:`denoise` and everything that runs its loop, on a bridge on a GPU. In each run,
    each number of rows and each further 128 positions cost one capture, which takes about as long
    as four passes. Logits are those of passes without graphs, up to rounding. Hooks fire as usual,
    since a pass in which a layer has hooks runs without a graph.

    Args:
        bridge: a BD3LM bridge whose weights are on a CUDA device.

    Raises:
        InputError: for a bridge on another device.
    """
    require_bridge(bridge)
    device = bridge.embed.weight.device
    if device.type != "cuda":
        raise InputError(
            f"cuda_graphs(bridge): the bridge is on {device}, and CUDA graphs run on a GPU alone: "
            'move it there with bridge.to("cuda"), or leave the scope out'
        )
    model = bridge.original_model
    before, model.graphs = model.graphs, Graphs()
    try:
        yield
    finally:
        model.graphs = before


class StoreAt:
    """Stored keys and values of a pass of fixed shape, written at indices on the device.

    Attributes:
        cache: the keys and values of a run.
        at: positions at which the pass's rows are written.
        keys: number of keys that are read, stored or not.
    """

    def __init__(self, cache: KVCache, at: Int[Tensor, " row"], keys: int):
        self.cache, self.at, self.keys = cache, at, keys

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "batch head row d_head"],
        v: Float[Tensor, "batch head row d_head"],
    ) -> tuple[Float[Tensor, "batch head key d_head"], Float[Tensor, "batch head key d_head"]]:
        """Write a layer's new keys and values; return the first ``keys`` of all."""
        stored = self.cache.keys[layer], self.cache.values[layer]
        keys, values = (
            x.index_copy_(2, self.at, new)[:, :, : self.keys]
            for x, new in zip(stored, (k, v), strict=True)
        )
        return keys, values


def of_fixed_shape(routing: Routing) -> Routing:
    """Return the routing of a cached pass with shapes that stay the same within ``SPAN`` positions.

    The mask hides keys that are not stored. It is added to their scores, so they must be finite.
    """
    cache, tile = routing.cache, routing.tiles[0]
    assert isinstance(cache, KVCache)
    rows = routing.cos.shape[0]
    end = cache.length + rows
    keys = min(-(-end // SPAN) * SPAN, cache.keys.shape[3])
    mask = routing.cos.new_full((rows, keys), -torch.inf)
    mask[:, routing.first_key : end] = 0 if tile.mask is None else tile.mask
    at = torch.arange(cache.length, end, device=mask.device)
    return Routing(
        routing.cos,
        routing.sin,
        [Tile(tile.queries, (slice(0, keys),), mask)],
        routing.dense,
        StoreAt(cache, at, keys),
        constants=routing.constants,
    )


def through_blocks(model: Any, x: Tensor, c: Tensor | None, routing: Routing) -> Tensor:
    """Run every layer at all rows; a graph captures this function."""
    for block in model.backbone.blocks:
        x = block(x, c, routing)
    return x


class _Graph(NamedTuple):
    """A captured graph, with the buffers that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor
    weights: list[Tensor]


class Graphs:
    """CUDA graphs that were captured within one ``with`` block, by the run's stored keys."""

    def __init__(self) -> None:
        self._of_run: WeakKeyDictionary[KVCache, dict[Any, _Graph | None]] = WeakKeyDictionary()

    def replay(
        self, model: Any, x: Float[Tensor, "batch row d_model"], c: Tensor | None, routing: Routing
    ) -> Float[Tensor, "batch row d_model"] | None:
        """Return the residual stream after the last layer; None for a pass that has no graph.

        The first pass of a shape in a run has none, since it may be the only one.
        """
        if not is_capturable(model, x, c, routing):
            return None
        cache, fixed = routing.cache, of_fixed_shape(routing)
        assert isinstance(cache, KVCache) and isinstance(fixed.cache, StoreAt)
        graphs = self._of_run.setdefault(cache, {})
        # A layer that is made of other modules, or computes with another eps, is captured anew.
        layers = tuple(block.plain() for block in model.backbone.blocks)
        shapes = (x.shape, fixed.cache.keys, cache.keys.shape, cache.keys.data_ptr())
        key = (*shapes, layers, model.tl_cfg.eps)
        if key not in graphs:
            graphs[key] = None
            return None
        graph, mask = graphs[key], fixed.tiles[0].mask
        assert mask is not None
        inputs = [x.clone(), fixed.cos, fixed.sin, mask, fixed.cache.at]
        if graph is None:
            cache.clear_unstored()
            weights = [p.detach() for p in model.parameters()]
            captured = _captured(lambda: through_blocks(model, inputs[0], c, fixed), x.device)
            graph = graphs[key] = _Graph(captured[0], inputs, captured[1], weights)
        for buffer, value in zip(graph.inputs, inputs, strict=True):
            buffer.copy_(value)
        graph.graph.replay()
        return graph.output.clone()


def is_capturable(model: Any, x: Tensor, c: Tensor | None, routing: Routing) -> bool:
    """Whether a pass reads stored keys in one tile, without hooks, gradients or a changing c."""
    tiles = routing.tiles
    if not isinstance(routing.cache, KVCache) or len(tiles) != 1 or len(tiles[0].queries) != 1:
        return False
    if x.shape[1] > MOST_GRAPH_ROWS or torch.is_grad_enabled() or autocasts(x.device.type):
        return False
    if c is not None and routing.constants is None:
        return False
    return all(block.plain() is not None for block in model.backbone.blocks)


def _captured(
    run: Callable[[], Tensor], device: torch.device
) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """Capture a function that only launches kernels, after calls that choose and load them."""
    with torch.cuda.device(device):
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = run()
    return graph, output
