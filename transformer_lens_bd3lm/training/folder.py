"""The folder of a training run: what it was begun with, and files that are whole or not there.

``begun.json`` holds the recipe, and SHA-256 of the texts and of the tokenizer's files. It is
written after these, so a folder that has it has them whole, and one that was stopped before is
begun anew. A run goes on only from what it was begun with.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from transformer_lens_bd3lm.errors import InputError

BEGUN = "begun.json"
RESULTS = ("state.safetensors", "config.json", "model.safetensors")


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Give a draft folder to write files into; each then takes its place whole, ``BEGUN`` last."""
    draft = folder / ".draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    for file in sorted(draft.iterdir(), key=lambda file: (file.name == BEGUN, file.name)):
        os.replace(file, folder / file.name)
    draft.rmdir()


def begin(folder: Path, made_of: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a run's tokenizer, and what it is begun with.

    Args:
        folder: the run's, which is made.
        made_of: what must be the same when the run goes on, by name: plain values.
        tokenizer: made of it.
    """
    with whole_files(folder) as draft:
        tokenizer.save_pretrained(draft)
        files = {file.name: fingerprint(file.read_bytes()) for file in draft.iterdir()}
        begun = json.dumps({"made of": made_of, "files": files}, indent=1)
        (draft / BEGUN).write_text(begun, encoding="utf-8")


def read_begun(folder: Path, made_of: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """Read the tokenizer of a run that was begun with the same; None where none was begun.

    Raises:
        InputError: if the folder was begun with something else, or holds something else.
    """
    path = folder / BEGUN
    if not path.exists():
        others = [name for name in RESULTS if (folder / name).exists()]
        if others and any(name.endswith("text") for name in made_of):
            raise InputError(
                f"{folder} has {others[0]} and no {BEGUN}, so what it was made of cannot be "
                "compared: give another folder"
            )
        return None
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
        before, files = dict(begun["made of"]), dict(begun["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not as it was written: give another folder") from error
    other = [name for name in made_of if before.get(name) != json.loads(json.dumps(made_of[name]))]
    if other:
        raise InputError(
            f"{folder} was begun with another {' and another '.join(other)}: give another folder, "
            "or remove it"
        )
    for name, wanted in files.items():
        file = folder / Path(name).name
        if not file.is_file() or fingerprint(file.read_bytes()) != wanted:
            raise InputError(
                f"{file} is not the one that the training was begun with: give another folder, or "
                "put it back"
            )
    return PreTrainedTokenizerFast.from_pretrained(folder)


def fingerprint(content: bytes) -> str:
    """SHA-256 in hexadecimal digits."""
    return sha256(content).hexdigest()
