"""What a harvest costs beside the bare forwards of the same windows, at the released size.

Run by hand::

    python -m tests.benchmarks.harvest [WINDOWS [CONTEXT]]

In one process and in turns, in seconds of the clock and of the processor (which other work on the
machine does not lengthen): the full dual forward of the windows under the same masks, the forward
that ends at the last named hook point, and the harvest of that hook point to a disk.
"""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import transformer_lens_bd3lm as bd3lm
from tests.benchmarks.released_size import keep_freed_memory, released_model
from transformer_lens_bd3lm.analysis.harvest.passes import activations_of

ROUNDS, PASS = 2, 2048
NAMES = {"layer 6": ["blocks.6.hook_resid_post"], "layer 11": ["blocks.11.hook_resid_post"]}


class Tokenizer:
    """Stands in for a tokenizer where the corpus is ids: it says which id is BOS."""

    bos_token_id = 0


@torch.no_grad()
def main() -> None:
    """Print the table."""
    keep_freed_memory()
    sizes = [int(word) for word in sys.argv[1:]]
    windows, context = [*sizes, *(8, 1024)[len(sizes) :]]
    model = released_model()
    bridge: Any = build_bridge_from_module(model, "BD3LM", hf_config=model.config)
    bridge.tokenizer = Tokenizer()
    torch.manual_seed(0)
    corpus = torch.randint(1, model.config.vocab_size - 1, (windows, context))
    corpus[:, 0] = 0
    masked = torch.rand(corpus.shape) < torch.rand(windows, context // 4).repeat_interleave(4, 1)
    x_t = torch.where(masked, bridge.cfg.mask_token_id, corpus)
    at_once = PASS // context

    def forwards(until: list[str] | None = None) -> None:
        for start in range(0, windows, at_once):
            part = slice(start, start + at_once)
            if until is None:
                bridge(x_t[part], clean=corpus[part])
            else:
                activations_of(bridge, until, x_t[part], clean=corpus[part])

    def harvest(names: list[str], folder: str, **options: Any) -> bd3lm.Harvest:
        return bd3lm.harvest(
            bridge, corpus, names, distribution="t-uniform", out=Path(folder) / "out", valid=0,
            rows=PASS, progress=False, **options,
        )  # fmt: skip

    bridge(x_t[:1, :32], clean=corpus[:1, :32])  # what is made once
    table = Table(title=f"t-uniform, {windows} x {context}, {torch.get_num_threads()} threads")
    for column in ("hook point", "work", "seconds", "CPU", "against full", "against stopped"):
        table.add_column(column, justify="left" if column in ("hook point", "work") else "right")
    for label, names in NAMES.items():
        taken: dict[str, list[tuple[float, float]]] = {}
        for _ in range(ROUNDS):
            folder = tempfile.mkdtemp(prefix="harvest-")
            works = {
                "full forward": forwards,
                "stopped forward": lambda names=names: forwards(names),
                "harvest": lambda names=names, folder=folder: harvest(names, folder),
            }
            for work, fn in works.items():
                start = time.perf_counter(), time.process_time()
                result = fn()
                spent = time.perf_counter() - start[0], time.process_time() - start[1]
                taken.setdefault(work, []).append(spent)
            shutil.rmtree(folder)
        medians = {
            work: [statistics.median(times) for times in zip(*both, strict=True)]
            for work, both in taken.items()
        }
        for work, both in medians.items():
            ratios = [
                " / ".join(f"{x / y:.3f}" for x, y in zip(both, medians[other], strict=True))
                for other in ("full forward", "stopped forward")
            ]
            table.add_row(label, work, *(f"{seconds:.2f}" for seconds in both), *ratios)
        table.add_section()
    Console().print(table)
    Console().print(repr(result))


if __name__ == "__main__":
    main()
