"""Peak memory of a harvest beside its budget, at the released size.

Run by hand::

    python -m tests.benchmarks.harvest_memory

A process with the weights (169.6 M parameters) harvests six hook points of every layer from two
windows of 1024 tokens, and prints by how much its peak grew beyond what it held before.
"""

import resource
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import transformer_lens_bd3lm as bd3lm
from tests.benchmarks.harvest import Tokenizer
from tests.benchmarks.released_size import released_model

BUDGET = 2**30
POINTS = (
    "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
    "mlp.hook_pre",
)  # fmt: skip


def peak() -> int:
    """Return the most bytes that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    """Print the budget and the growth."""
    model = released_model()
    bridge: Any = build_bridge_from_module(model, "BD3LM", hf_config=model.config)
    bridge.tokenizer = Tokenizer()
    torch.manual_seed(0)
    corpus = torch.randint(1, model.config.vocab_size - 1, (2, 1024))
    corpus[:, 0] = 0
    names = [f"blocks.{layer}.{point}" for layer in range(12) for point in POINTS]

    def harvest(ids: torch.Tensor, points: list[str]) -> bd3lm.Harvest:
        return bd3lm.harvest(
            bridge, ids, points, distribution="t-uniform", out=Path(tempfile.mkdtemp()) / "out",
            valid=0, progress=False, max_bytes=BUDGET,
        )  # fmt: skip

    harvest(corpus[:1, :64], names[:1])  # what is loaded once
    before = peak()
    result = harvest(corpus, names)
    grown = (peak() - before) / 2**20
    Console().print(f"grew by {grown:,.0f} MiB under max_bytes of {BUDGET / 2**20:,.0f} MiB")
    Console().print(repr(result))


if __name__ == "__main__":
    main()
