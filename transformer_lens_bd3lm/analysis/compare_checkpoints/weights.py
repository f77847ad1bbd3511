"""How far apart the weights of two checkpoints of one shape are, component by component.

A component is the parameters under one of the bridge's names: a norm, one of adaLN's six vectors,
one head's queries. Its tensors, flattened and joined, are a vector, w_a in one checkpoint and w_b
in the other::

    relative change    |w_b - w_a| / |w_a|
    cosine             w_a . w_b / (|w_a| |w_b|)
    largest change     max |w_b - w_a|, of one parameter

Each is computed from sums in float64 that add up over tensors: a head's four parts to the head, and
all components to the model. Only a piece of one tensor at a time is copied to float64.

It does not say what a change does: a change in a direction that nothing reads has no effect.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.similarity import wide
from transformer_lens_bd3lm.bridge.conditioning import MODULATION
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import CheckpointError, InputError
from transformer_lens_bd3lm.result import plain_values

AT_ONCE = 2**22  # values in float64 at once
NAME = re.compile(r"backbone\.(?:blocks\.(\d+)\.)?(.+)\.(?:weight|bias|embedding)")
# The bridge's names for the checkpoint's modules, in the order in which a pass computes.
PARTS = {
    "vocab_embed": "embed",
    "sigma_map.mlp.0": "timestep_embed",
    "sigma_map.mlp.2": "timestep_embed",
    "adaLN_modulation": "adaln",
    "norm1": "ln1",
    "attn.q": "attn.q",
    "attn.k": "attn.k",
    "attn.v": "attn.v",
    "attn_out": "attn.o",
    "norm2": "ln2",
    "mlp.0": "mlp.in",
    "mlp.2": "mlp.out",
    "output_layer.adaLN_modulation": "final_adaln",
    "output_layer.norm_final": "ln_final",
    "output_layer.linear": "unembed",
}
VECTORS = {"adaln": MODULATION, "final_adaln": ("shift", "scale")}
OF_HEADS = ("attn.q", "attn.k", "attn.v", "attn.o")


@dataclass(frozen=True)
class Change:
    """Change from one vector to another, as sums; the sums of parts add up to those of the whole.

    Attributes:
        size: number of parameters.
        square_a: ``|w_a|^2``.
        square_b: ``|w_b|^2``.
        dot: ``w_a . w_b``.
        square: ``|w_b - w_a|^2``.
        largest: ``max |w_b - w_a|``.
    """

    size: int = 0
    square_a: float = 0.0
    square_b: float = 0.0
    dot: float = 0.0
    square: float = 0.0
    largest: float = 0.0

    @classmethod
    def of(cls, a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> "Change":
        """Return the change from one tensor to another of its shape."""
        change = cls()
        parts = (x.reshape(-1).split(AT_ONCE) for x in (a, b))
        for x, y in zip(*parts, strict=True):
            x, y = wide(x), wide(y)
            difference = y - x
            change += cls(
                x.numel(),
                float((x * x).sum()),
                float((y * y).sum()),
                float((x * y).sum()),
                float((difference * difference).sum()),
                float(difference.abs().max()),
            )
        return change

    def __add__(self, other: "Change") -> "Change":
        return Change(
            self.size + other.size,
            self.square_a + other.square_a,
            self.square_b + other.square_b,
            self.dot + other.dot,
            self.square + other.square,
            max(self.largest, other.largest),
        )

    @property
    def identical(self) -> bool:
        """Whether every parameter is equal."""
        return self.largest == 0

    @property
    def relative(self) -> float:
        """``|w_b - w_a| / |w_a|``; 0 where nothing changed, infinite from zeros."""
        if self.identical:
            return 0.0
        return math.sqrt(self.square / self.square_a) if self.square_a else math.inf

    @property
    def cosine(self) -> float:
        """Cosine of the two vectors; NaN if only one of them is zero."""
        if self.identical:
            return 1.0
        norms = math.sqrt(self.square_a * self.square_b)
        return min(max(self.dot / norms, -1.0), 1.0) if norms else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return the measures of the change as plain values for JSON."""
        values = {
            "parameters": self.size,
            "relative": self.relative,
            "cosine": self.cosine,
            "largest": self.largest,
        }
        return plain_values(values)


@dataclass(frozen=True)
class Component:
    """One component of the model, and its change.

    Attributes:
        part: the bridge's name within the layer, or in the model: ``"attn.v"``, ``"embed"``.
        layer: its layer; None outside the layers.
        head: its head; None for a component that has no heads.
        change: change from a to b.
    """

    part: str
    layer: int | None
    head: int | None
    change: Change

    @property
    def name(self) -> str:
        """Name of the component, as ``blocks.1.attn.v[0]``."""
        name = self.part if self.layer is None else f"blocks.{self.layer}.{self.part}"
        return name if self.head is None else f"{name}[{self.head}]"

    def to_dict(self) -> dict[str, Any]:
        """Return the change as plain values for JSON."""
        return {"name": self.name} | self.change.to_dict()


@dataclass(frozen=True)
class WeightComparison:
    """Changes of the weights between two checkpoints.

    Attributes:
        components: the components, each head by itself, by relative change, largest first.
        tensors: number of parameter tensors, q, k and v counted as one each.
        identical: number of tensors in which every value is equal.
    """

    components: tuple[Component, ...] = field(repr=False)
    tensors: int
    identical: int

    @property
    def whole(self) -> Change:
        """Change of all parameters together."""
        return _total(self.components)

    def joined(self) -> tuple[Component, ...]:
        """Return the components, heads and adaLN's vectors joined, the largest change first."""
        groups: dict[tuple[str, int | None], list[Component]] = {}
        for each in self.components:
            root = each.part.split(".")[0]
            part = root if root in VECTORS else each.part
            groups.setdefault((part, each.layer), []).append(each)
        return _largest_first(
            Component(part, layer, None, _total(members))
            for (part, layer), members in groups.items()
        )

    def by_head(self, *parts: str) -> Float[Tensor, "layer head"]:
        """Return the relative change of each head, its parts taken together.

        Args:
            *parts: any of ``"attn.q"``, ``"attn.k"``, ``"attn.v"``, ``"attn.o"``; all by default.

        Raises:
            InputError: for other parts.
        """
        unknown = [part for part in parts if part not in OF_HEADS]
        if unknown:
            raise InputError(f"{unknown[0]!r} has no heads: give any of {', '.join(OF_HEADS)}")
        changes: dict[tuple[int, int], Change] = {}
        for each in self.components:
            if (
                each.layer is not None
                and each.head is not None
                and each.part in (parts or OF_HEADS)
            ):
                place = each.layer, each.head
                changes[place] = changes.get(place, Change()) + each.change
        layers, heads = (1 + max(place[i] for place in changes) for i in (0, 1))
        values = [[changes[i, head].relative for head in range(heads)] for i in range(layers)]
        return torch.tensor(values, dtype=torch.float64)

    def to_dict(self) -> dict[str, Any]:
        """Return the change of the whole model and of each component as plain values for JSON."""
        return self.whole.to_dict() | {
            "tensors": self.tensors,
            "identical_tensors": self.identical,
            "components": [each.to_dict() for each in self.components],
        }


def _total(components: Iterable[Component]) -> Change:
    """Add the changes up."""
    return sum((each.change for each in components), Change())


def _largest_first(components: Iterable[Component]) -> tuple[Component, ...]:
    """Sort by relative change, the largest first; equal ones stay in order."""
    return tuple(sorted(components, key=lambda each: -each.change.relative))


def parameters_of(bridge: Bridge) -> dict[str, Tensor]:
    """Return a bridge's parameters by the checkpoint's names, with q, k and v apart."""
    named = bridge.original_model.named_parameters()
    return {name.replace("._original_component", ""): x.detach() for name, x in named}


def check_finite(bridge: Bridge, name: str) -> None:
    """Check that every weight is finite.

    Raises:
        InputError: naming the first tensor that holds another value.
    """
    for tensor, x in parameters_of(bridge).items():
        if not bool(x.isfinite().all()):
            bad = int((~x.isfinite()).sum())
            raise InputError(
                f"{tensor} of {name} has {bad:,} values that are NaN or infinite: nothing can be "
                "compared with it; give a checkpoint from before the run broke"
            )


def _pieces(
    name: str, x: Float[Tensor, "..."], heads: int
) -> Iterator[tuple[str, int | None, int | None, Tensor]]:
    """Yield part, layer, head and values of the components in a tensor.

    Raises:
        CheckpointError: for a parameter that no checkpoint has.
    """
    match = NAME.fullmatch(name)
    part = PARTS.get(match[2]) if match else None
    if match is None or part is None:
        raise CheckpointError(
            f"{name} is not in a checkpoint: merge or remove what was added to the model"
        )
    layer = None if match[1] is None else int(match[1])
    if part in VECTORS:
        vectors = zip(VECTORS[part], x.chunk(len(VECTORS[part])), strict=True)
        yield from ((f"{part}.{vector}", layer, None, piece) for vector, piece in vectors)
    elif part in OF_HEADS:
        # Heads are rows of q, k and v, and columns of the output projection.
        rows = (x.T if part == "attn.o" else x).unflatten(0, (heads, -1))
        yield from ((part, layer, head, piece) for head, piece in enumerate(rows))
    else:
        yield part, layer, None, x


@torch.no_grad()
def compare_weights(a: Any, b: Any) -> WeightComparison:
    """Compare the weights of two bridges, component by component.

    Args:
        a: a BD3LM bridge.
        b: another of the same shape.

    Raises:
        CheckpointError: for parameters that no checkpoint has.
    """
    ours, theirs = parameters_of(a), parameters_of(b)
    alone = sorted(ours.keys() ^ theirs.keys())
    if alone:
        raise CheckpointError(
            f"{alone[0]} is in only one of a and b: merge or remove what was added to the model"
        )
    changes: dict[tuple[str, int | None, int | None], Change] = {}
    identical = 0
    for name, x in ours.items():
        changed = False
        halves = (_pieces(name, each, a.cfg.n_heads) for each in (x, theirs[name]))
        for (*place, one), (*_, other) in zip(*halves, strict=True):
            change = Change.of(one, other)
            changed |= not change.identical
            key: Any = tuple(place)
            changes[key] = changes.get(key, Change()) + change
        identical += not changed
    order = list(dict.fromkeys(PARTS.values()))
    last = a.cfg.n_layers
    components = sorted(
        (Component(*place, change) for place, change in changes.items()),
        key=lambda each: _model_order(each, order, last),
    )
    return WeightComparison(_largest_first(components), len(ours), identical)


def _model_order(each: Component, order: list[str], layers: int) -> tuple[int, int, int]:
    """Return the key that sorts components in the order of a pass."""
    part = next(i for i, name in enumerate(order) if each.part.startswith(name))
    outside = layers if part >= order.index("final_adaln") else -1
    layer = outside if each.layer is None else each.layer
    return layer, part, each.head or 0
