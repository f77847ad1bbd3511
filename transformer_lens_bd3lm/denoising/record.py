"""Records: which activations a run keeps, and the memory that they take at most.

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
from transformer_lens_bd3lm.bridge.host import Bridge
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
from transformer_lens_bd3lm.result import brief


@dataclass(frozen=True)
class Record:
    """Activations that a run keeps, of the active block's rows.

    Attributes:
        names: a hook name, several of them, or a function of names that returns True for those to
            keep.
        block: which blocks (int, slice, ints); all by default.
        step: which steps within a block; all by default.
        index: which steps of the whole run.
        t: steps at which some row's time lies in ``(low, high)``, ends included.
        masks_left: steps before which some row has this many masks left (int, slice, ints).
        when: a predicate on the step, beside the others.
        positions: which positions of the block, counted from its start; all by default.
        device: device that activations are kept on.
        dtype: dtype that activations are kept in; their own by default.
        max_bytes: most bytes that may be kept; a run that could need more is refused before it
            starts.

    Raises:
        InputError: for names, selectors or ``max_bytes`` of another type or range; and from
            :func:`denoise`, for a run that could need more than ``max_bytes``.
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

    __repr__ = brief

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
    def of(cls, record: Any, bridge: Bridge) -> "Record | None":
        """Return the record of a run, given as a ``Record``, as names, or as None to keep nothing.

        Raises:
            InputError: for another type.
            HookNameError: for a filter that matches no hook point of the bridge.
        """
        if record is None:
            return None
        if not isinstance(record, Record):
            record = cls(read_names(record, "record"))
        return record.on(bridge)

    def on(self, bridge: Bridge) -> "Record":
        """Return the record with hook names of a bridge in place of a function of names.

        Raises:
            HookNameError: if the function matches no hook point.
        """
        names = read_names(self.names)
        return self if isinstance(names, list) else replace(self, names=[*matching(bridge, names)])

    def wants(self, step: Step) -> bool:
        """Return whether a step is kept."""
        return bool(self.selectors.rows(step).any())

    def offsets(self, width: int) -> list[int]:
        """Return the kept positions of a block of ``width`` positions, counted from its start."""
        return [i for i in range(width) if matches(self.positions, i)]

    def keep(self, name: str, activation: Tensor) -> Tensor:
        """Return a detached copy of an activation at the kept positions, on the kept device."""
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
        bridge: Bridge,
        canvas: Canvas,
        one_row_at_a_time: bool = False,
        order: Int[Tensor, "batch pos"] | None = None,
    ) -> int:
        """Return the most bytes that a run may keep, whatever the noise.

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
                selected = sum(matches(self.step, i) for i in range(steps))
                if self.index is not None:
                    # Earlier blocks may have taken fewer steps than they could.
                    selected = min(
                        selected, sum(matches(self.index, i) for i in range(block, index + steps))
                    )
                total += selected
                if selected:
                    rows = max(rows, len(self.offsets(end - start)))
                    keys = max(keys, end - canvas.first_visible(start))
            index += steps
        names = dict.fromkeys(self.on(bridge).names)
        return total * sum(batch * self.width(bridge, name, rows, keys) for name in names)

    def width(self, bridge: Bridge, name: str, rows: int, keys: int) -> int:
        """Return the bytes of one activation of one batch row."""
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
        bridge: Bridge,
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
    """Stack activations of steps, whose sizes may differ, as ``[step, batch, ...]``.

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
