"""Measure the speed of the denoising loop on this machine, for each exact way to write faster.

A pass over a few rows reads every weight once. So on most machines it takes at least the time in
which memory gives them, the memory bound: ``weights / bandwidth``. The ways take turns, and the
least time of each counts, since other work on the machine only adds time.
"""

import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.cuda_graphs import cuda_graphs
from transformer_lens_bd3lm.bridge.few_rows import KERNELS, PLAIN, choices
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.packed import packed
from transformer_lens_bd3lm.bridge.texts import bos_of
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Result, plain_values

BASE = "one by one"
COPIED = 2**28  # bytes that are read to measure the memory: more than any cache holds


@dataclass(frozen=True)
class Timed:
    """Time of one way to write a text.

    Attributes:
        seconds: least time of its rounds.
        tokens: tokens written, in all texts.
        passes: passes of the network.
        block_size: tokens per block.
        rows: number of texts in the batch.
    """

    seconds: float
    tokens: int
    passes: int
    block_size: int
    rows: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens written per second, in all texts."""
        return self.tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass gives each text, on average."""
        return self.tokens / self.rows / self.passes

    @property
    def pass_seconds(self) -> float:
        """Seconds per pass, with the time for drawing tokens and bookkeeping."""
        return self.seconds / self.passes


@dataclass(frozen=True)
class KernelSpeed:
    """Kernel that linear layers run over a number of rows, and how fast it reads weights.

    Attributes:
        rows: largest number of rows that run it; half as many and fewer may run another kernel.
        name: the kernel's name.
        bytes_per_second: bytes of weights that the kernel reads per second.
        plain_bytes_per_second: bytes of weights that ``F.linear`` reads per second.
    """

    rows: int
    name: str
    bytes_per_second: float
    plain_bytes_per_second: float


@dataclass(frozen=True, repr=False)
class Speed(Result):
    """Speed at which a bridge writes text on a machine, in several ways.

    Attributes:
        model: the checkpoint's name.
        device: device of the bridge.
        instructions: instruction set that torch uses on the CPU; empty on other devices.
        threads: number of CPU threads.
        dtype: dtype of the weights.
        weight_bytes: bytes of weights that a pass reads.
        bytes_per_second: bytes per second that a sum over a large tensor reads from memory.
        lines: the time of each way, by name, in the order of the table; ``"one by one"``, with the
            cache and one state in a pass, is the one that others are compared with.
        kernels: kernels that large linear layers run over few rows; empty on other devices than a
            CPU.
    """

    model: str
    device: str
    instructions: str
    threads: int
    dtype: str
    weight_bytes: int
    bytes_per_second: float
    lines: dict[str, Timed] = field(repr=False)
    kernels: list[KernelSpeed] = field(repr=False)

    @property
    def bound(self) -> float:
        """Memory bound of a pass: seconds in which memory gives all weights once."""
        return self.weight_bytes / self.bytes_per_second

    def ratio(self, name: str) -> float:
        """Return the tokens per second of a line divided by those of ``"one by one"``."""
        return self.lines[name].tokens_per_second / self.lines[BASE].tokens_per_second

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values for JSON."""
        figures = ("tokens_per_second", "tokens_per_pass", "pass_seconds")
        lines = {
            name: vars(line) | {each: getattr(line, each) for each in figures}
            for name, line in self.lines.items()
        }
        bound = {"memory_bound_seconds": self.bound}
        kernels = [vars(kernel) for kernel in self.kernels]
        return plain_values(vars(self) | bound | {"lines": lines, "kernels": kernels})

    def _figures(self) -> str:
        line = self.lines[BASE]
        return (
            f"{self.model} on {self.device}: {line.tokens_per_second:.1f} tokens/s one by one, "
            f"{line.pass_seconds * 1e3:.1f} ms a pass, {self.bound * 1e3:.1f} ms to read its "
            "weights"
        )


def measure_speed(
    bridge: Bridge,
    *,
    tokens: int = 32,
    rounds: int = 2,
    progress: bool | None = None,
) -> Speed:
    """Measure how fast a bridge writes text on this machine, in several ways.

    The ways are those of ``docs/speed.md`` that this machine and checkpoint have. Each writes from
    BOS alone, under the same noise; packed weights are left out where no copy is faster.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        tokens: tokens that each run writes to each text; the last block is written to its end.
        rounds: number of times that each way is timed; the fastest counts.
        progress: show a progress bar; by default on a terminal.

    Returns:
        Seconds, tokens and passes of each way, and the memory bound of a pass.

    Raises:
        InputError: for fewer than 8 tokens or 1 round, or a model that denoises nothing.
        CheckpointError: for a name whose checkpoint cannot be loaded.
    """
    bridge = read_bridge(bridge)
    context = bridge.original_model.config.model_length
    check_int("tokens", tokens, 8, context - 1, f"give 8..{context - 1}")
    check_int("rounds", rounds, 1)
    weight = bridge.embed.weight
    on_cpu = weight.device.type == "cpu"
    ways, taken = _ways(bridge), {}
    with progress_bar("measuring", len(ways) * (rounds + 1), progress) as update:
        for turn in range(rounds + 1):  # the first round warms up
            for name, (scope, options) in ways.items():
                with scope():
                    line = _timed(bridge, tokens, options)
                if turn and (name not in taken or line.seconds < taken[name].seconds):
                    taken[name] = line
                update(advance=1)
    return Speed(
        model=Path(bridge.cfg.model_name).name,
        device=str(weight.device),
        instructions=torch.backends.cpu.get_cpu_capability() if on_cpu else "",
        threads=torch.get_num_threads(),
        dtype=str(weight.dtype).removeprefix("torch."),
        weight_bytes=weight_bytes(bridge),
        bytes_per_second=bytes_per_second(weight.device),
        lines=taken,
        kernels=_kernels(weight.dtype),
    )


def _kernels(dtype: torch.dtype) -> list[KernelSpeed]:
    """Return the kernels that were chosen in this process for weights of a dtype."""
    return [
        KernelSpeed(
            choice.case.rows,
            choice.name,
            choice.speed(choice.name) * 1e9,
            choice.speed(PLAIN) * 1e9,
        )
        for choice in choices()
        if choice.case.dtype == dtype
        and choice.case.names
        == tuple(name for name, kernel in KERNELS.items() if dtype in kernel.dtypes)
    ]


Scope = Callable[[], AbstractContextManager[Any]]


def _ways(bridge: Bridge) -> dict[str, tuple[Scope, dict[str, Any]]]:
    """Return the ways by name: a scope to run in, and keywords of :func:`denoise`."""
    config, one = bridge.original_model.config, {"lookahead": 1}
    cached = config.cross_attn and not config.time_conditioning
    ways: dict[str, tuple[Scope, dict[str, Any]]] = {}
    if cached:
        ways["prefix recomputed"] = (nullcontext, one | {"kv_cache": False})
    ways[BASE] = (nullcontext, one)
    if _packs(bridge):
        ways["packed weights"] = (lambda: packed(bridge), one)
    if cached and bridge.embed.weight.device.type == "cuda":
        ways["CUDA graphs"] = (lambda: cuda_graphs(bridge), one)
    ways["lookahead"] = (nullcontext, {})
    if cached and config.model_length >= 32:
        ways["blocks of 16"] = (nullcontext, one | {"block_size": 16})
        ways["blocks of 16, lookahead"] = (nullcontext, {"block_size": 16})
    ways["8 texts"] = (nullcontext, one | {"rows": 8})
    ways["32 texts"] = (nullcontext, one | {"rows": 32})
    return ways


def _packs(bridge: Bridge) -> bool:
    """Return whether packed weights are faster on this machine."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with packed(bridge) as packing:
            return packing.method is not None


def _timed(bridge: Bridge, tokens: int, options: dict[str, Any]) -> Timed:
    """Write once, and return the time."""
    rows = options.get("rows", 1)
    keywords = {name: value for name, value in options.items() if name != "rows"}
    first = int(bridge.cfg.mask_token_id == 0) if bridge.tokenizer is None else bos_of(bridge)
    bos = torch.full((rows, 1), first, device=bridge.embed.weight.device)
    start = time.perf_counter()
    run: Run = denoise(bridge, bos, max_new_tokens=tokens, progress=False, **keywords)
    seconds = time.perf_counter() - start
    written = int((run.commit_step_all >= 0).sum())
    return Timed(seconds, written, run.passes, run.block_size, rows)


def weight_bytes(bridge: Bridge) -> int:
    """Return the bytes of weights that a pass reads; the embedding is looked up, not read."""
    read = sum(p.numel() * p.element_size() for p in bridge.original_model.parameters())
    table: Tensor = bridge.embed.weight
    return read - table.numel() * table.element_size()


def bytes_per_second(device: torch.device) -> float:
    """Measure how fast a device reads its memory: the best of ten sums over 256 MiB."""
    x = torch.ones(COPIED // 4, device=device)

    def seconds() -> float:
        start = time.perf_counter()
        float(x.sum())  # a value, so that it has been computed
        return time.perf_counter() - start

    return COPIED / min(seconds() for _ in range(10))
