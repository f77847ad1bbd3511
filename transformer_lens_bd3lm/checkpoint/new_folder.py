"""Folders that are written whole or not at all."""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from transformer_lens_bd3lm.errors import InputError


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a draft folder, which becomes ``path`` at the end, or is removed after an error.

    Raises:
        InputError: if the path exists.
        OSError: if something could not be written.
    """
    if path.exists():
        raise InputError(f"{path} exists: give a folder that does not, nothing is overwritten")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    draft.mkdir()
    try:
        yield draft
        draft.rename(path)
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
