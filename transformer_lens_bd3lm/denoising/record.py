"""Which activations a run keeps, and how much memory that takes, known before it starts.

Only the active block's rows are kept, so memory grows as steps x active positions, and not as
steps x length. A pattern's keys are the exception: each row has as many as it can read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.hook_names import matching, read_names
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.checks import check_number
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_selectors import (
    Span,
    StepSelectors,
    Which,
    check_which,
    matches,
)
from transformer_lens_bd3lm.errors import InputError


@dataclass(frozen=True)
class Record:
    """Which activations a run keeps, of the active block's rows.

    Attributes:
        names: a hook name, several of them, or a function of names, for all that fire and pass.
        block: which blocks; all by default.
        step: which steps within a block; all by default.
        index: which steps of the whole run.
        t: steps at which some row's time lies in ``(low, high)``.
        masks_left: steps before which some row has so many masks left.
        when: a predicate on the step.
        positions: which positions of the block, counted from its start; all by default.
        device: where they are kept.
        dtype: kept in this dtype; as they come by default.
        max_bytes: a run that could need more is refused before it starts.
    """

    names: Any
    block: Which = None
    step: Which = None
    index: Which = None
    t: Span = None
    masks_left: Which = None
    when: Callable[[Step], bool] | None = None
    positions: Which = None
    device: str | torch.device = "cpu"
    dtype: torch.dtype | None = None
    max_bytes: int | float = 4 * 2**30
    selectors: StepSelectors = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", read_names(self.names))
        check_which("positions", self.positions)
        rule = "give a number of bytes >= 0, or float('inf')"
        check_number("max_bytes", self.max_bytes, 0, math.inf, rule)
        selectors = StepSelectors(
            self.block, self.step, self.index, self.t, self.masks_left, self.when
        )
        object.__setattr__(self, "selectors", selectors)

    @classmethod
    def of(cls, record: Any, bridge: Any) -> "Record | None":
        """Read what a run is to keep: a ``Record``, or the names alone; None keeps nothing.

        Raises:
            InputError: for anything else.
            HookNameError: for a filter that matches no hook point of the bridge.
        """
        if record is None:
            return None
        return (record if isinstance(record, Record) else cls(record)).on(bridge)

    def on(self, bridge: Any) -> "Record":
        """The same with the names of a bridge in place of a function of names.

        Raises:
            HookNameError: if it matches none.
        """
        names = read_names(self.names)
        return self if isinstance(names, list) else replace(self, names=[*matching(bridge, names)])

    def wants(self, step: Step) -> bool:
        """Whether this step is kept."""
        return bool(self.selectors.rows(step).any())

    def offsets(self, width: int) -> list[int]:
        """The kept positions of a block of this width."""
        return [i for i in range(width) if matches(self.positions, i)]

    def keep(self, name: str, activation: Tensor) -> Tensor:
        """A copy of the kept positions, detached, where and as it is kept."""
        spec = lookup(name)
        if self.positions is not None and spec.rows != "none":
            axis = spec.row_axis
            offsets = self.offsets(activation.shape[axis])
            kept = torch.tensor(offsets, dtype=torch.long, device=activation.device)
            activation = activation.index_select(axis, kept)
        dtype = self.dtype if self.dtype and activation.is_floating_point() else activation.dtype
        return activation.detach().to(device=self.device, dtype=dtype, copy=True)

    def bytes_needed(
        self,
        bridge: Any,
        canvas: Canvas,
        one_row_at_a_time: bool = False,
        order: Int[Tensor, "batch pos"] | None = None,
    ) -> int:
        """At most so many bytes are kept, whatever the noise.

        A step reveals at least one token in every row that has a mask, so a block takes at most as
        many steps as its fullest row has masks (with ``one_row_at_a_time``: as all have together).
        A forced ``order`` may also hold tokens back, for steps that reveal nothing. Every kept step
        takes as much as the widest, see :func:`stack_ragged`.
        """
        written, left = canvas.written(), canvas.to_denoise().any(0)
        batch, index, total, rows, keys = written.shape[0], 0, 0, 0, 0
        for block, (start, end) in enumerate(canvas.block_windows()):
            masks = written[:, start:end].sum(-1)
            steps = int(masks.sum() if one_row_at_a_time else masks.max())
            if order is not None:
                steps += max(int(order[:, start:end].max()) + 1 - block, 0)
            if matches(self.block, block) and bool(left[start:end].any()):
                named = sum(matches(self.step, i) for i in range(steps))
                if self.index is not None:
                    # Earlier blocks may have taken fewer steps than they could.
                    named = min(
                        named, sum(matches(self.index, i) for i in range(block, index + steps))
                    )
                total += named
                if named:
                    rows = max(rows, len(self.offsets(end - start)))
                    keys = max(keys, end - canvas.first_visible(start))
            index += steps
        names = dict.fromkeys(self.on(bridge).names)
        return total * sum(batch * self.width(bridge, name, rows, keys) for name in names)

    def width(self, bridge: Any, name: str, rows: int, keys: int) -> int:
        """Return the bytes of one activation, a batch row."""
        spec, cfg = lookup(name), bridge.cfg
        dtype = self.dtype or bridge.embed.weight.dtype
        size = 8 if spec.dtype == "int64" else dtype.itemsize
        if spec.dtype == "float32 or wider" and self.dtype is None:
            size = max(size, 4)
        sizes = {axis: getattr(cfg, axis) for axis in ("d_head", "d_model", "d_mlp", "d_vocab")}
        sizes |= {"head": cfg.n_heads, "cond": bridge.original_model.config.cond_dim}
        sizes |= {"batch": 1, "pos": rows, "query": rows, "key": keys}
        return size * math.prod(spec.shape(sizes))

    def check_budget(
        self,
        bridge: Any,
        canvas: Canvas,
        one_row_at_a_time: bool = False,
        order: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Refuse a run that could keep more than ``max_bytes``.

        Raises:
            InputError: with both figures.
        """
        needed = self.bytes_needed(bridge, canvas, one_row_at_a_time, order)
        if needed > self.max_bytes:
            raise InputError(
                f"the record may take {needed / 2**20:,.0f} MiB, max_bytes is "
                f"{self.max_bytes / 2**20:,.0f} MiB: keep fewer names, steps (block, step, index) "
                "or positions, a smaller dtype, or raise max_bytes"
            )


def stack_ragged(name: str, kept: list[Tensor]) -> Tensor:
    """One tensor ``[step, batch, ...]`` from steps whose sizes may differ.

    Keys that a step does not have yet are filled with what they would be: no attention (0) in a
    pattern, -inf in scores. Rows that a narrower last block does not have are NaN, or -1 in ids.
    """
    spec = lookup(name)
    sizes = [max(sizes) for sizes in zip(*(x.shape for x in kept), strict=True)]
    if all(list(x.shape) == sizes for x in kept):
        return torch.stack(kept)
    full = []
    for x in kept:
        if spec.has_keys:
            unseen = 0.0 if spec.kind == "pattern" else -torch.inf
            x = F.pad(x, (0, sizes[-1] - x.shape[-1]), value=unseen)
        wide = x.new_full(sizes, torch.nan if x.is_floating_point() else -1)
        wide[tuple(slice(0, size) for size in x.shape)] = x
        full.append(wide)
    return torch.stack(full)
