"""Which steps are meant: the selectors that step hooks and records share."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from transformer_lens_bd3lm.checks import is_int, is_real
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.errors import InputError

Which = int | slice | Collection[int] | None
Span = tuple[float, float] | None


def check_which(name: str, which: Which) -> None:
    """Refuse a selector that is no int, slice or collection of ints, or counts from the end.

    Raises:
        InputError: for other types, and for negative numbers: the total count is not known.
    """
    if which is None:
        return
    if isinstance(which, slice):
        numbers = [end for end in (which.start, which.stop, which.step) if end is not None]
    elif isinstance(which, int) or isinstance(which, str) or not isinstance(which, Collection):
        numbers = [which]
    else:
        numbers = list(which)
    if any(not is_int(n) or n < 0 for n in numbers):
        raise InputError(
            f"{name}={which!r}: give an int, a slice or ints that count from 0, none of them "
            "negative"
        )


def check_span(name: str, span: Span) -> None:
    """Refuse a range of times other than ``(low, high)`` within 0 to 1.

    Raises:
        InputError: unless it is ``(low, high)`` with 0 <= low <= high <= 1.
    """
    if span is None:
        return
    numbers = isinstance(span, tuple) and len(span) == 2
    if not numbers or not all(map(is_real, span)):
        raise InputError(f"{name}={span!r}: give (low, high), both within 0..1")
    if not 0 <= span[0] <= span[1] <= 1:
        raise InputError(f"{name}={span!r}: give (low, high) with 0 <= low <= high <= 1")


def matches(which: Which, number: int) -> bool:
    """Return whether a selector (an int, a slice, some ints, or None for all) names a number."""
    if which is None:
        return True
    if isinstance(which, int):
        return number == which
    if isinstance(which, slice):
        return number in range(number + 1)[which]
    return number in which


@dataclass(frozen=True)
class StepSelectors:
    """Selectors of steps; a step is selected where all that are given agree.

    Attributes:
        block: which blocks (int, slice, ints); all by default. Block 0 is the first denoised.
        step: which steps within a block.
        index: which steps of the whole run.
        t: ``(low, high)``, both ends included: rows whose time lies there.
        masks_left: rows with so many masks left in the block before the step (int, slice, ints).
        when: a predicate on the step.
    """

    block: Which = None
    step: Which = None
    index: Which = None
    t: Span = None
    masks_left: Which = None
    when: Callable[[Step], bool] | None = None

    def __post_init__(self) -> None:
        for name in ("block", "step", "index", "masks_left"):
            check_which(name, getattr(self, name))
        check_span("t", self.t)

    def rows(self, step: Step) -> Bool[Tensor, " batch"]:
        """Return the batch rows in which a step is selected.

        Storing a block is no step: there only ``block``, ``index`` and ``when`` select.
        """
        selected = torch.ones(step.masked.shape[0], dtype=torch.bool)
        none = ~selected
        if not (matches(self.block, step.block) and matches(self.index, step.index)):
            return none
        if step.scope != "commit":
            if not matches(self.step, step.step):
                return none
            left = step.masks_left
            if self.t is not None:
                low, high = self.t
                t = step.t.cpu()
                selected = selected & (left > 0) & (low <= t) & (t <= high)
            if self.masks_left is not None:
                matching = [matches(self.masks_left, n) for n in left.tolist()]
                selected = selected & (left > 0) & torch.tensor(matching)
        if not bool(selected.any()) or (self.when is not None and not self.when(step)):
            return none
        return selected

    def given(self) -> list[str]:
        """Return the names of the selectors that are set."""
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]

    def narrowed(self, when: Callable[[Step], bool]) -> "StepSelectors":
        """Return the selectors with one more predicate that must hold."""
        own = self.when
        both = when if own is None else lambda step: when(step) and own(step)
        return replace(self, when=both)
