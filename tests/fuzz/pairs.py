"""Files of the command line: pairs of texts, clean, corrupted and target in each line."""

import json
from pathlib import Path

from typer import BadParameter

from bd3lm_cli.trace import _read_pairs
from tests.fuzz.engine import Reader
from transformer_lens_bd3lm.errors import InputError


def make(folder: Path) -> None:
    """Write two pairs."""
    lines = [{"clean": "a b", "corrupted": "a c", "target": "b"},
             {"clean": "x y", "corrupted": "x z", "target": "y", "roles": None}]  # fmt: skip
    (folder / "x.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\n")


def read(folder: Path) -> None:
    """Read them; what typer refuses is refused too."""
    try:
        _read_pairs(folder / "x.jsonl")
    except BadParameter as error:
        raise InputError(error.message) from error


READER = Reader(("x.jsonl",), make, read)
