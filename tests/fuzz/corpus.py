"""``read_texts``: plain text and ``.jsonl``."""

from pathlib import Path

from tests.fuzz.engine import Reader
from transformer_lens_bd3lm.likelihoods.corpus import read_texts


def make(folder: Path) -> None:
    """Write a file of each kind."""
    (folder / "x.txt").write_text("Scene 1\nTo be\nScene 2\nor not", encoding="utf-8")
    (folder / "x.jsonl").write_text('{"text": "To be"}\n\n{"text": "or not", "n": 1}\n')


def read(folder: Path) -> None:
    """Read both."""
    texts = list(read_texts([folder / "x.txt", folder / "x.jsonl"], split="^Scene "))
    assert all(isinstance(each.text, str) for each in texts)


READER = Reader(("x.txt", "x.jsonl"), make, read)
