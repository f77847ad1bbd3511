"""A thousand runs on one bridge: memory, tensors and hooks are at the end what they were at first.

By hand: ``python -m tests.benchmarks.soak --runs 1000``. Runs with hooks and records, with and
without the cache, replays, forks, exact sums, other block sizes, saved runs, and errors in between.
"""

import argparse
import contextlib
import gc
import resource
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

import transformer_lens_bd3lm as bd3lm

RESID = "blocks.1.hook_resid_post"


@dataclass(frozen=True)
class Held:
    """What a process holds.

    Attributes:
        tensors: number of tensors that Python knows.
        hooks: number of hooks on the bridge.
        resident: resident memory, MiB.
        files: number of open files.
    """

    tensors: int
    hooks: int
    resident: float
    files: int


def held(bridge: Any) -> Held:
    """Return what this process holds now."""
    gc.collect()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    points = {id(point): point for point in bridge.hook_dict.values()}.values()
    hooks = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in points)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(list(Path("/proc/self/fd").iterdir()))
    return Held(tensors, hooks, pages * resource.getpagesize() / 2**20, files)


def fail(activation: Any, hook: Any, step: Any = None) -> None:
    """Fail in the middle of a pass."""
    raise ZeroDivisionError


def one_round(bridge: Any, number: int, folder: Path) -> None:
    """Run everything that holds something for a while, once; errors in between."""
    hooks = bd3lm.StepHooks().add(RESID, lambda x, hook, step: 1.1 * x, step=0)
    size = (1, 2, 4)[number % 3]
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": number, "block_size": size}
    run = bd3lm.denoise(bridge, [[0, 1]], hooks=hooks, record=[RESID], **options)
    bd3lm.denoise(bridge, [[0, 1]], kv_cache=False, lookahead=4, **options)
    run.save(folder / "run")
    bd3lm.replay(bd3lm.Run.load(folder / "run", bridge, hooks=hooks), mode="pinned")
    shutil.rmtree(folder / "run")
    bd3lm.fork(run, 1, 2)
    bd3lm.exact(bridge, run.tokens[:, :5], size)
    bridge.run_with_cache(run.tokens)
    with bd3lm.block_size(bridge, "full"):
        bridge(run.tokens).sum().backward()
    bridge.zero_grad()
    for wrong in (
        lambda: bd3lm.denoise(bridge, [[0]], hooks=[(RESID, fail)], **options),
        lambda: bridge.run_with_hooks(run.tokens, fwd_hooks=[(RESID, fail)]),
        lambda: bd3lm.denoise(bridge, [[0]], hooks=[("nowhere", fail)], **options),
        lambda: next(bd3lm.denoise_steps(bridge, [[0]], **options)),  # left in the middle
        lambda: bridge(run.tokens, block_size=0),
    ):
        with contextlib.suppress(ZeroDivisionError, bd3lm.BD3LMError):
            wrong()


def soak(bridge: Any, runs: int, warm: int = 3) -> tuple[Held, Held]:
    """Return what is held after ``warm`` rounds, and after as many as make ``runs`` runs."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(warm):
            one_round(bridge, number, Path(folder))
        first = held(bridge)
        for number in range(max(runs // 10, 1)):  # ten runs a round
            one_round(bridge, number, Path(folder))
        return first, held(bridge)


def main() -> None:
    """Soak the embedded grammar model, and print what is held."""
    parser = argparse.ArgumentParser(description="Run a thousand times, and compare memory.")
    parser.add_argument("--runs", type=int, default=1000)
    torch.set_num_threads(1)
    bridge = TransformerBridge.boot_transformers(bd3lm.GRAMMAR, device="cpu")
    first, last = soak(bridge, parser.parse_args().runs, warm=20)
    print(f"after warm-up: {first}\nat the end:    {last}")


if __name__ == "__main__":
    main()
