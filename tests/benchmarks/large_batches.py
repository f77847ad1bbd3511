"""Many prompts through one call: tokens a second against one by one, and memory against the budget.

``python -m tests.benchmarks.large_batches`` writes 32 tokens behind each of 1000 prompts of 5 to 50
tokens on the embedded model, and measures:

- ``denoise_many`` on all of them against ``denoise`` on every 25th. The two take turns: some single
  prompts before each of the budgets and some after. Each prompt that ran alone is compared with its
  run in the batch;
- by how much the memory of a process grows at most while it does nothing else, by the kernel's
  account (``VmHWM``, reset after the model has written for two prompts), by budget. It gives freed
  memory back at once, so that what the allocator keeps is not counted. Linux alone.

Threads are those of ``OMP_NUM_THREADS``. On a machine that others use, seconds of the processor on
one thread are the steadier ratio.
"""

import ctypes
import random
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm

PROMPTS, NEW, ALONE = 1000, 32, 40
SHORTEST, LONGEST = 5, 50
BUDGETS = [2**26, 2**30]
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def prompts_of(bridge: Any) -> list[list[int]]:
    """Prompts of 5 to 50 tokens, BOS and any words, with a seed of their own."""
    numbers = random.Random(0)
    bos, size = bridge.tokenizer.bos_token_id, bridge.cfg.d_vocab
    words = [i for i in range(size) if i not in (bos, bridge.cfg.mask_token_id)]
    lengths = [numbers.randint(SHORTEST, LONGEST) for _ in range(PROMPTS)]
    return [[bos, *numbers.choices(words, k=length - 1)] for length in lengths]


def write(bridge: Any, prompts: list[list[int]], max_bytes: int) -> Any:
    """Write for all prompts within a budget."""
    return bd3lm.denoise_many(
        bridge, prompts, max_new_tokens=NEW, seed=0, max_bytes=max_bytes, progress=False
    )


def growth_of(max_bytes: int) -> int:
    """By how many bytes a process of its own grows at most that writes within a budget."""
    command = [sys.executable, "-m", "tests.benchmarks.large_batches", str(max_bytes)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(printed.splitlines()[-1])


def one_process(max_bytes: int) -> None:
    """What the process of :func:`growth_of` does."""
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**16)
    bridge = TransformerBridge.boot_transformers(bd3lm.TINY)
    prompts = prompts_of(bridge)
    write(bridge, prompts[:2], max_bytes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is the present size from here on
    before = memory("VmRSS")
    runs = write(bridge, prompts, max_bytes)
    print(memory("VmHWM") - before)
    assert len(runs) == PROMPTS


def memory(name: str) -> int:
    """An entry of the kernel's account of this process's memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{name}:")[1].split()[0])


class Clock:
    """Seconds on the clock and seconds of the processor that several calls took."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def time(self, fn: Callable[[], Any]) -> Any:
        """Call a function, and add what it took."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = fn()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu
        return result


def main() -> None:
    """Print the table."""
    bridge = TransformerBridge.boot_transformers(bd3lm.TINY)
    prompts = prompts_of(bridge)
    every = iter(range(0, PROMPTS, PROMPTS // ALONE))
    alone: dict[int, Any] = {}
    one = Clock()

    def write_alone(i: int) -> Any:
        noise = bd3lm.Noise(0, [i])
        return bd3lm.denoise(bridge, [prompts[i]], max_new_tokens=NEW, noise=noise, progress=False)

    def some_alone(how_many: int) -> None:
        for i in islice(every, how_many):
            alone[i] = one.time(partial(write_alone, i))

    write(bridge, prompts[:2], BUDGETS[0])  # a first pass pays for what is made once
    many = {}
    for budget in BUDGETS:
        some_alone(ALONE // (len(BUDGETS) + 1))
        clock = Clock()
        many[budget] = clock.time(partial(write, bridge, prompts, budget)), clock
    some_alone(ALONE)
    threads = torch.get_num_threads()
    title = f"{PROMPTS} prompts of {SHORTEST} to {LONGEST} tokens, {NEW} new, {threads} threads"
    table = Table(title=title)
    columns = ("", "batches", "tokens/s", "ratio", "ratio (CPU s)", "MiB expected", "MiB measured")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    rate = NEW * len(alone) / one.wall
    table.add_row(f"one by one, {len(alone)} prompts", "", f"{rate:.0f}", "1", "1", "", "")
    times = PROMPTS / len(alone)
    for budget, (runs, clock) in many.items():
        table.add_row(
            f"max_bytes = {budget >> 20} MiB",
            str(len(runs.numbers)),
            f"{NEW * PROMPTS / clock.wall:.0f}",
            f"{times * one.wall / clock.wall:.1f}",
            f"{times * one.cpu / clock.cpu:.1f}",
            f"{runs.bytes / 2**20:.0f}",
            f"{growth_of(budget) / 2**20:.0f}",
        )
    console = Console()
    console.print(table)
    for budget, (runs, _) in many.items():
        parted = [
            i for i, run in alone.items() if not torch.equal(runs[i].tokens[0], run.tokens[0])
        ]
        leads = [float(alone[i].lead.nan_to_num(torch.inf).min()) for i in parted]
        console.print(
            f"{budget >> 20} MiB: {len(alone) - len(parted)} of {len(alone)} texts are the same "
            f"as alone; smallest leads of the others, in nats: {leads}"
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        one_process(int(sys.argv[1]))
    else:
        main()
