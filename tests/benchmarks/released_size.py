"""Speed at the released size (169.6 M parameters, random weights), as ratios in one run.

``python -m tests.benchmarks.released_size`` compares, in float32:

- the dual forward at 2 x 1024 with the plain one (dense 2n x 2n mask, both halves unembedded);
- a forward with one residual hook, and one that caches every residual, with one that does neither.

The things compared take turns, so that a slow minute slows them alike; the median of each counts.
The allocator is told to keep what is freed: else every pass has the kernel zero gigabytes anew, and
what is timed is which of them happened to find memory warm.
"""

import ctypes
import statistics
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import transformer_lens_bd3lm  # noqa: F401  (registers the adapter)
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.model.config import BD3LMConfig

BATCH, CONTEXT, ROUNDS = 2, 1024, 5
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def released_model() -> BD3LM:
    """The released architecture with random weights, gates open so that every layer counts."""
    torch.manual_seed(0)
    config = BD3LMConfig(block_size=4, cond_dim=128, architectures=["BD3LM"], return_dict=False)
    model = BD3LM(config).eval()
    for block in model.backbone.blocks:
        torch.nn.init.normal_(cast(Any, block).adaLN_modulation.bias, std=0.5)
    return model


def medians(fns: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median seconds of each function, taken in turns after one warm-up round."""
    taken: dict[str, list[float]] = {name: [] for name in fns}
    order = list(fns.items())
    for turn in range(ROUNDS + 1):
        # Another goes first each time: what ran before leaves the memory in its own state.
        order.append(order.pop(0))
        for name, fn in order:
            start = time.perf_counter()
            fn()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in taken.items()}


def keep_freed_memory() -> None:
    """Have glibc serve every tensor from its heap, and give nothing back."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


@torch.no_grad()
def main() -> None:
    """Print the table."""
    keep_freed_memory()
    plain, hooked = released_model(), released_model()
    bridge = build_bridge_from_module(hooked, "BD3LM", hf_config=hooked.config)
    x_0 = torch.randint(plain.config.vocab_size - 1, (BATCH, CONTEXT))
    x_t = torch.where(torch.rand(BATCH, CONTEXT) < 0.5, plain.config.vocab_size - 1, x_0)
    residuals = [f"blocks.{i}.hook_resid_post" for i in range(bridge.cfg.n_layers)]

    def keep(activation: torch.Tensor, hook: object) -> None:
        return None

    fast = bridge(x_t, clean=x_0)
    slow = plain(x_t, clean=x_0)
    difference = (fast - slow).abs().max() / slow.abs().max()
    del fast, slow
    times = medians(
        {
            "plain dense dual": lambda: plain(x_t, clean=x_0),
            "bridge dual": lambda: bridge(x_t, clean=x_0),
            "one residual hook": lambda: bridge.run_with_hooks(
                x_t, clean=x_0, fwd_hooks=[(residuals[6], keep)]
            ),
            "all residuals cached": lambda: bridge.run_with_cache(
                x_t, clean=x_0, names_filter=residuals
            ),
        }
    )
    table = Table(title=f"dual forward, {BATCH} x {CONTEXT}, {torch.get_num_threads()} threads")
    for column in ("pass", "seconds", "against"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    base = {"bridge dual": "plain dense dual"}
    for name, seconds in times.items():
        against = base.get(name, "bridge dual")
        ratio = "" if name == "plain dense dual" else f"{seconds / times[against]:.3f} x {against}"
        table.add_row(name, f"{seconds:.2f}", ratio)
    Console().print(table)
    Console().print(f"largest difference of logits, relative to their scale: {difference:.1e}")


if __name__ == "__main__":
    main()
