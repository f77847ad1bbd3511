"""The folder of a checkpoint: its config."""

from pathlib import Path
from typing import Any

from tests.fuzz.engine import Reader
from tests.helpers import small
from transformer_lens_bd3lm.bridge.boot import read_bridge

TINY: dict[str, Any] = {"n_blocks": 1, "hidden_dim": 4, "cond_dim": 2}


def make(folder: Path) -> None:
    """Write the checkpoint of a tiny model."""
    small.save(folder, **TINY)


def read(folder: Path) -> None:
    """Boot it, and read a text."""
    bridge = read_bridge(folder)
    assert bridge(bridge.to_tokens("w1 w2 w3")).shape[-1] == bridge.cfg.d_vocab
    repr(bridge.cfg)


READER = Reader(("config.json",), make, read)
