"""What two checkpoints of one shape compute inside, on the same noised texts.

At each layer's hook points, of the noisy stream and of the clean one, with ``x_i`` the activation
at a position::

    cosine             x_i^a . x_i^b / (|x_i^a| |x_i^b|)         mean over positions
    relative change    |x^b - x^a| / |x^a|                       over all positions together
    CKA                as in ``similarity``                        over the first 1,024 positions
    attention change   1/2 sum_k |A^a_qk - A^b_qk|               mean over masked queries, by head

Cosine and relative change compare single vectors, CKA how activations lie relative to each other:
two models that were trained independently can agree in CKA alone. Cosine and relative change are
meaningful where one was trained from the other, or both from a third.

The first hook point at which anything differs, in the order of a pass, is where the change enters;
later ones also differ because of it. It does not say which change matters.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.compare_checkpoints.weights import Change
from transformer_lens_bd3lm.analysis.noised_text import pattern_names
from transformer_lens_bd3lm.analysis.similarity import cka, wide
from transformer_lens_bd3lm.bridge.hook_points import split_layer
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import HookNameError, NotExactError
from transformer_lens_bd3lm.result import plain_values

PATTERN = "attn.hook_pattern"
# In the order of a pass.
POINTS = (
    *("hook_resid_pre", PATTERN, "hook_attn_out", "hook_resid_mid"),
    *("hook_mlp_out", "hook_resid_post"),
)
SAMPLES = 1024  # positions of a CKA


@dataclass(frozen=True)
class HookPointComparison:
    """Activations of two checkpoints at one hook point, in one stream.

    Attributes:
        name: name of the hook point.
        stream: ``"noisy"``, ``"clean"``, or ``"single"`` without blocks. Attention
            patterns are those of masked queries.
        cosine: mean over positions; over all queries and heads together for patterns.
        relative: relative change.
        cka: debiased linear CKA over the first positions; NaN for patterns, and where the samples
            do not determine it.
        largest: the largest change of one value.
    """

    name: str
    stream: str
    cosine: float
    relative: float
    cka: float
    largest: float

    @property
    def layer(self) -> int:
        """Number of the layer."""
        return split_layer(self.name)[0] or 0

    @property
    def point(self) -> str:
        """Name within the layer."""
        return split_layer(self.name)[1]

    @property
    def identical(self) -> bool:
        """Whether every value is equal."""
        return self.largest == 0

    def to_dict(self) -> dict[str, Any]:
        """Return all values as JSON has them."""
        return plain_values(vars(self))


@dataclass(frozen=True)
class ActivationComparison:
    """Activations of two checkpoints, hook point by hook point.

    Attributes:
        points: the hook points, by relative change, largest first.
        attention: attention change of masked queries ``[layer, head]``, 0 to 1.
        first: first hook point that differs, in the order of a pass; None if none does.
        positions: number of positions of a stream, in all rows.
    """

    points: tuple[HookPointComparison, ...] = field(repr=False)
    attention: Float[Tensor, "layer head"] = field(repr=False)
    first: str | None
    positions: int

    def at(self, name: str, stream: str = "noisy") -> HookPointComparison:
        """Return the comparison of one hook point.

        Args:
            name: name of the hook point, as ``blocks.1.hook_attn_out``.
            stream: ``"noisy"``, ``"clean"`` or ``"single"``.

        Raises:
            HookNameError: if it was not compared.
        """
        for each in self.points:
            if (each.name, each.stream) == (name, stream):
                return each
        raise HookNameError(
            f"{name} of the {stream} stream was not compared: give one of "
            f"{', '.join(POINTS)}, of {' or '.join(sorted({p.stream for p in self.points}))}"
        )

    def heads(self, n: int = 10) -> list[tuple[int, int, float]]:
        """Return layer, head and attention change of the heads that changed most.

        Args:
            n: largest number of heads.
        """
        order = self.attention.flatten().argsort(descending=True, stable=True)[:n].tolist()
        width = self.attention.shape[1]
        return [(i // width, i % width, float(self.attention.flatten()[i])) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """Return all comparisons as plain values for JSON."""
        return {
            "first": self.first,
            "points": [each.to_dict() for each in self.points],
            "attention_change": self.attention.tolist(),
        }


class PairedActivations:
    """Sums over two checkpoints' activations, collected pass by pass."""

    def __init__(self, bridge: Bridge):
        layers = range(bridge.cfg.n_layers)
        self.names = [f"blocks.{i}.{point}" for i in layers for point in POINTS]
        self.patterns = pattern_names(bridge)
        dual = bridge.original_model.config.cross_attn
        self.streams = ("noisy", "clean") if dual else ("single",)
        self.before: dict[str, Tensor] = {}
        self.changes: dict[tuple[str, str], Change] = {}
        self.cosines: dict[tuple[str, str], list[Tensor]] = {}
        self.samples: dict[tuple[str, str], list[tuple[Tensor, Tensor]]] = {}
        self.attention: dict[str, list[Tensor]] = {name: [] for name in self.patterns}

    @property
    def stream_names(self) -> list[str]:
        """Hook names of activations ``[batch, pos, d_model]``, patterns left out."""
        return [name for name in self.names if name not in self.patterns]

    def keep(self, name: str, x: Tensor) -> None:
        """Keep an activation of a, as a copy, since a later hook may write into it."""
        self.before[name] = x.clone()

    def compare(self, name: str, x: Tensor) -> None:
        """Add an activation of b, and the kept one of a, to the sums.

        Raises:
            NotExactError: if either is not finite.
        """
        a, b = (wide(each) for each in (self.before.pop(name), x))
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise NotExactError(f"{name} is not finite in {x.dtype}: boot both in a wider dtype")
        if name in self.patterns:
            self.attention[name].append((a - b).abs().sum(-1) / 2)
            self._add((name, self.streams[0]), a, b)
            return
        pairs = (each.chunk(len(self.streams), dim=1) for each in (a, b))
        for stream, p, q in zip(self.streams, *pairs, strict=True):
            place = name, stream
            self._add(place, p, q)
            p, q = p.flatten(0, 1), q.flatten(0, 1)
            self.cosines.setdefault(place, []).append(_cosines(p, q))
            kept = self.samples.setdefault(place, [])
            room = SAMPLES - sum(len(pair[0]) for pair in kept)
            if room > 0:
                kept.append((p[:room].to(x.dtype), q[:room].to(x.dtype)))

    def _add(self, place: tuple[str, str], a: Tensor, b: Tensor) -> None:
        """Add two activations to the sums of a hook point and stream."""
        self.changes[place] = self.changes.get(place, Change()) + Change.of(a, b)

    def points(self) -> Iterator[HookPointComparison]:
        """Yield the comparison of every hook point, in the order of a pass."""
        for name in self.names:
            for stream in self.streams:
                place = name, stream
                if place not in self.changes:
                    continue
                change = self.changes[place]
                cosine, similarity = change.cosine, math.nan
                if name not in self.patterns:
                    cosine = float(torch.cat(self.cosines[place]).nanmean())
                    a, b = (torch.cat(x) for x in zip(*self.samples[place], strict=True))
                    similarity = float(cka(a, b))
                yield HookPointComparison(
                    name, stream, cosine, change.relative, similarity, change.largest
                )

    def comparison(self, positions: int) -> ActivationComparison:
        """Return the comparison of all hook points."""
        points = list(self.points())
        first = next((each.name for each in points if not each.identical), None)
        attention = torch.stack([torch.cat(self.attention[name]).mean(0) for name in self.patterns])
        ordered = tuple(sorted(points, key=lambda each: -each.relative))
        return ActivationComparison(ordered, attention, first, positions)


def _cosines(
    a: Float[Tensor, "sample d_model"], b: Float[Tensor, "sample d_model"]
) -> Float[Tensor, " sample"]:
    """Return the cosine of each pair; 1 for equal vectors, NaN if one is zero."""
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where((a == b).all(-1), 1.0, (a * b).sum(-1) / norms)
