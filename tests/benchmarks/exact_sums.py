"""Exact NLL and NELBO of one text of the whole context at block 4, at the released size.

``python -m tests.benchmarks.exact_sums`` compares one call of ``exact`` with the 15 plain dual
forwards that would see the same masked states: seconds, taking turns in one process, medians; and
the peak memory of a process that runs one with that of a process that runs the other. Random
weights, 2 threads.

What is left is arithmetic: about 0.36 of the multiplications of 15 plain dual forwards.
"""

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tests.benchmarks.released_size import CONTEXT, released_model
from transformer_lens_bd3lm.likelihoods.exact import exact

BLOCK, STATES, TURNS = 4, 15, 3


def text() -> torch.Tensor:
    """One text of random words."""
    return torch.randint(50_000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))


def plain_forward() -> Callable[[], object]:
    """One plain dual forward, half of its noisy stream masked."""
    model, x_0 = released_model(), text()
    x_t = x_0.clone()
    x_t[:, 1::2] = model.config.vocab_size - 1
    return torch.no_grad()(lambda: model(torch.cat([x_t, x_0], dim=1), sample_mode=False))


def exact_sum() -> Callable[[], object]:
    """One call of ``exact``."""
    model = released_model()
    bridge = build_bridge_from_module(model, "BD3LM", hf_config=model.config)
    return lambda: exact(bridge, text(), BLOCK)


def seconds(fn: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def peak(what: str) -> float:
    """Peak memory in GB of a process that does nothing else."""
    command = [sys.executable, "-m", "tests.benchmarks.exact_sums", what]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(printed.split()[-1])


def main() -> None:
    """Print the table, or the peak memory of one call in a process of its own."""
    torch.set_num_threads(2)
    if sys.argv[1:]:
        (plain_forward if sys.argv[1] == "plain" else exact_sum)()()
        Console().print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
        return
    peaks = [peak(what) for what in ("plain", "exact")]
    plain, whole = plain_forward(), exact_sum()
    plain()
    forwards, sums = [], []
    for _ in range(TURNS):
        forwards += [seconds(plain) for _ in range(2)]
        sums.append(seconds(whole))
        forwards += [seconds(plain) for _ in range(2)]
    forward, total = statistics.median(forwards), statistics.median(sums)
    table = Table(title=f"exact sums, block {BLOCK}, {CONTEXT} tokens, 2 threads")
    for column in ("what", "measured", "required"):
        table.add_column(column, justify="left" if column == "what" else "right")
    table.add_row("time / 15 plain dual forwards", f"{total / STATES / forward:.2f}", "<= 0.40")
    table.add_row("  seconds", f"{total:.1f}; 15 x {forward:.2f}", "")
    table.add_row(
        "peak memory / that of one plain dual forward", f"{peaks[1] / peaks[0]:.2f}", "<= 1"
    )
    table.add_row("  GB, weights and libraries included", f"{peaks[1]:.2f}; {peaks[0]:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
