"""Compare TransformerLens's bridge with what the public BD3LM code computed, at every hook point.

Run in a process without this package, over a source tree that the adapter was written into::

    python compare_goldens.py GOLDEN...

For each folder it boots the checkpoint and prints the largest difference of every view, relative to
the largest magnitude of the tensor, and the name of that tensor. It exits with 1 over ``WITHIN``.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from goldens import VIEWS, WITHIN, found, wanted
from safetensors.torch import load_file
from transformer_lens.model_bridge import TransformerBridge


class Golden:
    """Arrays of a golden, by name."""

    def __init__(self, path: Path):
        self.arrays = load_file(path / "golden.safetensors")

    def __getitem__(self, key: str) -> torch.Tensor:
        """One array."""
        return self.arrays[key]

    def keys(self, prefix: str = "") -> list[str]:
        """The names of the arrays that start with ``prefix``."""
        return [key for key in self.arrays if key.startswith(prefix)]


def main() -> int:
    """Compare every view of the goldens that the command line names."""
    assert importlib.util.find_spec("transformer_lens_bd3lm") is None
    largest = 0.0
    for path in map(Path, sys.argv[1:]):
        golden = Golden(path)
        bridge = TransformerBridge.boot_transformers(str(path), device="cpu")
        for view in [view for name, view in VIEWS if name == path.name]:
            of = found(bridge, golden, view, "cpu")
            differences = {
                name: float((of(name) - array).abs().max() / array.abs().max())
                for name, array in wanted(golden, view).items()
            }
            name, worst = max(differences.items(), key=lambda item: item[1])
            print(path.name, view, len(differences), f"{worst:.1e}", name)  # noqa: T201
            largest = max(largest, worst)
        with torch.no_grad():
            x_t = golden["in/xt"]
            before = bridge(x_t).log_softmax(-1)
            if path.name != "time_conditioned":
                bridge.enable_compatibility_mode()
                folded = float((bridge(x_t).log_softmax(-1) - before).abs().max())
                print(path.name, "folded", f"{folded:.1e}")  # noqa: T201
    return int(not largest < WITHIN)


if __name__ == "__main__":
    sys.exit(main())
