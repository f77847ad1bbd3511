"""Speed of the denoising loop at the released size, as ratios in one run.

``python -m tests.benchmarks.denoising`` compares, with random weights, block 4 and first hitting:

- the cached loop with the same loop over the plain modules, which recompute the prefix at each
  step, at 128 tokens and at the whole context, and what each lever adds: the kernel for few rows,
  states that share a pass, packed weights;
- passes a token on the embedded model, by block size;
- a block late in the context with an early one;
- bfloat16 with float32, eight rows with one, and a run that records every layer with one that does
  not;
- a step with the time that its weights take to be read from memory.

What is compared takes turns, and the least of each counts, or, at the whole context, happens in
the same minute: there the plain loop would take an hour, so its forward is timed at a few lengths
of the prefix, each when the cached run has come that far, and summed over all the steps.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from jaxtyping import Float
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

from tests.benchmarks.released_size import CONTEXT, keep_freed_memory, released_model
from transformer_lens_bd3lm import TINY
from transformer_lens_bd3lm.bridge import few_rows, linear
from transformer_lens_bd3lm.bridge.boot import boot_checkpoint
from transformer_lens_bd3lm.bridge.packed import packed
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.denoising.canvas import read_canvas
from transformer_lens_bd3lm.denoising.denoise import denoise, denoise_steps
from transformer_lens_bd3lm.denoising.record import Record
from transformer_lens_bd3lm.denoising.request import Request
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.denoising.step_forward import Network

BLOCK, EARLY, FEW, TOKENS, LENGTHS = 4, 48, 48, 128, 9


class PlainNetwork(Network):
    """The loop's network without bridge and cache: plain modules over everything so far."""

    modules: BD3LM

    @torch.no_grad()
    def logits(self, step: Step) -> Float[Tensor, "masked d_vocab"]:
        """Raw logits of the step's masked positions, out of those of the whole prefix."""
        start, end = step.window
        return self.modules(step.tokens[:, :end])[:, start:][step.masked]


@dataclass(frozen=True)
class Line:
    """One row of the table: what was measured, and what is asked of it."""

    name: str
    measured: str
    required: str = ""
    met: bool | None = None


def at_least(name: str, ratio: float, bound: float) -> Line:
    """A ratio that should be large."""
    return Line(name, f"{ratio:.2f}", f">= {bound:g}", ratio >= bound)


def at_most(name: str, ratio: float, bound: float) -> Line:
    """A ratio that should be small."""
    return Line(name, f"{ratio:.2f}", f"<= {bound:g}", ratio <= bound)


def bridge_over(model: BD3LM) -> Any:
    """A bridge over a model, which is not plain any more then."""
    return build_bridge_from_module(model, "BD3LM", hf_config=model.config)


def bos(rows: int = 1) -> Tensor:
    """The one token that each row begins with; any will do."""
    return torch.full((rows, 1), 5)


def ours(bridge: Any, tokens: int, rows: int = 1, **keywords: Any) -> Any:
    """A cached run, of ``tokens`` positions in all, one by one if nothing else is asked for."""
    keywords = {"lookahead": 1, "progress": False} | keywords
    return denoise(bridge, bos(rows), max_new_tokens=tokens - 1, **keywords)


@contextmanager
def plain_kernel() -> Iterator[None]:
    """Every linear as PyTorch computes it, whatever is faster for few rows."""
    with patch.object(linear, "rows_of", lambda *_: 0):
        yield


def plainly(plain: BD3LM, bridge: Any) -> Tensor:
    """The run of ``TOKENS`` over the plain modules; returns its text."""
    canvas = read_canvas(bridge, bos(), TOKENS - 1, None, True)
    loop = Request(kv_cache=False, lookahead=1).loop(bridge, canvas)
    network = PlainNetwork(bridge, canvas, loop.network.hooks, None, None)
    network.modules, loop.network = plain, network
    final = canvas.tokens
    for step in loop.steps():
        final = step.after
    return final


def against_plain(plain: BD3LM, bridge: Any) -> list[Line]:
    """All loops in full, in turns, each with another lever; they write the same text.

    With random weights nearly every draft is right, so the lines of states that share a pass are
    those of a model that is sure of itself; see ``passes_a_token`` for a trained one.
    """
    ways: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "plain loop, prefix recomputed": (nullcontext, {}),
        "stored keys": (plain_kernel, {}),
        "+ kernel for few rows": (nullcontext, {}),
        "+ packed weights": (partial(packed, bridge), {}),
        "+ states that share a pass, 4": (nullcontext, {"lookahead": 4}),
        "+ states that share a pass, auto": (nullcontext, {"lookahead": "auto"}),
    }
    first = next(iter(ways))
    texts, passes, best = {}, {}, dict.fromkeys(ways, float("inf"))
    for _ in range(2):
        for name, (scope, options) in ways.items():
            with scope():
                start = time.perf_counter()
                run = plainly(plain, bridge) if name == first else ours(bridge, TOKENS, **options)
                best[name] = min(best[name], time.perf_counter() - start)
            texts[name], passes[name] = (run, 0) if name == first else (run.final, run.passes)
    with packed(bridge) as packing:
        told = f"  (packed weights: {packing.method or 'none is faster here, nothing is packed'})"
    lines = [Line(f"{TOKENS} tokens: {first}", f"{best[first]:.1f} s"), Line(told, "")]
    for name in list(ways)[1:]:
        same = "" if torch.equal(texts[name], texts[first]) else ", ANOTHER TEXT"
        ratio = best[first] / best[name]
        lines.append(Line(f"  {name}, {passes[name]} passes{same}", f"{ratio:.2f}"))
    ratio = best[first] / best["+ kernel for few rows"]
    return [*lines, at_least(f"plain loop / cached, one by one, {TOKENS} tokens", ratio, 4)]


def passes_a_token() -> list[Line]:
    """Tokens that a pass gives on the embedded model, with as many states as a block has."""
    bridge = boot_checkpoint(TINY)
    lines = []
    for size in (4, 8, 16, 32):
        runs = [
            ours(bridge, TOKENS, lookahead=size, block_size=size, seed=seed) for seed in range(4)
        ]
        tokens = sum(len(run.steps) for run in runs) / sum(run.passes for run in runs)
        name = f"embedded model, block {size}: tokens a pass; passes a token"
        lines.append(Line(name, f"{tokens:.2f}; {1 / tokens:.2f}"))
    return lines


def against_plain_at_length(plain: BD3LM, bridge: Any) -> tuple[Line, Line]:
    """The cached loop in full; the plain one from its forward at a few lengths."""
    lengths = [BLOCK + (CONTEXT - BLOCK) * i // (LENGTHS - 1) for i in range(LENGTHS)]
    due = [length - length % BLOCK for length in lengths]
    ids = torch.randint(plain.config.vocab_size - 1, (1, CONTEXT))
    took: dict[int, float] = {}
    ends, cached, start = [], 0.0, time.perf_counter()
    for step in denoise_steps(bridge, bos(), max_new_tokens=CONTEXT - 1, lookahead=1):
        cached += time.perf_counter() - start
        end = step.window[1]
        ends.append(end)
        if end in due and end not in took:
            took[end] = min(seconds(partial(plain, ids[:, :end])) for _ in range(2))
        start = time.perf_counter()
    known = sorted(took)
    recomputed = float(np.interp(ends, known, [took[length] for length in known]).sum())
    return (
        at_least(f"plain loop / cached, {CONTEXT} tokens", recomputed / cached, 15),
        Line(
            f"  cached, {len(ends)} steps in full; plain, its forward at {LENGTHS} lengths, summed",
            f"{cached:.0f} s; {recomputed:.0f} s",
        ),
    )


def seconds(fn: Callable[[], object]) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    fn()
    return time.perf_counter() - start


def bests(fns: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each function over rounds of turns, the first of which does not count.

    Whatever else the machine does only adds to a run, and most where two threads wait for each
    other: the least is the nearest to what the run itself takes.
    """
    taken = [{name: seconds(fn) for name, fn in fns.items()} for _ in range(rounds + 1)]
    return {name: min(turn[name] for turn in taken[1:]) for name in fns}


def late_against_early(bridge: Any) -> Line:
    """Two runs a block at a time, in turns: one at the context's end, one near its beginning."""
    ids = torch.randint(bridge.cfg.d_vocab - 1, (1, CONTEXT))
    new = 8 * BLOCK
    taken: dict[int, list[float]] = {EARLY: [], CONTEXT: []}
    for _ in range(2):
        runs = {
            end: blocks(denoise_steps(bridge, ids[:, : end - new], max_new_tokens=new, lookahead=1))
            for end in taken
        }
        for turn in range(new // BLOCK):
            for end in taken:
                start = time.perf_counter()
                next(runs[end])
                # A run's first block pays for storing its prompt.
                if turn:
                    taken[end].append(time.perf_counter() - start)
    late, early = np.median(taken[CONTEXT]), np.median(taken[EARLY])
    name = f"a block near {CONTEXT - new // 2} / one near {EARLY - new // 2}"
    return at_most(name, float(late / early), 1.5)


def blocks(steps: Iterator[Step]) -> Iterator[None]:
    """Run a block at a time."""
    for i, _ in enumerate(steps, 1):
        if i % BLOCK == 0:
            yield


def variants(bridge: Any) -> list[Line]:
    """Another dtype, more rows, and somebody who looks, each against the same float32 run."""
    model: Any = released_model()
    half = bridge_over(model.to(torch.bfloat16))
    layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    record = Record([f"blocks.{i}.hook_resid_post" for i in range(layers)])
    times = bests(
        {
            "float32": lambda: ours(bridge, FEW),
            "bfloat16": lambda: ours(half, FEW),
            "eight rows": lambda: ours(bridge, FEW, rows=8),
        },
        rounds=5,
    )
    watched = bests(
        {
            "not recorded": lambda: ours(bridge, TOKENS),
            "recorded": lambda: ours(bridge, TOKENS, record=record),
        },
        rounds=3,
    )
    kept = ours(bridge, TOKENS, record=record).activations.values()
    held = sum(x.numel() * x.element_size() for x in kept)
    step_bytes = layers * d_model * 4 * (TOKENS - 1)
    return [
        at_least("bfloat16 / float32, tokens/s", times["float32"] / times["bfloat16"], 1.5),
        at_least("8 rows / 1, tokens/s", 8 * times["float32"] / times["eight rows"], 3),
        at_most("every layer recorded / not", watched["recorded"] / watched["not recorded"], 1.15),
        Line(
            "  bytes kept / (steps x active positions x layers x width x 4)",
            f"{held / (step_bytes * BLOCK):g}",
            "== 1",
            held == step_bytes * BLOCK,
        ),
        Line(
            "  bytes kept / (steps x length x layers x width x 4)",
            f"{held / (step_bytes * TOKENS):.4f}",
        ),
        *against_memory(bridge, times["float32"] / (FEW - 1)),
    ]


def against_memory(bridge: Any, step: float) -> list[Line]:
    """A step against the time that reading its weights once would take."""
    model = bridge.original_model
    # The embedding is looked up, not read.
    read = sum(p.numel() * p.element_size() for p in model.parameters())
    read -= bridge.embed.weight.numel() * bridge.embed.weight.element_size()
    # Larger than any cache; weights of half a gigabyte may partly stay in one.
    big = torch.ones(2**29 // 2)
    bandwidth = big.numel() * big.element_size() / min(seconds(big.sum) for _ in range(10))
    return [
        Line(
            f"ms a step; to read its {read / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s",
            f"{step * 1e3:.1f}; {read / bandwidth * 1e3:.1f}",
        ),
        Line("  share of a step that is reading", f"{read / bandwidth / step:.0%}"),
    ]


def chosen() -> list[Line]:
    """The kernel for each number of rows, and how fast it reads weights."""
    return [
        Line(
            f"  {str(choice.case.dtype).removeprefix('torch.')}, {choice.case.rows} rows: "
            f"F.linear; {choice.name}, GB/s",
            f"{choice.speed('F.linear'):.1f}; {choice.speed(choice.name):.1f}",
        )
        for choice in few_rows.choices()
    ]


@torch.no_grad()
def main() -> None:
    """Print the table."""
    torch.set_num_threads(2)
    keep_freed_memory()
    plain, bridge = released_model(), bridge_over(released_model())
    lines = [
        *against_plain(plain, bridge),
        *against_plain_at_length(plain, bridge),
        late_against_early(bridge),
        *variants(bridge),
        *passes_a_token(),
        *chosen(),
    ]
    instructions = torch.backends.cpu.get_cpu_capability()
    table = Table(
        title=f"denoising, block {BLOCK}, {torch.get_num_threads()} threads, {instructions}"
    )
    for column in ("what", "measured", "required", ""):
        table.add_column(column, justify="left" if column == "what" else "right")
    for line in lines:
        verdict = "" if line.met is None else ("met" if line.met else "[bold]MISSED[/bold]")
        table.add_row(line.name, line.measured, line.required, verdict)
    Console().print(table)


if __name__ == "__main__":
    main()
