"""Choose the fastest kernel on this machine for a linear layer over few rows.

A step of denoising sends a few rows through each weight, and the time should be that of reading the
weight from memory. Kernels that compute the same sums differ by a factor of two or three, and which
is the fastest depends on the number of rows, the dtype and the processor. So they are measured:
once per process for each power of two of rows, each dtype and each number of threads, at the first
such call. It takes about 0.1 s: 20 ms of calls, and the rest to make weights larger than the
processor's caches.

``F.linear`` is kept unless another kernel is 1.15 times as fast, by its second best time against
the best time of ``F.linear``, so that results do not change in their last digits from process to
process. A kernel that this machine lacks, or that multiplies in a lower precision, is left out.

In float64, and for weights of less than 2^18 numbers, which fit into caches, the kernel is always
``F.linear``.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from threading import RLock
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from transformer_lens_bd3lm.bridge.fused import is_transformed

MOST_ROWS = 64
LEAST_WEIGHTS = 2**18
CLEARLY = 1.15
HALVES = (torch.bfloat16, torch.float16)
_DTYPES = frozenset((torch.float32, *HALVES))

# Weights of the measurement: square, and together larger than the caches. At the other shapes of
# the released size the order of the kernels was the same.
_SIDE, _BYTES = 768, 40 * 2**20
_LEAST_TURNS, _MOST_TURNS, _SECONDS = 4, 12, 0.02
_PART = 2**18
# Largest allowed error of a kernel, in errors of F.linear: oneDNN's are three times as large in
# float32, and those of a kernel that multiplies in half precision a thousand times.
_ROUNDING = 8

Rows = Float[Tensor, "row width"]
Weight = Float[Tensor, "out width"]
Bias = Float[Tensor, " out"]


@dataclass(frozen=True)
class Kernel:
    """A way to compute ``x W^T + bias``.

    Attributes:
        run: function of rows, a weight and a bias or None; returns contiguous rows.
        pack: function from a weight and a number of rows to the copy that ``run`` takes in place of
            the weight; None for a kernel that takes the weight itself.
        dtypes: dtypes of rows that the kernel is for.
    """

    run: Callable[..., Tensor]
    pack: Callable[[Tensor, int], Tensor] | None = None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, *HALVES)


def transposed(x: Rows, weight: Weight, bias: Bias | None) -> Float[Tensor, "row out"]:
    """Compute ``(W x^T + bias)^T``: the rows are copied into another layout, the weight is not."""
    if len(x) == 1:
        return (weight @ x[0] if bias is None else torch.addmv(bias, weight, x[0]))[None]
    y = weight @ x.T if bias is None else torch.addmm(bias[:, None], weight, x.T)
    return y.T.contiguous()


def onednn(x: Rows, weight: Tensor, bias: Bias | None) -> Float[Tensor, "row out"]:
    """Compute ``x W^T + bias`` in oneDNN, from a weight as it is or in oneDNN's own layout."""
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


def widened(x: Rows, weight: Weight, bias: Bias | None) -> Float[Tensor, "row out"]:
    """Compute in float32, one part of the weight at a time that fits into caches; round once."""
    wide, step = x.float().T, max(1, _PART // weight.shape[1])
    y = torch.cat([part.float() @ wide for part in weight.split(step)])
    y = y if bias is None else y + bias[:, None]
    return y.T.to(x.dtype).contiguous()


PLAIN = "F.linear"
KERNELS: dict[str, Kernel] = {
    PLAIN: Kernel(F.linear),
    "(W x^T)^T": Kernel(transposed),
    "oneDNN": Kernel(onednn),
    "float32 parts": Kernel(widened, dtypes=HALVES),
}
"""Kernels that take the weight as it is, the plain one first."""


class Case(NamedTuple):
    """Key of a choice: rows (a power of two), dtype, threads, and the kernels' names."""

    rows: int
    dtype: torch.dtype
    threads: int
    names: tuple[str, ...]
    mkldnn: bool = True


@dataclass(frozen=True)
class Choice:
    """Result of one measurement.

    Attributes:
        case: what was measured.
        name: the kernel that was chosen.
        times: ascending seconds of each kernel's calls; kernels that were left out have none.
        bytes: size of the weight that each call read, in the dtype of the rows.
    """

    case: Case
    name: str
    times: Mapping[str, list[float]]
    bytes: int
    kernel: Kernel = field(repr=False)

    def speed(self, name: str) -> float:
        """Return the speed of a kernel's best call, in gigabytes of weights per second."""
        return self.bytes / self.times[name][0] / 1e9


_choices: dict[Case, Choice] = {}
_lock = RLock()  # a kernel may itself choose another


def choose(rows: int, dtype: torch.dtype, kernels: Mapping[str, Kernel] = KERNELS) -> Choice:
    """Return the choice for a number of rows; measure first where there is none yet.

    Args:
        rows: rows of a call, rounded up to a power of two.
        dtype: dtype of rows and weights.
        kernels: the kernels to choose from, by name, the plain one first.
    """
    rows = 1 << (rows - 1).bit_length()
    mkldnn = torch._C._get_mkldnn_enabled()  # pyright: ignore
    case = Case(rows, dtype, torch.get_num_threads(), tuple(kernels), mkldnn)
    choice = _choices.get(case)
    if choice is None:
        with _lock:
            choice = _choices.get(case)
            if choice is None:
                choice = _choices[case] = _measured(case, kernels)
    return choice


def choices() -> list[Choice]:
    """Return the choices that this process has made so far."""
    with _lock:
        so_far = list(_choices.values())
    return sorted(so_far, key=lambda choice: (str(choice.case.dtype), choice.case.rows))


def forget() -> None:
    """Forget every choice, so that the next call measures again."""
    with _lock:
        _choices.clear()


def rows_of(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """Return the number of rows, if a kernel may be chosen for them; 0 if it must be ``F.linear``.

    The kernels are for plain CPU tensors of one dtype, where nothing is compiled, traced,
    transformed or dispatched elsewhere, and no autocast changes the dtype. Some of them have no
    derivative, so passes with gradients run ``F.linear``.
    """
    if torch.compiler.is_compiling():
        return 0
    dtype, tensors = x.dtype, (x, weight) if bias is None else (x, weight, bias)
    if dtype not in _DTYPES or not all([_is_plain(t, dtype) for t in tensors]):
        return 0
    rows = x.shape[:-1].numel()
    fits = 0 < rows <= MOST_ROWS and weight.ndim == 2 and x.shape[-1:] == weight.shape[1:]
    if not fits or weight.numel() < LEAST_WEIGHTS or not weight.is_contiguous():
        return 0
    if torch.is_grad_enabled() and any([t.requires_grad for t in tensors]):
        return 0
    if forward_ad._current_level >= 0 or is_transformed() or torch.is_autocast_enabled("cpu"):
        return 0
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return 0
    return rows if bias is None or bias.is_contiguous() else 0


def _is_plain(t: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor is a strided Tensor or Parameter on the CPU, of this dtype."""
    kind = type(t)
    plain = kind is Tensor or kind is nn.Parameter
    return plain and t.is_cpu and t.dtype is dtype and t.layout is torch.strided


@torch.no_grad()
def _measured(case: Case, kernels: Mapping[str, Kernel]) -> Choice:
    """Time the kernels in turns over weights larger than the caches, and choose one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    x, weight, bias = (
        t.to(case.dtype)
        for t in (normal(case.rows, _SIDE), normal(_SIDE, _SIDE) / _SIDE**0.5, normal(_SIDE))
    )
    size = weight.numel() * weight.element_size()
    weights = list(weight.expand(_BYTES // size, -1, -1).contiguous())
    exact = F.linear(x.double(), weight.double(), bias.double())
    allowed = _ROUNDING * float((F.linear(x, weight, bias).double() - exact).abs().max())
    allowed += torch.finfo(x.dtype).eps * float(exact.abs().max())
    calls: dict[str, Callable[[], Tensor]] = {}
    for name in case.names:
        if case.dtype not in kernels[name].dtypes:
            continue
        try:
            call = _over(weights, kernels[name], x, bias)
            error = float((call().double() - exact).abs().max())
        except (RuntimeError, AttributeError):  # torch's errors for a kernel that it lacks
            continue
        if error <= allowed:
            calls[name] = call
    times: dict[str, list[float]] = {name: [] for name in calls}
    _take_turns(calls, times)
    times = {name: sorted(taken) for name, taken in times.items()}
    best = case.names[0]
    for name in times:
        # The best time alone could be an accident of a busy machine.
        if times[name][1] * CLEARLY < times[best][0]:
            best = name
    return Choice(case, best, times, size, kernels[best])


def _take_turns(
    calls: Mapping[str, Callable[[], Tensor]], times: Mapping[str, list[float]]
) -> None:
    """Append the seconds of each call, in turns until the time is up."""
    started = time.perf_counter()
    for turn in range(_MOST_TURNS):
        if turn >= _LEAST_TURNS and time.perf_counter() - started > _SECONDS:
            return
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)


def _over(
    weights: list[Tensor], kernel: Kernel, x: Tensor, bias: Tensor
) -> Callable[[], Float[Tensor, "row out"]]:
    """Return a function whose calls run a kernel over one weight after another."""
    pack = kernel.pack
    turns = cycle(weights if pack is None else [pack(weight, len(x)) for weight in weights])
    return lambda: kernel.run(x, next(turns), bias)
