"""What may stand for a bridge: the bridge itself, or the name of a checkpoint, which is booted.

A name is a folder, a Hub id, a ``.ckpt`` file, ``REPO::FILENAME``, or that of an embedded model.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities import get_device

from transformer_lens_bd3lm import checkpoint
from transformer_lens_bd3lm.checkpoint.lightning import (
    find_checkpoint_file,
    read_lightning,
    write_config_and_tokenizer,
)
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import BD3LMError, CheckpointError, InputError
from transformer_lens_bd3lm.model.rules import ARCHITECTURES

EMBEDDED = ("tiny", "grammar")
CHECKPOINTS = Path(checkpoint.__file__).parent


def path_of(model: str) -> str:
    """The folder of an embedded model; any other name as it is."""
    return str(CHECKPOINTS / model) if model in EMBEDDED else model


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Tell of a checkpoint that cannot be loaded, whatever the library below says.

    Raises:
        CheckpointError: with its reason; an error of ours stays what it is.
    """
    try:
        yield
    except BD3LMError:
        raise
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise CheckpointError(f"{path} could not be loaded: {why}") from error


def read_bridge(model: Any, **how: Any) -> Any:
    """Return the bridge that was given, or boot the one that was named.

    Args:
        model: a BD3LM bridge, or a checkpoint's name.
        how: as :func:`boot_checkpoint`, for a name.

    Raises:
        InputError: for anything else.
        CheckpointError: if the checkpoint cannot be loaded.
    """
    if not isinstance(model, str | Path):
        return require_bridge(model)
    path = path_of(str(model))
    with loading(path):
        return require_bridge(boot_checkpoint(path, **how))


def require_bridge(bridge: Any) -> Any:
    """Return a bridge where only that will do, since something of it stays with the caller.

    Raises:
        InputError: for a name, another model, or a bridge of another architecture.
    """
    if isinstance(bridge, str | Path):
        raise InputError(
            f"bridge is the name {str(bridge)!r}: boot it first, with "
            "TransformerBridge.boot_transformers, and give the bridge"
        )
    architecture = getattr(getattr(bridge, "cfg", None), "architecture", None)
    if architecture not in ARCHITECTURES:
        of = f" of {architecture}" if architecture else ""
        raise InputError(
            f"model is {type(bridge).__name__}{of}: give a bridge of a BD3LM checkpoint, or the "
            "checkpoint's name"
        )
    return bridge


def boot_lightning(
    path_or_repo: str | Path,
    filename: str | None = None,
    weights: str = "ema",
    *,
    revision: str | None = None,
    tokenizer: Any = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransformerBridge:
    """A bridge over a training checkpoint, as ``boot_transformers`` gives over a published one.

    Args:
        path_or_repo: a ``.ckpt`` file, or the folder or Hub id that has it.
        filename: its name in the folder or repository.
        weights: ``"ema"``, the moving average, which is what gets published; or ``"raw"``.
        revision: of the repository.
        tokenizer: the checkpoint's, where it is not to be found by itself.
        device: the host's choice by default.
        dtype: to compute in.

    Raises:
        CheckpointError: if the file is not such a checkpoint, damaged, or hostile.
        TokenizerError: if its tokenizer is not to be found.
        InputError: if ``weights`` is neither.
    """
    device = get_device() if device is None else device
    path = find_checkpoint_file(path_or_repo, filename, revision)
    with read_lightning(path, weights) as found, TemporaryDirectory() as folder:
        # The host makes its tokenizer anew from where it came from, so it comes from a folder.
        write_config_and_tokenizer(found, tokenizer, Path(folder))
        with torch.device("meta"):
            model = BD3LM(found.config)
        model.load_state_dict(found.state(), assign=True)
        model.eval().to(device=device, dtype=dtype)
        bridge = TransformerBridge.boot_transformers(
            folder, hf_model=model, device=device, dtype=dtype
        )
    bridge.cfg.model_name = str(path_or_repo)
    return bridge


def boot_checkpoint(
    name: str | Path,
    weights: str = "ema",
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransformerBridge:
    """A bridge over whatever one name stands for, a published checkpoint or a training one.

    Args:
        name: a folder or Hub id; a ``.ckpt`` file; or ``REPO::FILENAME``, a ``.ckpt`` file in a
            folder or repository.
        weights: of a training checkpoint, as in :func:`boot_lightning`.
        device: the host's choice by default.
        dtype: to compute in.

    Raises:
        CheckpointError: if it cannot be loaded as it is.
        InputError: if ``weights`` is neither, or not for such a checkpoint.
    """
    repository, _, filename = str(name).partition("::")
    if filename or Path(repository).is_file():
        how: dict[str, Any] = {"device": device, "dtype": dtype}
        bridge = boot_lightning(repository, filename or None, weights, **how)
        bridge.cfg.model_name = str(name)
        return bridge
    if weights != "ema":
        raise InputError(
            f"weights={weights!r} is for training checkpoints: {name} is none, leave it out"
        )
    return TransformerBridge.boot_transformers(repository, device=device, dtype=dtype)
