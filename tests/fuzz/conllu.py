"""``read_conllu``: parses."""

from pathlib import Path

from tests.fuzz.engine import Reader
from tests.helpers import FIXTURES
from transformer_lens_bd3lm.analysis.by_depth.parses import read_conllu


def make(folder: Path) -> None:
    """Write two sentences of the fixture."""
    whole = (FIXTURES / "parses.conllu").read_text(encoding="utf-8").split("\n\n")
    (folder / "x.conllu").write_text("\n\n".join(whole[:2]) + "\n\n", encoding="utf-8")


def read(folder: Path) -> None:
    """Read them; words lie in the text, from left to right."""
    for sentence in read_conllu(folder / "x.conllu"):
        at = 0
        for word in sentence.words:
            assert at <= word.start <= word.end <= len(sentence.text) and word.depth >= 0
            at = word.end


READER = Reader(("x.conllu",), make, read)
