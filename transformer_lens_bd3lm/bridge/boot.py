"""Boot a checkpoint by its name, and read a bridge or a name where either may be given.

A name is a folder, a Hub id, a ``.ckpt`` file, ``REPO::FILENAME``, or that of an embedded model.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.utilities.devices import get_device

from transformer_lens_bd3lm import checkpoint
from transformer_lens_bd3lm.bridge.host import require_bridge
from transformer_lens_bd3lm.checkpoint.lightning import (
    find_checkpoint_file,
    read_lightning,
    write_config_and_tokenizer,
)
from transformer_lens_bd3lm.checkpoint.pretrained import BD3LM
from transformer_lens_bd3lm.errors import BD3LMError, CheckpointError, InputError

DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError)
"""Errors that the libraries below raise for files that they cannot read."""
_EMBEDDED = ("tiny", "grammar")
_CHECKPOINTS = Path(checkpoint.__file__).parent


def path_of(model: str) -> str:
    """Return the folder of an embedded model; any other name as it is."""
    return str(_CHECKPOINTS / model) if model in _EMBEDDED else model


def embedded_hint(name: str) -> str:
    """Return the end of a message that names the embedded models, for a name that is no path."""
    if "/" in name or Path(name).exists():
        return ""
    return "; the embedded models are " + " and ".join(f'"{each}"' for each in _EMBEDDED)


@contextlib.contextmanager
def loading(path: str) -> Iterator[None]:
    """Turn every error of loading a checkpoint into a CheckpointError that names it.

    Raises:
        CheckpointError: with the reason; errors of this package stay as they are.
    """
    try:
        yield
    except BD3LMError:
        raise
    except DAMAGE as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} could not be loaded: {why}{embedded_hint(path)}") from error


def read_bridge(model: Any, **kwargs: Any) -> Any:
    """Return the bridge that was given, or boot the one that was named.

    Args:
        model: a BD3LM bridge, or a checkpoint's name.
        kwargs: of :func:`boot_checkpoint`, for a name.

    Raises:
        InputError: for anything else.
        CheckpointError: if the checkpoint cannot be loaded.
    """
    if not isinstance(model, str | Path):
        return require_bridge(model)
    path = path_of(str(model))
    with loading(path):
        return require_bridge(boot_checkpoint(path, **kwargs))


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
    """Boot a bridge from a PyTorch Lightning training checkpoint (``.ckpt``).

    Args:
        path_or_repo: a ``.ckpt`` file, or the folder or Hub id that has it.
        filename: name of the file in the folder or repository.
        weights: ``"ema"``, the moving average, which is what gets published; or ``"raw"``.
        revision: branch, tag or commit of the repository.
        tokenizer: tokenizer of the checkpoint; found as in :func:`convert_lightning` by default.
        device: TransformerLens's choice by default.
        dtype: of the weights and of all that is computed.

    Raises:
        CheckpointError: if the file is not a BD3LM training checkpoint, is damaged, or names
            something that would run code.
        TokenizerError: if its tokenizer cannot be found.
        InputError: if ``weights`` is neither ``"ema"`` nor ``"raw"``.
    """
    device = get_device() if device is None else device
    path = find_checkpoint_file(path_or_repo, filename, revision)
    with read_lightning(path, weights) as lightning, TemporaryDirectory() as folder:
        # TransformerLens reloads a tokenizer from where it came from, so it comes from a folder.
        write_config_and_tokenizer(lightning, tokenizer, Path(folder))
        with torch.device("meta"):
            model: Any = BD3LM(lightning.config)
        model.load_state_dict(lightning.state(), assign=True)
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
    """Boot a bridge by one name, of a published checkpoint or of a training one.

    Args:
        name: a folder or Hub id; a ``.ckpt`` file; or ``REPO::FILENAME``, a ``.ckpt`` file in a
            folder or repository.
        weights: of a training checkpoint, as in :func:`boot_lightning`.
        device: TransformerLens's choice by default.
        dtype: of the weights and of all that is computed.

    Raises:
        CheckpointError: if it cannot be loaded as it is.
        InputError: if ``weights`` is not one of the two, or given for a published checkpoint.
    """
    repository, _, filename = str(name).partition("::")
    if filename or Path(repository).is_file():
        placement: dict[str, Any] = {"device": device, "dtype": dtype}
        bridge = boot_lightning(repository, filename or None, weights, **placement)
        bridge.cfg.model_name = str(name)
        return bridge
    if weights != "ema":
        raise InputError(
            f"weights={weights!r} is for training checkpoints, and {name} is not one: leave it out"
        )
    return TransformerBridge.boot_transformers(repository, device=device, dtype=dtype)
