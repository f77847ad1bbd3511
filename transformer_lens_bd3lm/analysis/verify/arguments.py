"""The arguments of ``verify``, read before anything is run, and the reference loaded.

What would make a comparison meaningless is refused by name: a device that is not there, files that
are not a checkpoint, two models without a common shape.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from transformer_lens_bd3lm.analysis.comparable import SHAPE, unlike
from transformer_lens_bd3lm.bridge.boot import loading
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.config import BD3LMConfig

# Shares of the reference's largest value. Rounding was seen to reach a third of them, in bfloat16
# two thirds.
_ALLOWED = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 0.025,
    torch.bfloat16: 0.2,
}
_LENGTH = 160  # tokens of a text, if the context has as many


def check_arguments(
    against: Any, block_sizes: Any, seed: Any, dtype: Any = None, device: Any = None
) -> None:
    """Check the arguments of ``verify`` that need no checkpoint.

    Raises:
        InputError: for an argument of another type or value.
    """
    if against is not None and not isinstance(against, str | Path):
        raise InputError(
            f"against is {type(against).__name__}: give a folder or Hub id, whose plain modules "
            "are the reference"
        )
    if not isinstance(block_sizes, list | tuple | range):
        raise InputError(f'block_sizes={block_sizes!r}: give a list, as [1, "full"]')
    check_int("seed", seed)
    if dtype is not None:
        _check_dtype(dtype)
    if device is not None:
        _check_device(device)


def _check_dtype(dtype: Any) -> None:
    """Check that a bridge can compute in a dtype.

    Raises:
        InputError: for any other.
    """
    if dtype not in _ALLOWED:
        names = ", ".join(str(each) for each in _ALLOWED)
        raise InputError(f"dtype={dtype!r} is not allowed: give one of {names}")


def _check_device(device: Any) -> None:
    """Check that this machine can compute on a device.

    Raises:
        InputError: with torch's own reason.
    """
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(
            f"device={device!r} cannot be computed on: {str(error).splitlines()[0]}. Give one that "
            'this machine has, for example "cpu"'
        ) from error


def read_length(length: Any, context: int) -> int:
    """Return the number of tokens of the random texts.

    Raises:
        InputError: if it is not in 2..context.
    """
    if length is None:
        return min(_LENGTH, context)
    return check_int("length", length, 2, context)


def read_allowed(allowed: Any, dtype: torch.dtype) -> float:
    """Return the largest difference, as a share of the reference's largest value.

    Raises:
        InputError: if it is not between 0 and 1, or the bridge has another dtype than floats.
    """
    _check_dtype(dtype)
    if allowed is None:
        return _ALLOWED[dtype]
    if not isinstance(allowed, float) or not 0 < allowed < 1:
        raise InputError(f"allowed={allowed!r}: give a share between 0 and 1, as 1e-5")
    return allowed


def load_plain_modules(
    path: str, dtype: torch.dtype, device: Any, revision: str | None = None
) -> Any:
    """Load a checkpoint as transformers does, running none of its repository's code.

    Raises:
        InputError: if it is not a BD3LM checkpoint.
        CheckpointError: if it cannot be loaded, or its weights do not fill it.
    """
    with loading(path):
        config = AutoConfig.from_pretrained(path, revision=revision)
    if not isinstance(config, BD3LMConfig):
        raise InputError(
            f"against={path!r} is a {config.model_type!r} checkpoint, not BD3LM: give the "
            "checkpoint that the model should be"
        )
    with loading(path):
        model = AutoModelForMaskedLM.from_pretrained(path, dtype=dtype, revision=revision)
        return model.to(device).eval()


def check_same_shape(config: Any, other: Any, names: tuple[str, str]) -> None:
    """Check that two checkpoints have the same shape, so that activations can be compared.

    Raises:
        InputError: with the keys of their configs that differ.
    """
    differ = unlike(config, other, SHAPE)
    if differ:
        raise InputError(
            f"{names[0]} and {names[1]} are not of one shape ({'; '.join(differ)}): give the "
            "checkpoint that the model should be"
        )
