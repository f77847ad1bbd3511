"""What may stand for a bridge: the bridge itself, or the name of a checkpoint, which is booted.

A name is a folder, a Hub id, a ``.ckpt`` file, ``REPO::FILENAME``, or that of an embedded model.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformer_lens_bd3lm.checkpoint.converting import boot_checkpoint
from transformer_lens_bd3lm.checkpoint.rules import ARCHITECTURES
from transformer_lens_bd3lm.errors import BD3LMError, CheckpointError, InputError

EMBEDDED = ("tiny", "grammar")


def path_of(model: str) -> str:
    """The folder of an embedded model; any other name as it is."""
    return str(Path(__file__).parent / model) if model in EMBEDDED else model


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
