"""The folder of a checkpoint: its tokenizer's files."""

from pathlib import Path

from tests.fuzz.config import TINY
from tests.fuzz.engine import Reader
from tests.helpers import small
from transformer_lens_bd3lm.checkpoint.tokenizer import BD3LMTokenizer, teach_mask


def make(folder: Path) -> None:
    """Write the checkpoint of a tiny model."""
    small.save(folder, **TINY)


def read(folder: Path) -> None:
    """Load the tokenizer as booting does, and read a text to and fro."""
    tokenizer = BD3LMTokenizer.from_pretrained(folder)
    teach_mask(tokenizer, 12)
    ids = tokenizer("w1 w2 é😀 [MASK]  w3\n" * 20)["input_ids"]
    assert len(ids) < 100_000 and isinstance(tokenizer.decode(ids), str)


READER = Reader(("tokenizer.json", "tokenizer_config.json"), make, read)
