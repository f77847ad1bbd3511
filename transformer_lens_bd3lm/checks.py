"""Checks of arguments that several modules make: numbers, choices, masks over finished texts.

Each raises an error that names the argument and its value, then the rule, then the way out::

    rows=0: give an int >= 1

Checks that one module alone makes stand in that module.
"""

import math
from collections.abc import Collection, Iterable
from numbers import Real
from typing import Any, TypeGuard

from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError


def is_int(value: Any) -> TypeGuard[int]:
    """Return whether a value is an int; ``True`` and ``False`` are not counted as ints."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Return whether a value is a real number; ``True`` and ``False`` are not counted as ones."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_int(
    name: str,
    value: Any,
    low: int | float = -math.inf,
    high: int | float = math.inf,
    rule: str = "",
    error: type[InputError] = InputError,
) -> int:
    """Return an argument that is an int from ``low`` to ``high``, both included.

    Args:
        name: name of the argument, for the message.
        value: value of the argument.
        low: least int that is allowed.
        high: greatest int that is allowed.
        rule: the rule and the way out, if the two limits do not say them all.
        error: type of the error.

    Raises:
        InputError: (or ``error``) for other types and for ints outside the range.
    """
    if not (is_int(value) and low <= value <= high):
        lower = f" >= {low}" if low > -math.inf else ""
        limits = f" in {low}..{high}" if high < math.inf else lower
        raise error(f"{name}={value!r}: {rule or f'give an int{limits}'}")
    return value


def check_number(name: str, value: Any, low: int | float, high: int | float, rule: str) -> None:
    """Check that an argument is a real number from ``low`` to ``high``, both included.

    Raises:
        InputError: for other types, NaN, and numbers outside the range.
    """
    if not (is_real(value) and low <= float(value) <= high):
        raise InputError(f"{name}={value!r}: {rule}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Check that an argument is one of a few words.

    Raises:
        InputError: for anything else.
    """
    if value not in choices:
        *others, last = (f'"{choice}"' for choice in choices)
        raise InputError(f"{name}={value!r}: give {', '.join(others)} or {last}")


def read_several(name: str, value: Any, rule: str) -> list[Any]:
    """Return the entries of an argument that is a list or tuple, an array or a tensor.

    Raises:
        InputError: for a string, and for anything else without entries.
    """
    several = value.tolist() if hasattr(value, "tolist") else value  # of a tensor or array
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise InputError(f"{name}={value!r}: {rule}")
    return list(several)


def check_finished(
    name: str, ids: Int[Tensor, "..."], mask_id: int, way_out: str = "give finished texts"
) -> None:
    """Check that texts hold no mask.

    Args:
        name: what the texts are called, for the message.
        ids: token ids.
        mask_id: id of the mask token.
        way_out: what to give instead.

    Raises:
        InputError: if a position holds the mask.
    """
    if bool((ids == mask_id).any()):
        raise InputError(f"{name} {_verb(name, 'hold')} the mask (id {mask_id}): {way_out}")


def check_bos_given(name: str, x_t: Int[Tensor, "batch pos"], mask_id: int) -> None:
    """Check that position 0 is not masked.

    Raises:
        InputError: if it is, in some row.
    """
    if bool((x_t[:, 0] == mask_id).any()):
        raise InputError(
            f"{name} {_verb(name, 'mask')} BOS (position 0), which is given and never predicted: "
            "mask positions after it"
        )


def check_noised(
    name: str,
    x_t: Int[Tensor, "batch pos"],
    clean_name: str,
    x_0: Int[Tensor, "batch pos"],
    mask_id: int,
    counted: Bool[Tensor, "batch pos"] | None = None,
) -> None:
    """Check that ``x_t`` is ``x_0`` with some of its tokens masked.

    Args:
        name: name of ``x_t`` where it was given, for the message.
        x_t: token ids with masks.
        clean_name: name of ``x_0``.
        x_0: token ids of the finished texts.
        mask_id: id of the mask token.
        counted: positions that are compared; all by default.

    Raises:
        InputError: naming the first position where the two differ and ``x_t`` is not the mask.
    """
    other = (x_t != mask_id) & (x_t != x_0)
    differing = (other if counted is None else other & counted).nonzero()
    if len(differing):
        row, position = differing[0].tolist()
        raise InputError(
            f"{name} {_verb(name, 'reveal')} id {int(x_t[row, position])} at row {row}, position "
            f"{position}, where {clean_name} {_verb(clean_name, 'have')} "
            f"{int(x_0[row, position])}: noise only masks (id {mask_id}), leave the rest as it is"
        )


def check_tokenizer(bridge: Any, way_out: str) -> None:
    """Check that a bridge has a tokenizer.

    Raises:
        InputError: if it has none; ``way_out`` says what to give instead.
    """
    if bridge.tokenizer is None:
        raise InputError(f"this bridge has no tokenizer: {way_out}")


def _verb(name: str, verb: str) -> str:
    """Return a verb in the form that goes with a name: tokens hold, x_0 holds."""
    if name in ("ids", "texts", "tokens"):
        return verb
    return {"have": "has"}.get(verb, f"{verb}s")
