"""Repositories of a test's own: a golden's checkpoint, with code beside it or without, changed."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers import FIXTURES

REMOTE = FIXTURES / "remote"


def copy_of(g: Any, tmp_path: Path, code: bool = False, name: str = "") -> Path:
    """A checkpoint's folder of the test's own, with the repository's code or without.

    Named after the test: the library imports the code of two folders of one name once.
    """
    folder = tmp_path / f"{tmp_path.name}{name}"
    shutil.copytree(g.path, folder)
    (folder / "golden.safetensors").unlink()
    if code:
        for file in REMOTE.glob("*.py"):
            shutil.copy(file, folder)
    return folder


def edit_config(folder: Path, drop: Sequence[str] = (), **changes: Any) -> None:
    """Change keys of config.json, and drop some."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: x for key, x in config.items() if key not in drop}))


def edit_weights(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of model.safetensors in place."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
