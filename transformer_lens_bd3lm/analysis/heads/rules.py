"""Rules: which keys of a masked query count, by name, as a function, or as booleans.

A rule maps a :class:`MaskedText` to booleans ``[batch, query, key]`` that are True only where
``text.legal`` is.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor

from transformer_lens_bd3lm.analysis.heads.masked_text import MaskedText
from transformer_lens_bd3lm.errors import InputError


def _after_cue(text: MaskedText, side: int) -> Bool[Tensor, "batch query key"]:
    """Name keys beside another occurrence of the query's neighbor on that side.

    The neighbor itself is beside the query alone, which is masked and no key.
    """
    cue = text.at(side)
    token = text.read.masked_fill(~cue, 0).sum(-1, keepdim=True)
    again = text.legal & cue.any(-1, keepdim=True) & (text.read == token)
    return text.legal & F.pad(again, (-side, side))


def _duplicate_token(text: MaskedText) -> Bool[Tensor, "batch query key"]:
    """Name keys that hold the token that the query hides.

    Raises:
        InputError: in the sampling view, where the hidden token is not known.
    """
    if text.clean is None:
        raise InputError(
            '"duplicate_token" needs to know what the masks hide: give clean=, the finished text'
        )
    return text.legal & (text.read == text.clean[:, :, None])


Rule = Callable[[MaskedText], Bool[Tensor, "batch query key"]]

PATTERNS: dict[str, Rule] = {
    "previous_token": lambda text: text.at(-1),
    "next_token": lambda text: text.at(1),
    "induction": partial(_after_cue, side=-1),
    "induction_right": partial(_after_cue, side=1),
    "duplicate_token": _duplicate_token,
}


def read_pattern(text: MaskedText, pattern: Any) -> tuple[str, Bool[Tensor, "batch query key"]]:
    """Return a rule's name, and the keys that it names in a text.

    Raises:
        InputError: for an unknown name, another shape or type, keys that are not legal, or no keys.
    """
    name = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", "own rule")
    if isinstance(pattern, str):
        if pattern not in PATTERNS:
            raise InputError(
                f"pattern={pattern!r}: give one of {', '.join(PATTERNS)}, a function of a "
                "MaskedText, or booleans [batch, query, key]"
            )
        pattern = PATTERNS[pattern]
    keys = pattern if isinstance(pattern, Tensor) else pattern(text) if callable(pattern) else None
    n, legal = len(text.columns), text.legal
    if not isinstance(keys, Tensor) or keys.dtype != torch.bool or keys.shape != legal.shape:
        came = (
            f"{keys.dtype} of shape {tuple(keys.shape)}"
            if isinstance(keys, Tensor)
            else type(pattern if keys is None else keys).__name__
        )
        raise InputError(
            f"pattern is {came}: give booleans [batch, query, key] = {[len(text.x_t), n, n]}, "
            "positions in both views"
        )
    keys = keys.to(legal.device)
    if bool((keys & ~legal).any()):
        row, query, key = (keys & ~legal).nonzero()[0].tolist()
        if not bool(text.masked[row, query]):
            why = f"position {query} is not masked, and untrained to predict"
        elif not bool(text.readable[query, key]):
            why = f"{query} may not read {key} at this block size"
        else:
            why = f"{key} holds a mask there, no token"
        raise InputError(
            f"pattern names query {query} and key {key} of row {row}, but {why}: leave it out, as "
            "a function of the text does with `& text.legal`"
        )
    if not bool(keys.any()):
        raise InputError(
            f"pattern {name!r} names no key of any masked query of these texts: give texts in "
            "which some masked query may read such a key"
        )
    return name, keys
