"""A training checkpoint of PyTorch Lightning: a pickle, which is read as data."""

from pathlib import Path

import torch

from tests.fuzz.engine import Reader
from tests.helpers import checkpoints
from transformer_lens_bd3lm.checkpoint.lightning.reader import read_lightning
from transformer_lens_bd3lm.checkpoint.lightning.tokenizer import pickled_tokenizer


def make(folder: Path) -> None:
    """Write the checkpoint of a tiny model."""
    checkpoints.write(folder / "x.ckpt", n_blocks=1, hidden_dim=4, cond_dim=2, vocab_size=6,
                      edit=lambda saved: saved.update(optimizer_states=[]))  # fmt: skip


def read(folder: Path) -> None:
    """Read all that is read of it."""
    for weights in ("ema", "raw"):
        with read_lightning(folder / "x.ckpt", weights) as checkpoint:
            state = checkpoint.state()
            pickled_tokenizer(checkpoint.tokenizer)
        assert all(isinstance(x, torch.Tensor) for x in state.values())


READER = Reader(("x.ckpt",), make, read)
