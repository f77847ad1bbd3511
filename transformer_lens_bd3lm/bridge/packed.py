"""Keep second copies of a bridge's weights that are read faster, within a ``with`` block.

A copy is in oneDNN's own layout. Or, for weights in a half precision in which the processor cannot
multiply, it holds the same numbers in float32; then a result is rounded once, at the end.

A copy goes stale when its weight is edited. Before each use a linear layer compares the weight with
the one that was copied: is it the same parameter, storage and version, with the same numbers along
a line that meets every row and every column? Where it is not, it is copied again. Edits that
PyTorch's version counter does not count (``weight.data[...]``, NumPy views) may miss that line.
Then a hash of every weight finds them when the block ends, which raises.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import gcd
from threading import RLock
from typing import Any

import torch
import xxhash
from jaxtyping import Float
from torch import Tensor, nn

from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.few_rows import (
    HALVES,
    KERNELS,
    LEAST_WEIGHTS,
    MOST_ROWS,
    Choice,
    Kernel,
    choose,
    onednn,
)
from transformer_lens_bd3lm.bridge.host import require_bridge
from transformer_lens_bd3lm.bridge.linear import Linear, packs
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.errors import InputError, NotExactError


def _reordered(weight: Tensor, rows: int) -> Tensor:
    """Return a weight in the layout that oneDNN prefers for a number of rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)


def _in_float32(
    x: Float[Tensor, "row width"], weight: Float[Tensor, "out width"], bias: Tensor | None
) -> Float[Tensor, "row out"]:
    """Compute in float32, with the fastest kernel there, and round once."""
    run = choose(len(x), torch.float32).kernel.run
    return run(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


PACKINGS = {
    "onednn": Kernel(onednn, pack=_reordered),
    "float32": Kernel(_in_float32, pack=lambda weight, rows: weight.float(), dtypes=HALVES),
}
"""Kernels that take a second copy of the weight."""


@dataclass(frozen=True)
class Packing:
    """Result of :func:`packed`.

    Attributes:
        method: ``"onednn"``, ``"float32"``, or None where no copy is faster and none was made.
        bytes: size of all second copies, in bytes.
        choice: the measurement; None where the method was given.
    """

    method: str | None
    bytes: int = 0
    choice: Choice | None = None


@dataclass(frozen=True)
class _Copy:
    """Second copy of a weight, and the state of the weight when it was copied."""

    packed: Tensor
    weight: Tensor
    # Shares the weight's storage and keeps it alive, so that no other is allocated at its address.
    alias: Tensor
    version: int
    line: Tensor
    digest: bytes

    @classmethod
    def of(cls, weight: Tensor, kernel: Kernel, rows: int) -> "_Copy":
        """Return a new copy of a weight."""
        assert kernel.pack is not None
        version, alias = weight._version, weight.detach()
        digest = _digest(alias)
        return cls(kernel.pack(alias, rows), weight, alias, version, _line(alias).clone(), digest)

    def is_of(self, weight: Tensor) -> bool:
        """Return whether the weight is the same parameter, storage and version."""
        same = weight is self.weight and weight.data_ptr() == self.alias.data_ptr()
        return same and weight.dtype == self.alias.dtype and weight._version == self.version


def _line(weight: Float[Tensor, "out width"]) -> Float[Tensor, " number"]:
    """Return a view of numbers that lie in every row and every column of a contiguous weight."""
    out, width = weight.shape
    # A stride up to the width meets each row. If it has no divisor in common with the width, each
    # `width` numbers in turn meet every column, and there are as many where it is at most `out`.
    stride = min(out, width)
    while gcd(stride, width) > 1:
        stride -= 1
    return weight.view(-1)[::stride]


def _digest(weight: Tensor) -> bytes:
    """Return a hash of a weight's bytes."""
    data: Any = weight.view(torch.uint8).numpy()
    return xxhash.xxh3_128(data).digest()


class _PackedLinear:
    """Second copy of one linear layer's weight, made again whenever the weight has changed."""

    def __init__(self, weight: Tensor, method: str, rows: int, measured: bool):
        self.kernel = PACKINGS[method]
        self.kernels = KERNELS | {method: self.kernel} if measured else {method: self.kernel}
        self.rows, self.dtype = rows, weight.dtype
        self.copy = _Copy.of(weight, self.kernel, rows)

    def __call__(
        self, x: Float[Tensor, "row width"], weight: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "row out"]:
        """Compute ``x W^T + bias``, from the copy where that is fastest."""
        if weight.dtype != self.dtype or weight.is_inference():
            return choose(len(x), x.dtype).kernel.run(x, weight, bias)
        kernel = self.kernel
        if len(self.kernels) > 1:
            kernel = choose(len(x), x.dtype, self.kernels).kernel
        return kernel.run(x, weight if kernel.pack is None else self.packed(weight), bias)

    def packed(self, weight: Tensor) -> Tensor:
        """Return the second copy of the weight as it is now."""
        copy = self.copy
        if not copy.is_of(weight) or not torch.equal(_line(weight), copy.line):
            copy = self.copy = _Copy.of(weight, self.kernel, self.rows)
        return copy.packed

    def is_stale(self) -> bool:
        """Return whether the weight was edited past the version counter since it was copied."""
        copy = self.copy
        return copy.is_of(copy.weight) and _digest(copy.alias) != copy.digest


@dataclass
class _Open:
    """Scopes that are open over one model, and the copies that they share."""

    packing: Packing
    copies: dict[nn.Linear, _PackedLinear]
    scopes: int = 0


_scopes: dict[nn.Module, _Open] = {}
_lock = RLock()


@contextmanager
def packed(bridge: Any, method: str = "auto", rows: int | None = None) -> Iterator[Packing]:
    """Keep a second, packed copy of a bridge's weights within a ``with`` block.

    Passes without gradients then read the copies: on a CPU, in every linear layer over up to 64
    rows, without autocast and without hooks of the layer's own. Everything else stays as it is.
    Results are the same up to rounding. Edited weights are copied again at their next use.

    The copies take as many bytes as the linear layers' weights (524 MB at the released size in
    float32), and twice as many for ``"float32"``.

    A block within a block over the same bridge, also in another thread, shares the copies of the
    first one, whatever its method. The copies are freed when the last of these blocks ends.

    Args:
        bridge: a BD3LM bridge.
        method: ``"onednn"`` for oneDNN's layout, ``"float32"`` for float32 copies of weights in a
            half precision, or ``"auto"`` for whichever is measured to be clearly faster than every
            kernel on the weight as it is. If neither is, nothing is copied.
        rows: number of rows of a pass that layout and measurement are for: batch times block size,
            at most 64. The bridge's block size by default.

    Yields:
        A ``Packing``: the method, the bytes of all copies, and the measurement.

    Raises:
        InputError: for a method that does not work on this machine or for these weights, and for
            other arguments that do not fit.
        NotExactError: at the end of the block, if an edit of a weight was missed because PyTorch's
            version counter does not count it; results since that edit are those of the old weight.

    Warns:
        UserWarning: if no copy is faster here.
    """
    model = require_bridge(bridge).original_model
    check_choice("method", method, ("auto", *PACKINGS))
    rows = min(block_size_of(bridge), MOST_ROWS) if rows is None else rows
    check_int("rows", rows, 1, MOST_ROWS)
    with _lock:
        opened = _scopes.get(model)
        if opened is None:
            opened = _scopes[model] = _opened(model, method, rows)
            packs.update(opened.copies)
        opened.scopes += 1
    try:
        yield opened.packing
    finally:
        with _lock:
            opened.scopes -= 1
            if not opened.scopes:
                del _scopes[model]
                for linear in opened.copies:
                    packs.pop(linear, None)
    _check(opened)


def _opened(model: nn.Module, method: str, rows: int) -> _Open:
    """Copy a model's weights, unless no copy is faster."""
    linears: list[nn.Linear] = [m for m in model.modules() if isinstance(m, Linear) and _fits(m)]
    dtypes = {linear.weight.dtype for linear in linears}
    if len(dtypes) != 1:
        return _nothing("no linear has a large float32 or half-precision weight on a CPU")
    dtype, choice = dtypes.pop(), None
    if method == "auto":
        choices = {
            name: choose(rows, dtype, KERNELS | {name: kernel})
            for name, kernel in PACKINGS.items()
            if dtype in kernel.dtypes
        }
        faster = [name for name, choice in choices.items() if choice.name == name]
        if not faster:
            choice = choices["onednn"]
            return _nothing(f"{choice.name} is as fast here over {rows} rows, without it", choice)
        method = min(faster, key=lambda name: choices[name].times[name][0])
        choice = choices[method]
    if dtype not in PACKINGS[method].dtypes:
        raise InputError(f'method="{method}": the weights are float32 already: give "auto"')
    try:
        copies = {
            linear: _PackedLinear(linear.weight, method, rows, choice is not None)
            for linear in linears
        }
    except (RuntimeError, AttributeError) as error:
        raise InputError(
            f'method="{method}": oneDNN does not pack {dtype} here: give "auto"'
        ) from error
    size = sum(linear.weight.nbytes for linear in copies) * (2 if method == "float32" else 1)
    return _Open(Packing(method, size, choice), copies)


def _nothing(why: str, choice: Choice | None = None) -> _Open:
    """Warn that no copy is made."""
    warnings.warn(f"no weight is packed: {why}", UserWarning, stacklevel=5)
    return _Open(Packing(None, choice=choice), {})


def _fits(linear: nn.Linear) -> bool:
    """Return whether a copy of a linear layer's weight can be kept."""
    weight = linear._parameters.get("weight")
    if type(weight) is not nn.Parameter or weight.is_inference() or weight.numel() < LEAST_WEIGHTS:
        return False
    here = weight.device.type == "cpu" and weight.layout == torch.strided
    return here and weight.is_contiguous() and weight.dtype in (torch.float32, *HALVES)


def _check(opened: _Open) -> None:
    """Refuse results of copies that went stale without notice.

    Raises:
        NotExactError: if a weight is not what was copied, although its version is the same.
    """
    stale = [each for each in opened.copies.values() if each.is_stale()]
    if stale and not opened.scopes:
        shapes = ", ".join(str(tuple(each.copy.weight.shape)) for each in stale[:3])
        raise NotExactError(
            f"{len(stale)} weights (shapes {shapes}) were edited past PyTorch's version counter "
            "within bd3lm.packed, as weight.data[...] and NumPy views do, and their old numbers "
            "were used: edit within torch.no_grad() without .data, or outside of the scope"
        )
