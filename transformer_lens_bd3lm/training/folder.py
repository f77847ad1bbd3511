"""Folder of a training run: what it was begun with, and files that are whole or do not exist.

``begun.json`` holds the recipe, and the SHA-256 of the texts and of the tokenizer's files. It is
written last: a folder that has it has the other files whole, and one without it is begun anew. A
run resumes only with what it was begun with, and one process at a time trains in a folder.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.plain_values import read_json

BEGUN = "begun.json"
STATE = "state.safetensors"
LOCK, DRAFT = ".lock", ".draft"
RESULTS = (STATE, "config.json", "model.safetensors")


@contextmanager
def held_alone(folder: Path, work: str = "training") -> Iterator[None]:
    """Hold a folder, which is created, for one piece of work, until its end or its process's.

    Args:
        folder: the folder.
        work: what is done in it, for the message.

    Raises:
        InputError: if another process works in it, or it cannot be written.
    """
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(
            f"another {work} is running in {folder}: wait for its end, or give another folder"
        ) from error
    except OSError as error:
        raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}") from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no file that is open
            (folder / LOCK).unlink()
        lock.release()


@contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Yield a draft folder, whose files are then moved into the folder, ``BEGUN`` last."""
    draft = folder / DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    yield draft
    for file in sorted(draft.iterdir(), key=lambda file: (file.name == BEGUN, file.name)):
        os.replace(file, folder / file.name)
    draft.rmdir()


def begin_folder(folder: Path, made_of: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the tokenizer of a run, and what it is begun with.

    Args:
        folder: folder of the run, which is created.
        made_of: plain values by name, which must be the same when the run resumes.
        tokenizer: tokenizer of the run.
    """
    with whole_files(folder) as draft:
        tokenizer.save_pretrained(draft)
        files = {file.name: sha256_of(file.read_bytes()) for file in draft.iterdir()}
        begun = json.dumps({"made of": made_of, "files": files}, indent=1)
        (draft / BEGUN).write_text(begun, encoding="utf-8")


def read_begun(folder: Path, made_of: dict[str, Any]) -> PreTrainedTokenizerFast | None:
    """Read the tokenizer of a run that was begun with the same values; None if none was begun.

    Args:
        folder: folder of the run.
        made_of: plain values by name, with which the run is to resume.

    Raises:
        InputError: if the folder was begun with other values, or its files were changed.
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
        begun = read_json(path.read_text(encoding="utf-8"))
        before, files = dict(begun["made of"]), dict(begun["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged, not as it was written: use another folder") from error
    now = json.loads(json.dumps(made_of))
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        others = " and ".join(_another(name, before.get(name), now[name]) for name in changed)
        raise InputError(f"{folder} was begun with {others}: give another folder, or remove it")
    for name, wanted in files.items():
        file = folder / Path(name).name
        if not file.is_file() or sha256_of(file.read_bytes()) != wanted:
            raise InputError(
                f"{file} is not the one that the training was begun with: give another folder, or "
                "put it back"
            )
    return PreTrainedTokenizerFast.from_pretrained(folder)


def begun_values(folder: Path) -> dict[str, Any]:
    """Return the values that a run was begun with; none if no run was, or they cannot be read."""
    try:
        return dict(read_json((folder / BEGUN).read_text(encoding="utf-8"))["made of"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _another(name: str, before: Any, now: Any) -> str:
    """Describe a value that has changed: with both values, if they are short."""
    if isinstance(now, dict | list) or name.endswith("text"):
        return f"another {name}"
    return f"another {name} ({before}, not {now})"


def sha256_of(content: bytes) -> str:
    """Return the SHA-256 of bytes, in hexadecimal digits."""
    return sha256(content).hexdigest()


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write tensors to a file; what could be written of it is removed after an error.

    Raises:
        OSError: if it cannot be written.
    """
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written: {error}") from error
