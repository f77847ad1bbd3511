"""Two checkpoints' weights, component by component: which moved, and how far.

A component is what TransformerLens names: a head's W_Q, one of the six vectors that adaLN makes, an
MLP's input side with its bias. Of its weights w, all in float64, a tensor at a time::

    relative change   |w_b - w_a| / |w_a|
    cosine            w_a . w_b / (|w_a| |w_b|)

Every parameter belongs to exactly one component.

It does not say what a change does: a large one along directions that nothing reads does nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.bridge.conditioning import MODULATION
from transformer_lens_bd3lm.errors import CheckpointError, InputError, NotExactError


@dataclass(frozen=True)
class WeightChange:
    """One component's weights in two checkpoints, or several's together.

    Attributes:
        name: TransformerLens's, with the head where there is one: ``blocks.0.attn.q.3``.
        parameters: how many numbers it has.
        changed: how many of them differ.
        squared: sums over them of ``w_a^2``, ``w_b^2``, ``w_a w_b`` and ``(w_b - w_a)^2``.
        largest: the largest absolute difference.
    """

    name: str
    parameters: int
    changed: int
    squared: tuple[float, float, float, float]
    largest: float

    @property
    def relative(self) -> float:
        """``|w_b - w_a| / |w_a|``; infinite where all was zero before, and something is now."""
        first, _, _, moved = self.squared
        if moved == 0:
            return 0.0
        return math.sqrt(moved / first) if first else math.inf

    @property
    def cosine(self) -> float:
        """Between the two; NaN where one is zero."""
        first, second, both, _ = self.squared
        return both / math.sqrt(first * second) if first and second else math.nan


def components(bridge: Any) -> Iterator[tuple[str, list[Tensor]]]:
    """Every parameter of a bridge, by component."""
    yield "embed", [bridge.embed.weight]
    if bridge.cfg.adaln:
        yield "timestep_embed", list(bridge.timestep_embed.parameters())
    for layer, block in enumerate(bridge.blocks):
        name, attn, mlp = f"blocks.{layer}", block.attn, block.mlp
        for part in ("q", "k", "v"):
            for head, weight in enumerate(getattr(attn, part).weight.chunk(bridge.cfg.n_heads)):
                yield f"{name}.attn.{part}.{head}", [weight]
        for head, weight in enumerate(attn.o.weight.chunk(bridge.cfg.n_heads, dim=1)):
            yield f"{name}.attn.o.{head}", [weight]
        yield f"{name}.ln1", [block.ln1.weight]
        yield f"{name}.ln2", [block.ln2.weight]
        for part in ("in", "out"):
            linear = getattr(mlp, part)
            yield f"{name}.mlp.{part}", [linear.weight, linear.bias]
        if bridge.cfg.adaln:
            yield from modulation(f"{name}.adaln", block.adaln, MODULATION)
    if bridge.cfg.adaln:
        yield from modulation("final_adaln", bridge.final_adaln, ("shift", "scale"))
    yield "ln_final", [bridge.ln_final.weight]
    yield "unembed", [bridge.unembed.weight, bridge.unembed.bias]


def modulation(
    name: str, adaln: Any, vectors: tuple[str, ...]
) -> Iterator[tuple[str, list[Tensor]]]:
    """What makes each vector of an adaLN."""
    parts = (x.chunk(len(vectors)) for x in (adaln.weight, adaln.bias))
    for vector, weight, bias in zip(vectors, *parts, strict=True):
        yield f"{name}.{vector}", [weight, bias]


def check_same_shape(a: Any, b: Any) -> None:
    """Refuse two bridges whose weights are not about the same thing.

    Raises:
        InputError: for other shapes.
        NotExactError: if one's weights are processed.
    """
    for name, bridge in (("a", a), ("b", b)):
        if bridge._weights_processed:
            raise NotExactError(
                f"the weights of {name} are processed (enable_compatibility_mode): norms and gates "
                "are folded into others. Compare bridges as booted"
            )
    shapes = [{name: [*map(shape, ws)] for name, ws in components(each)} for each in (a, b)]
    for name in shapes[0] | shapes[1]:
        one, other = (found.get(name) for found in shapes)
        if one != other:
            raise InputError(
                f"{name} has {one or 'no weights'} in a and {other or 'no weights'} in b: only "
                "checkpoints of one shape are compared"
            )


def shape(x: Tensor) -> list[int]:
    """A tensor's, for a message."""
    return list(x.shape)


@torch.no_grad()
def compare_weights(a: Any, b: Any) -> list[WeightChange]:
    """Every component of two bridges of one shape, the largest relative change first.

    Raises:
        CheckpointError: if a weight is infinite or NaN.
    """
    pairs = zip(components(a), components(b), strict=True)
    found = [compared(name, xs, ys) for (name, xs), (_, ys) in pairs]
    return sorted(found, key=lambda each: -each.relative)


def compared(name: str, a: list[Tensor], b: list[Tensor]) -> WeightChange:
    """One component."""
    parts = [compared_tensors(name, x, y) for x, y in zip(a, b, strict=True)]
    return together(name, parts)


def compared_tensors(name: str, a: Tensor, b: Tensor) -> WeightChange:
    """One tensor of each.

    Raises:
        CheckpointError: if a weight is infinite or NaN.
    """
    x, y = (each.detach().cpu().double().flatten() for each in (a, b))
    squared = (float(x @ x), float(y @ y), float(x @ y), float((y - x) @ (y - x)))
    if not all(map(math.isfinite, squared)):
        raise CheckpointError(f"{name} holds weights that are infinite or NaN: nothing compares")
    changed = int((x != y).sum())
    return WeightChange(name, len(x), changed, squared, float((y - x).abs().max()))


def together(name: str, parts: list[WeightChange]) -> WeightChange:
    """Several as one."""
    squared = zip(*(part.squared for part in parts), strict=True)
    first, second, both, moved = map(math.fsum, squared)
    return WeightChange(
        name,
        sum(part.parameters for part in parts),
        sum(part.changed for part in parts),
        (first, second, both, moved),
        max(part.largest for part in parts),
    )
