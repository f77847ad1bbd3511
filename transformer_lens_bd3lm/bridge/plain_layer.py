"""Run a layer without its hook points: the same operations on the same modules, in fewer calls.

Each operation of a layer is wrapped in the components that hooks need. In a pass of a few rows,
calling them takes longer than computing. So a layer without hooks runs here: on the modules that
the components wrap, with the same functions in the same order, and so with the same numbers to the
bit. Weights are read from those modules at every call.

``block.py`` has the layer with its hook points, and chooses between the two.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.model_bridge.generalized_components import LinearBridge, MLPBridge

from transformer_lens_bd3lm.bridge.attention import BD3LMAttentionBridge
from transformer_lens_bd3lm.bridge.conditioning import BD3LMNormBridge, layer_norm, modulate
from transformer_lens_bd3lm.bridge.routing import Routing, rotated
from transformer_lens_bd3lm.bridge.watched import ModuleTree, watched


class _Wrapped(NamedTuple):
    """The modules that a layer's components wrap."""

    norm1: Any
    q: Any
    k: Any
    v: Any
    o: Any
    norm2: Any
    mlp_in: Any
    act: Any
    mlp_out: Any


class PlainLayer:
    """Layer on the modules that its components wrap; made again when a module is replaced."""

    def __init__(self, block: nn.Module):
        self.tree = ModuleTree(block)
        self.wrapped = _wrapped(block)

    def is_watched(self) -> bool:
        """Whether these modules have hooks, or are components whose forward is unknown."""
        return self.wrapped is None or watched(*self.tree.modules)

    def __call__(
        self,
        x: Float[Tensor, "batch row d_model"],
        vectors: tuple[Tensor | None, ...],
        routing: Routing,
        attention: BD3LMAttentionBridge,
        readout: slice | None,
    ) -> Float[Tensor, "batch pos d_model"]:
        """Compute the residual stream after the layer, at the rows ``readout``; None is all rows.

        Args:
            x: the residual stream before it.
            vectors: adaLN's six vectors; None where there is none.
            routing: which rows read which.
            attention: the layer's attention component, for its settings and the layer's number.
            readout: the only rows that are computed. The others still give keys and values.
        """
        assert self.wrapped is not None
        norm1, q, k, v, o, norm2, mlp_in, act, mlp_out = self.wrapped
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = vectors
        eps, d_head = attention.config.eps, attention.config.d_head
        h = modulate(layer_norm(x, norm1.weight, eps), shift_msa, scale_msa)
        cos, sin, tiles, asking = routing.cos, routing.sin, routing.tiles, h
        if readout is not None:
            cos, sin, tiles = cos[readout], sin[readout], routing.tiles_of(readout)
            x, asking = x[:, readout], h[:, readout]
            gate_msa, shift_mlp, scale_mlp, gate_mlp = (
                y if y is None or y.shape[1] == 1 else y[:, readout]
                for y in (gate_msa, shift_mlp, scale_mlp, gate_mlp)
            )
        queries = rotated(q(asking).unflatten(-1, (-1, d_head)), cos, sin).transpose(1, 2)
        keys = rotated(k(h).unflatten(-1, (-1, d_head)), routing.cos, routing.sin).transpose(1, 2)
        values = v(h).unflatten(-1, (-1, d_head)).transpose(1, 2)
        keys, values = routing.stored(attention._layer_idx, keys, values)
        z = routing.fused(queries, keys, values, tiles)
        x = add_write(x, gate_msa, o(z.transpose(1, 2).flatten(2)))
        h = modulate(layer_norm(x, norm2.weight, eps), shift_mlp, scale_mlp)
        return add_write(x, gate_mlp, mlp_out(act(mlp_in(h))))


def add_write(
    x: Float[Tensor, "batch row d_model"],
    gate: Float[Tensor, "batch row_or_1 d_model"] | None,
    write: Float[Tensor, "batch row d_model"],
) -> Float[Tensor, "batch row d_model"]:
    """Compute ``x + gate * write``, in one kernel; a gate of None is 1."""
    return x + write if gate is None else torch.addcmul(x, gate, write)


def _wrapped(block: Any) -> _Wrapped | None:
    """Return the modules that a block's components wrap; None if a component is of another class.

    The forward of another class may compute more than the module that it wraps.
    """
    attention, norms = block.attn, (block.ln1, block.ln2)
    if type(attention) is not BD3LMAttentionBridge or type(block.mlp) is not MLPBridge:
        return None
    mlp = block.mlp.original_component
    if type(mlp) is not nn.Sequential or len(mlp) != 3:
        return None
    linears = (attention.q, attention.k, attention.v, attention.o, mlp[0], mlp[2])
    classes = (*map(type, norms), *map(type, linears))
    if classes != (BD3LMNormBridge,) * len(norms) + (LinearBridge,) * len(linears):
        return None
    norm1, norm2 = (norm.original_component for norm in norms)
    q, k, v, o, mlp_in, mlp_out = (linear.original_component for linear in linears)
    return _Wrapped(norm1, q, k, v, o, norm2, mlp_in, mlp[1], mlp_out)
