"""Nodes and edges of a model: what writes into the residual stream, and what reads it.

A node is the embedding (``embed``), a head (``2.1``) or an MLP (``mlp2``). It writes into the
residual stream, after its gate. A reader is a head's query, key or value (``2.1.q``), an MLP
(``mlp2``) or the unembedding (``logits``). It reads the stream before its norm and modulation. An
edge leads from a node to a reader of a later place: an MLP reads what its own layer's heads write.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge


@dataclass(frozen=True)
class Components:
    """Names and order of a model's nodes and readers.

    Attributes:
        layers: number of layers.
        heads: number of heads a layer.
    """

    layers: int
    heads: int

    @classmethod
    def of(cls, bridge: Bridge) -> "Components":
        """Return the components of a bridge."""
        return cls(bridge.cfg.n_layers, bridge.cfg.n_heads)

    @cached_property
    def nodes(self) -> list[str]:
        """Names of the nodes: the embedding, then each layer's heads and its MLP."""
        names = ["embed"]
        for layer in range(self.layers):
            names += [f"{layer}.{head}" for head in range(self.heads)] + [f"mlp{layer}"]
        return names

    @cached_property
    def readers(self) -> list[str]:
        """Names of the readers: each layer's queries, keys, values and MLP, then the logits."""
        names = []
        for layer in range(self.layers):
            names += [f"{layer}.{head}.{kind}" for kind in "qkv" for head in range(self.heads)]
            names.append(f"mlp{layer}")
        return [*names, "logits"]

    @cached_property
    def edges(self) -> Bool[Tensor, "node reader"]:
        """Which pairs are edges: those whose node writes before the reader reads."""
        width, by_layer = self.heads + 1, 3 * self.heads + 1
        exists = torch.zeros(len(self.nodes), len(self.readers), dtype=torch.bool)
        for layer in range(self.layers):
            before, first = 1 + layer * width, layer * by_layer
            exists[:before, first : first + by_layer] = True
            exists[: before + self.heads, first + by_layer - 1] = True
        exists[:, -1] = True
        return exists

    @cached_property
    def node_hooks(self) -> list[str]:
        """Hook names whose activations hold all nodes, in order; heads of a layer are one."""
        names = ["hook_embed"]
        for layer in range(self.layers):
            names += [f"blocks.{layer}.attn.hook_result", f"blocks.{layer}.hook_mlp_out"]
        return names

    @cached_property
    def reader_hooks(self) -> list[str]:
        """Hook names whose activations all readers read, in order; heads of a layer are one."""
        names = []
        for layer in range(self.layers):
            names += [f"blocks.{layer}.attn.hook_{kind}_input" for kind in "qkv"]
            names.append(f"blocks.{layer}.hook_mlp_in")
        return [*names, "ln_final.hook_in"]
