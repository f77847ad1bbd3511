"""``Harvest.load``: activations on disk."""

from pathlib import Path

import transformer_lens_bd3lm as bd3lm
from tests.fuzz.engine import Reader
from tests.fuzz.run import bridge

FILES = ("settings.json", "shards/00000.json", "dataset_dict.json", "train/state.json",
         "train/dataset_info.json", "train/data-00000.arrow")  # fmt: skip


def make(folder: Path) -> None:
    """Write a harvest of one text."""
    bd3lm.harvest(bridge(), ["w1 w2 w3 w4", "w3 w4"], ["blocks.0.hook_resid_post"],
                  distribution="t-uniform", out=folder, progress=False)  # fmt: skip


def read(folder: Path) -> None:
    """Load it, compare its checksums, and read its first rows."""
    harvest = bd3lm.Harvest.load(folder)
    repr(harvest), harvest.to_dict(), harvest.table()
    harvest.check()
    for part in harvest.parts:
        harvest.dataset(part.name)[:2]


READER = Reader(FILES, make, read)
