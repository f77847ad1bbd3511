"""Store finished blocks' keys and values, so that a denoising step runs only the active block.

A block attends to everything before it and to itself, and earlier blocks never read it. So once a
block is clean its keys and values are final, and a step over rows ``start:end`` needs only what is
stored for ``0:start``. Exact while the network does not see t; with time conditioning the stored
prefix would have to be modulated anew at every step's sigma, so the denoising loop refuses the
cache.

One buffer a layer, sized for the whole canvas: the active rows are written behind what is stored
and are overwritten at the next step, until ``commit`` makes them final. Where text outgrows the
context nothing moves: keys are rotated by absolute position, only differences of positions count,
and a pass reads from the first one that is still in view. Which one that is, the pass decides.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


class KVCache:
    """Keys and values ``[layer, batch, head, pos, d_head]``; the first ``length`` are final.

    ``constants`` holds what the conditioning's components return: the same in every pass of a run.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        positions: int,
        d_head: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        shape = (layers, batch, heads, positions, d_head)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self.constants: dict[nn.Module, Any] = {}

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "batch head row d_head"],
        v: Float[Tensor, "batch head row d_head"],
    ) -> tuple[Float[Tensor, "batch head key d_head"], Float[Tensor, "batch head key d_head"]]:
        """Write the pass's rows after what is final; return everything up to their end."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def reserve(self, positions: int) -> None:
        """Make room for rows up to ``positions``; what is final stays."""
        missing = positions - self.keys.shape[3]
        if missing <= 0:
            return
        more = self.keys.new_empty((*self.keys.shape[:3], missing, self.keys.shape[4]))
        self.keys = torch.cat([self.keys, more], dim=3)
        self.values = torch.cat([self.values, more], dim=3)

    def keep(self, offset: int, length: int) -> None:
        """Declare ``length`` rows of the last pass final, from ``offset`` behind what is final."""
        begin, end = self.length, self.length + length
        for stored in (self.keys, self.values):
            stored[:, :, :, begin:end] = stored[:, :, :, begin + offset : end + offset].clone()
        self.length = end

    def clear_unstored(self) -> None:
        """Fill the memory after the stored keys and values, which may hold any bits, with zeros."""
        for stored in (self.keys, self.values):
            stored[:, :, :, self.length :] = 0

    def commit(self, length: int) -> None:
        """Declare the rows up to ``length`` final."""
        self.length = length


class CleanStream:
    """Keys and values of a whole clean stream by layer, with their graph.

    As the cache of a pass over the clean stream it collects them; ``beside`` returns the cache of a
    pass over noisy rows that read them.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]] | None = None):
        self.layers = layers or []

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "batch head row d_head"],
        v: Float[Tensor, "batch head row d_head"],
    ) -> tuple[Float[Tensor, "batch head row d_head"], Float[Tensor, "batch head row d_head"]]:
        """Keep the layer's keys and values; return them as all that its rows read."""
        assert layer == len(self.layers)
        self.layers.append((k, v))
        return k, v

    def beside(self, copies: int) -> "BesideClean":
        """Return the cache of a pass whose batch is ``copies`` copies of this one's, in order."""
        return BesideClean(self.layers, lambda x: x.repeat(copies, 1, 1, 1))

    def joined(self, texts: slice, past: slice) -> "BesideClean":
        """Return the cache of a pass of one row, with these positions of each text in a row."""
        return BesideClean(
            self.layers,
            lambda x: x[texts, :, past].transpose(1, 2).flatten(0, 1)[None].transpose(1, 2),
        )

    def leaves(self) -> "CleanStream":
        """Return the same numbers without their graph, as leaves that gather gradients."""
        return CleanStream(
            [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in self.layers]
        )

    def backward(self, leaves: "CleanStream") -> None:
        """Propagate the gradients of the leaves through this stream's graph."""
        pairs = [
            (x, leaf.grad)
            for mine, theirs in zip(self.layers, leaves.layers, strict=True)
            for x, leaf in zip(mine, theirs, strict=True)
            if leaf.grad is not None and x.requires_grad
        ]
        if pairs:
            outputs, gradients = zip(*pairs, strict=True)
            torch.autograd.backward(outputs, gradients)


class BesideClean:
    """Clean keys and values in front of a noisy pass's own, ``[clean | noisy]``; or none at all.

    ``arranged`` returns the clean ones as the pass reads them, ``[batch, head, key, d_head]``.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], arranged: Callable[[Tensor], Tensor]):
        self.layers, self.arranged = layers, arranged

    def extend(
        self,
        layer: int,
        k: Float[Tensor, "batch head row d_head"],
        v: Float[Tensor, "batch head row d_head"],
    ) -> tuple[Float[Tensor, "batch head key d_head"], Float[Tensor, "batch head key d_head"]]:
        """Return both streams' keys and values."""
        if not self.layers:
            return k, v
        keys, values = (self.arranged(x) for x in self.layers[layer])
        return torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
