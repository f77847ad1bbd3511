"""A likelihood that is resumed: its settings and its finished jobs."""

from pathlib import Path

from tests.fuzz.engine import Reader
from tests.fuzz.run import bridge
from transformer_lens_bd3lm.likelihoods.corpus_likelihood import likelihood

TEXTS = ["w1 w2 w3", "w4 w5"]


def read(folder: Path) -> None:
    """Go on with it, and use the result."""
    result = likelihood(bridge(), TEXTS, 2, out=folder, progress=False)
    repr(result), result.to_dict(), result.table()


READER = Reader(
    ("settings.json", "jobs-0.jsonl"), read, read, may_write=("settings.json", "jobs-0.jsonl")
)
