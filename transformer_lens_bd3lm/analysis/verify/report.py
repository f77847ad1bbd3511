"""The outcome of a verification: a row a comparison, and which row to read first.

It draws nothing: ``show.verification`` lays it out as a table.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from transformer_lens_bd3lm.bridge.hook_points import lookup, split_layer
from transformer_lens_bd3lm.result import Result, count, plain_values

# Causes before what follows from them.
KINDS = ("config", "read", "logits", "gradient", "edit", "benchmark")
GRADIENT_FACTOR = 10  # by which a gradient's tolerance is larger: its sums cancel
PARTS = ("attention", "MLP", "modulation")


@dataclass(frozen=True)
class Row:
    """One comparison of the bridge with the reference.

    Attributes:
        name: the hook point, the key of the config, or the test of TransformerLens's benchmark.
        kind: ``"config"``, ``"read"``, ``"logits"``, ``"gradient"``, ``"edit"`` or ``"benchmark"``
            (a test of TransformerLens's benchmark).
        ok: whether the two agree.
        view: ``"sampling"``, ``"dual"``, ``"single"`` (a checkpoint without blocks), or the phase
            of TransformerLens's benchmark.
        block_size: tokens per block in that pass.
        difference: the largest absolute difference; infinite where the bridge has no finite value
            of the right shape.
        scale: the largest absolute value of the reference.
        tolerance: the largest difference that is allowed.
        moved: the largest change of the reference's logits by an edit.
        note: why a row fails, or what to know about it.
    """

    name: str
    kind: str
    ok: bool
    view: str = ""
    block_size: int | None = None
    difference: float = 0.0
    scale: float = 0.0
    tolerance: float = 0.0
    moved: float | None = None
    note: str = ""

    @property
    def share(self) -> float:
        """The difference as a multiple of the tolerance; above 1 it is too large."""
        if self.difference == 0:
            return 0.0
        return self.difference / self.tolerance if self.tolerance else math.inf

    @property
    def measured(self) -> bool:
        """Whether the row compares tensors, not a config key or a test's outcome."""
        return self.kind not in ("config", "benchmark")

    @property
    def place(self) -> str:
        """Where in the model the hook point is: ``"embed"``, ``"layer 0"``, ..., ``"readout"``."""
        if not self.measured:
            return self.kind
        layer = split_layer(self.name)[0]
        if layer is not None:
            return f"layer {layer}"
        return "embed" if lookup(self.name).part == "embedding" else "readout"

    @property
    def part(self) -> str:
        """The part of a layer: one of ``PARTS``, or empty for the residual stream."""
        part = lookup(self.name).part
        return part if self.measured and part in PARTS else ""

    @property
    def message(self) -> str:
        """What differs, where, and by how much."""
        name = f"{self.name} ({', '.join(filter(None, (self.place, self.part)))})"
        if not self.measured:
            return f"{name}: {self.note}"
        message = (
            f"{name}, {self.kind} {name_pass(self.view, self.block_size)}: off by "
            f"{self.difference:.2g} of {self.scale:.2g}, {self.tolerance:.1g} is allowed"
        )
        return f"{message}; {self.note}" if self.note else message


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """A bridge beside the plain modules of a checkpoint.

    Attributes:
        model: name of the bridge's checkpoint.
        against: name of the checkpoint whose plain modules are the reference.
        dtype: dtype that both computed in.
        device: device that both computed on.
        processed: whether the bridge's weights are processed.
        allowed: the largest difference that is allowed, as a share of the reference's largest
            value.
        rows: every comparison, in the order in which a pass computes.
        left_out: what was not compared, and why.
    """

    model: str
    against: str
    dtype: str
    device: str
    processed: bool
    allowed: float
    rows: tuple[Row, ...] = field(repr=False)
    left_out: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all comparisons agree."""
        return all(row.ok for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """The rows that differ, causes first: by kind, then in the order of a pass."""
        return sort_by_kind(row for row in self.rows if not row.ok)

    @property
    def first(self) -> Row | None:
        """The row to read first: the earliest that differs; None if all agree."""
        return next(iter(self.failed), None)

    @property
    def message(self) -> str:
        """The outcome in a sentence."""
        failed = self.failed
        if not failed:
            return f"{len(self.rows):,} comparisons agree"
        counts = f"{len(failed):,} of {len(self.rows):,} comparisons fail"
        message = f"{counts}, first {failed[0].message}"
        inside = next((row for row in failed if row.kind != "config"), failed[0])
        return message if inside is failed[0] else f"{message}; then {inside.message}"

    def _figures(self) -> str:
        worst = max((row.share for row in self.rows if row.measured), default=0.0)
        failed = len(self.failed)
        outcome = f"{failed:,} of {len(self.rows):,} comparisons fail"
        if not failed:
            outcome = f"{count(len(self.rows), 'comparison')} agree"
        return f"{self.model}, {self.dtype}: {outcome}, worst {worst:.2g} of what is allowed"

    def to_dict(self) -> dict[str, Any]:
        """Return the outcome and all rows as plain JSON values; None for what is not finite."""
        return plain_values({"ok": self.ok, "message": self.message} | asdict(self))


def sort_by_kind(rows: Iterable[Row]) -> list[Row]:
    """Sort rows so that causes come before what follows from them."""
    return sorted(rows, key=lambda row: KINDS.index(row.kind))


def name_pass(view: str, block_size: int | None) -> str:
    """Name a pass in a sentence, by its view and block size."""
    name = f"in the {view} view"
    return name if block_size is None else f"{name} at block size {block_size}"
