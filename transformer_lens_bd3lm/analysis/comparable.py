"""What can be compared with a checkpoint's plain modules, and how closely.

A comparison that would mean nothing is refused before anything is booted or run, by name: settings
that are none, a device that is not there, files that are no checkpoint, and two models of which no
activation has a counterpart.

It compares nothing.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from transformer_lens_bd3lm.bridge.block import why_random
from transformer_lens_bd3lm.bridge.boot import loading
from transformer_lens_bd3lm.bridge.hook_points import FLAGS
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.config import BD3LMConfig
from transformer_lens_bd3lm.model.rules import ARCHITECTURES

# Of the largest value; what rounding was seen to make is a third of it, in bfloat16 two thirds.
ALLOWED = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 0.025,
    torch.bfloat16: 0.2,
}
SHAPE = ("vocab_size", "model_length", "hidden_dim", "n_blocks", "n_heads", "adaln", "cross_attn")
READ = 160  # tokens of a text that are read


def check_asked(
    against: Any, block_sizes: Any, seed: Any, dtype: Any = None, device: Any = None
) -> None:
    """Refuse what is no setting of a comparison.

    Raises:
        InputError: naming it.
    """
    if against is not None and not isinstance(against, str | Path):
        raise InputError(
            f"against is {type(against).__name__}: give a folder or Hub id, whose plain modules "
            "decide"
        )
    if not isinstance(block_sizes, list | tuple | range):
        raise InputError(f"block_sizes={block_sizes!r}: give a list of them")
    check_int("seed", seed)
    if dtype is not None:
        check_dtype(dtype)
    if device is not None:
        check_device(device)


def check_dtype(dtype: Any) -> None:
    """Refuse what no bridge computes in.

    Raises:
        InputError: if it is that.
    """
    if dtype not in ALLOWED:
        names = ", ".join(str(each) for each in ALLOWED)
        raise InputError(f"dtype={dtype!r} is not allowed: give one of {names}")


def check_device(device: Any) -> None:
    """Refuse a device on which this machine cannot compute.

    Raises:
        InputError: with torch's own reason.
    """
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError) as error:
        raise InputError(
            f"device={device!r} cannot be computed on: {str(error).splitlines()[0]}. Give one that "
            'this machine has, "cpu" say'
        ) from error


def read_length(length: Any, context: int) -> int:
    """How many tokens are read.

    Raises:
        InputError: if the context does not hold so many, or they are too few.
    """
    if length is None:
        return min(READ, context)
    return check_int("length", length, 2, context)


def read_allowed(allowed: Any, dtype: torch.dtype) -> float:
    """The largest difference, as a part of the reference's largest value.

    Raises:
        InputError: if it is no such part.
    """
    check_dtype(dtype)
    if allowed is None:
        return ALLOWED[dtype]
    if not isinstance(allowed, float) or not 0 < allowed < 1:
        raise InputError(f"allowed={allowed!r}: give a part between 0 and 1, as 1e-5")
    return allowed


def plain_modules(path: str, dtype: torch.dtype, device: Any, revision: str | None = None) -> Any:
    """A checkpoint as transformers loads it, running none of its repository's code.

    Raises:
        InputError: if it is no BD3LM checkpoint.
        CheckpointError: if it cannot be loaded, or its weights do not fill it.
    """
    with loading(path):
        config = AutoConfig.from_pretrained(path, revision=revision)
    if not isinstance(config, BD3LMConfig):
        raise InputError(f"against={path!r} is a {config.model_type!r} checkpoint, not BD3LM")
    with loading(path):
        model = AutoModelForMaskedLM.from_pretrained(path, dtype=dtype, revision=revision)
        return model.to(device).eval()


def check_bridge(bridge: Any) -> None:
    """Refuse a bridge that is set to compute something else.

    Raises:
        InputError: if it is none of a BD3LM checkpoint, in training with dropout, or flagged.
    """
    if getattr(getattr(bridge, "cfg", None), "architecture", None) not in ARCHITECTURES:
        raise InputError(f"model is {type(bridge).__name__}: give a path, a Hub id or a bridge")
    random = why_random(bridge)
    if random is not None:
        raise InputError(random)
    flags = [flag for flag in FLAGS if getattr(bridge.cfg, flag, False)]
    if flags:
        raise InputError(
            f"{', '.join(flags)} is on, and some hook points are off the path: turn it off with "
            f"bridge.set_{flags[0]}(False)"
        )


def unlike(config: Any, other: Any, keys: Iterable[str]) -> list[str]:
    """In which of these settings two configs differ, and how."""
    pairs = [(key, getattr(config, key), getattr(other, key)) for key in keys]
    return [f"{key} {one} and {two}" for key, one, two in pairs if one != two]


def check_same_shape(config: Any, other: Any, names: tuple[str, str]) -> None:
    """Refuse two checkpoints of which no activation could be compared.

    Raises:
        InputError: naming what differs.
    """
    differ = unlike(config, other, SHAPE)
    if differ:
        raise InputError(
            f"{names[0]} and {names[1]} are not of one shape ({'; '.join(differ)}): give the "
            "checkpoint that the model should be"
        )
