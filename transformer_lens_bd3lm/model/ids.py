"""Checks of token ids, also where their values are not there yet.

While a graph is captured, and in fake tensors, an id has no value that could be compared with the
vocabulary. Then the check becomes part of the graph, or is left out; it is never wrong.
"""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch._subclasses import FakeTensor

from transformer_lens_bd3lm.errors import InputError


def check_ids(ids: Any, vocab_size: int, name: str) -> Int[Tensor, "batch pos"]:
    """Return token ids as ``[batch, pos]`` int64; a single row ``[pos]`` becomes a batch of one.

    Args:
        ids: token ids.
        vocab_size: tokens of the vocabulary.
        name: name of the argument, for errors.

    Raises:
        InputError: for floats, an empty tensor, other shapes, or ids outside the vocabulary.
    """
    if (
        not isinstance(ids, Tensor)
        or ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
    ):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"{name} is {kind}: give integer token ids [batch, pos]")
    ids = ids.long() if ids.ndim != 1 else ids.long()[None]
    if ids.ndim != 2 or ids.numel() == 0:
        raise InputError(
            f"{name} has shape {tuple(ids.shape)}: give token ids [batch, pos], not empty"
        )
    if not has_values(ids):
        require_later((ids >= 0) & (ids < vocab_size), f"{name}: an id outside the vocabulary")
        return ids
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{name} holds id {low if low < 0 else high}: the vocabulary is 0..{vocab_size - 1}"
        )
    return ids


def fill_hidden(
    ids: Int[Tensor, "batch pos"], hidden: Bool[Tensor, "batch pos"], vocab_size: int, filler: int
) -> Int[Tensor, "batch pos"]:
    """Replace hidden ids that no token has: padding may be any number.

    Args:
        ids: token ids.
        hidden: True at padding, which no position reads.
        vocab_size: tokens of the vocabulary.
        filler: id to put there.
    """
    outside = (ids < 0) | (ids >= vocab_size)
    return ids.masked_fill(hidden.to(ids.device) & outside, filler)


def has_values(x: Tensor) -> bool:
    """Return whether the values of a tensor can be read now.

    They cannot while a graph is captured (``torch.compile``, ``torch.export``), in fake tensors,
    and under ``torch.func.vmap``, where each stands for many.
    """
    return not (
        torch.compiler.is_compiling()
        or isinstance(x, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore
    )


def require_later(condition: Tensor, message: str) -> None:
    """Check a condition when the graph that is being captured runs; without a graph, never.

    The graph raises a RuntimeError with the message.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)  # pyright: ignore
