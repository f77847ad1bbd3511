"""The folder of a saved run: ``run.json``, for people too, and ``run.safetensors``.

The manifest names the model's weights by a hash, so that a run is only ever read back over the
weights that wrote it, and holds the text, versions, dtype, seed and a hash of the tensors. Its own
digest covers all of that: a file that was damaged or edited, a seed for example, is refused. This
guards against slips, not against somebody who writes a new digest; the content of each file is
checked too.

Nothing here knows what a run is; see ``run_files.py``.
"""

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.new_folder import new_folder
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.plain_values import read_json

FORMAT = 2
MANIFEST, TENSORS = "run.json", "run.safetensors"
MAX_MANIFEST = 64 * 2**20


class Part(BaseModel):
    """Part of the manifest: types exactly as written, no unknown key."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class NoiseEntry(Part):
    """A run's noise."""

    seed: int
    rows: list[int] | None


class HookEntry(Part):
    """A step hook, without its function."""

    name: str
    scope: str
    at: str


class RecordEntry(Part):
    """Which activations a run kept."""

    names: list[str]
    positions: list[int]


class Manifest(Part):
    """JSON manifest of a run, ``run.json``."""

    format: int
    model: str
    weights_sha256: str
    dtype: str
    device: str
    versions: dict[str, str]
    text: list[str]
    block_size: int = Field(ge=1)
    context: int = Field(ge=1)
    mask_id: int = Field(ge=0)
    kv_cache: bool
    slid: bool
    passes: int | None = Field(default=None, ge=1)
    lookahead: Literal["auto"] | int = 1
    sampler: dict[str, Any] | str
    noise: NoiseEntry
    stop: list[dict[str, Any] | str]
    hooks: list[HookEntry]
    autocast: str | None = None
    hooks_on_bridge: list[str] | None
    forced: bool
    steps: int = Field(ge=1)
    record: RecordEntry | None
    start: list[int] | None
    tensors_bytes: int
    tensors_sha256: str
    sha256: str


def digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest's content, its own digest left out."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, default=float).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file."""
    sha256 = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            sha256.update(part)
    return sha256.hexdigest()


def write_folder(path: Path, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write a manifest and its tensors into a new folder, whole or not at all.

    Raises:
        InputError: if the folder exists.
        OSError: if it cannot be written (a full disk, say); nothing is left behind then.
    """
    with new_folder(path) as draft:
        save_file(tensors, draft / TENSORS)
        manifest = {"format": FORMAT} | manifest
        manifest |= {
            "tensors_bytes": (draft / TENSORS).stat().st_size,
            "tensors_sha256": file_hash(draft / TENSORS),
        }
        manifest["sha256"] = digest(manifest)
        with (draft / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, ensure_ascii=False, default=float)
            file.flush()
            os.fsync(file.fileno())


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a folder, and check that it is as it was written.

    Raises:
        InputError: for no manifest of this format, or one that was damaged or edited.
    """
    try:
        content = read_json(_read_regular(path / MANIFEST, MAX_MANIFEST))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no saved run: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is no saved run: {MANIFEST} holds a {type(content).__name__}")
    if content.get("format") != FORMAT:
        raise InputError(f"{path} has format {content.get('format')}: this version reads {FORMAT}")
    if content.get("sha256") != digest(content):
        raise InputError(
            f"{path / MANIFEST} is damaged, or was edited: it is not what was written. Put it back "
            "as it was, or make the run anew with other settings"
        )
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{path / MANIFEST} is no saved run: {key}: {first['msg']}") from error


def read_tensors(path: Path, manifest: Manifest, vocab_size: int) -> dict[str, Tensor]:
    """Read the tensors beside a manifest, which holds the hash of their bytes.

    Raises:
        InputError: for other bytes, or tensors that are not those of a run.
    """
    file = path / TENSORS
    try:
        same = _require_regular(file) == manifest.tensors_bytes
        same = same and file_hash(file) == manifest.tensors_sha256
        x = load_file(file) if same else {}
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is no saved run: {error}") from error
    if not same:
        raise InputError(f"{file} is damaged: its bytes are not those that were written")
    wrong = _misfit(x, manifest, vocab_size)
    if wrong is not None:
        raise InputError(f"{file} is no saved run: {wrong} does not fit the rest")
    return x


def _misfit(x: dict[str, Tensor], manifest: Manifest, vocab_size: int) -> str | None:
    """Return the name of the first tensor whose type, shape or values fit no run, or None."""
    whole, exact = torch.long, torch.float64
    final = x.get("final", torch.zeros(0))
    if final.ndim != 2 or final.numel() == 0:
        return "final"
    batch, total = final.shape
    rows, grid, steps = (batch,), (batch, total), (manifest.steps,)
    wanted = {
        "final": (whole, grid), "canvas/tokens": (whole, grid), "commit_step": (whole, grid),
        "log_p": (exact, grid), "lead": (exact, grid),
        "ends": (whole, rows), "canvas/lengths": (whole, rows),
        "steps/t": (exact, (*steps, batch)), "steps/window": (whole, (*steps, 2)),
        "steps/index": (whole, steps), "steps/block": (whole, steps), "steps/step": (whole, steps),
        "steps/recorded": (whole, (x.get("steps/recorded", final).numel(),)),
    }  # fmt: skip
    optional = {"canvas/writes": (torch.bool, grid)}
    optional |= dict.fromkeys(("started_at", "ceiling"), (exact, rows))
    if manifest.forced:
        wanted |= dict.fromkeys(("force/tokens", "force/order"), (whole, grid))
    if manifest.start is not None:
        wanted |= {name: optional[name] for name in ("started_at", "ceiling")}
    for name, (dtype, shape) in (wanted | {k: v for k, v in optional.items() if k in x}).items():
        if name not in x or x[name].dtype != dtype or x[name].shape != shape:
            return name
    highest = {
        "final": vocab_size - 1, "canvas/tokens": vocab_size - 1, "canvas/lengths": total,
        "ends": total, "steps/window": total,
    }  # fmt: skip
    for name, high in highest.items():
        if int(x[name].min()) < 0 or int(x[name].max()) > high:
            return name
    if not set(x["steps/recorded"].tolist()) <= set(x["steps/index"].tolist()):
        return "steps/recorded"
    return "mask_id" if manifest.mask_id >= vocab_size else None


def _require_regular(path: Path) -> int:
    """Return the size in bytes of a regular file, or of the one that a link leads to.

    Raises:
        InputError: for a device, a pipe or a folder, which may have no end.
    """
    info = path.stat()
    if not stat.S_ISREG(info.st_mode):
        raise InputError(f"{path} is no regular file: nothing of it was read")
    return info.st_size


def _read_regular(path: Path, most: int) -> bytes:
    """Read a regular file of at most ``most`` bytes.

    Raises:
        InputError: for a larger one, and for what is no regular file.
    """
    size = _require_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise InputError(f"{path} has {size:,} bytes: {MANIFEST} of a run has at most {most:,}")
    return content
