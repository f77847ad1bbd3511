"""A training that is resumed: what it was begun with, and its state."""

from pathlib import Path

from tests.fuzz.engine import Reader
from transformer_lens_bd3lm.training.data import train_tokenizer
from transformer_lens_bd3lm.training.folder import begin_folder, begun_values, read_begun
from transformer_lens_bd3lm.training.recipe import Recipe
from transformer_lens_bd3lm.training.training_run import TrainingRun

RECIPE = Recipe(vocab_size=262, context=8, block_sizes=(2,), hidden_dim=4, n_blocks=1, n_heads=1,
                cond_dim=2, steps=2, schedule=2, batch=2, autocast=False)  # fmt: skip
MADE_OF = {"steps": 2, "seed": 0, "training text": "x"}


def make(folder: Path) -> None:
    """Write a training of one step."""
    begin_folder(folder, MADE_OF, train_tokenizer("To be, or not to be.\n" * 40, 262))
    run = TrainingRun(RECIPE)
    run.advance(lambda rows, generator: _rows(rows))
    run.save(folder / "state.safetensors")


def _rows(rows: int):
    import torch

    return torch.arange(rows * 8).view(rows, 8) % 250 + 1


def read(folder: Path) -> None:
    """Go on with it."""
    begun_values(folder)
    read_begun(folder, MADE_OF)
    run = TrainingRun(RECIPE)
    run.load(folder / "state.safetensors")
    run.advance(lambda rows, generator: _rows(rows))


READER = Reader(("begun.json", "state.safetensors", "tokenizer.json"), make, read)
