"""Exact NLL and NELBO of one text of the whole context at block 4, at the released size.

``python -m tests.benchmarks.exact_sums`` compares one call of ``exact`` with the 15 plain dual
forwards that would see the same masked states, and the peak memory of its process with that of a
process that runs one plain dual forward. Random weights, 2 threads.
"""

import resource
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tests.benchmarks.released_size import CONTEXT, released_model
from transformer_lens_bd3lm.likelihoods.exact import exact

BLOCK, STATES, TIMED = 4, 15, 3


def text() -> torch.Tensor:
    """One text of random words."""
    return torch.randint(50_000, (1, CONTEXT), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def plain_forward() -> float:
    """Seconds of one plain dual forward, the least of a few."""
    model, x_0 = released_model(), text()
    x_t = x_0.clone()
    x_t[:, 1::2] = model.config.vocab_size - 1
    times = []
    for _ in range(TIMED):
        start = time.perf_counter()
        model(torch.cat([x_t, x_0], dim=1), sample_mode=False)
        times.append(time.perf_counter() - start)
    return min(times)


def exact_sum() -> float:
    """Seconds of one call."""
    model = released_model()
    bridge = build_bridge_from_module(model, "BD3LM", hf_config=model.config)
    start = time.perf_counter()
    exact(bridge, text(), BLOCK)
    return time.perf_counter() - start


def measured(what: str) -> tuple[float, float]:
    """Seconds, and the peak memory in GB of a process that does nothing else."""
    command = [sys.executable, "-m", "tests.benchmarks.exact_sums", what]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(told[-2]), float(told[-1])


def main() -> None:
    """Print the table, or one measurement in a process of its own."""
    torch.set_num_threads(2)
    if sys.argv[1:]:
        seconds = plain_forward() if sys.argv[1] == "plain" else exact_sum()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        Console().print(seconds, peak)
        return
    (forward, room), (whole, peak) = measured("plain"), measured("exact")
    table = Table(title=f"exact sums, block {BLOCK}, {CONTEXT} tokens, 2 threads")
    for column in ("what", "measured", "required"):
        table.add_column(column, justify="left" if column == "what" else "right")
    ratio = whole / (STATES * forward)
    table.add_row("time / 15 plain dual forwards", f"{ratio:.2f}", "<= 0.60")
    table.add_row("  seconds", f"{whole:.1f}; 15 x {forward:.2f}", "")
    table.add_row("peak memory / that of one plain dual forward", f"{peak / room:.2f}", "<= 2")
    table.add_row("  GB, weights and libraries included", f"{peak:.2f}; {room:.2f}", "")
    Console().print(table)


if __name__ == "__main__":
    main()
