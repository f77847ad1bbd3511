"""Take one stream out of the cache of a dual pass.

A dual pass runs ``[noisy | clean]``: its activations have 2n positions, its logits the noisy n.
Tools that index by position, or apply the read-out to the residual, want the n that the logits
belong to::

    noisy[name] = both[name][:, :n]          clean[name] = both[name][:, n:]

Scores and patterns are split by query. Their keys stay ``[noisy | clean]``, because a noisy query
reads both streams. The read-out (``ln_final``, ``unembed``) is the noisy stream's alone.
"""

import copy
from typing import Any, Literal

from torch import Tensor
from transformer_lens import ActivationCache

from transformer_lens_bd3lm.bridge.hook_points import HookPointSpec, lookup
from transformer_lens_bd3lm.errors import InputError


def noisy_stream(cache: Any, length: int | None = None) -> ActivationCache:
    """Return the noisy stream of a dual pass; its positions are those of the logits.

    Args:
        cache: the ``ActivationCache`` of a dual pass, without ``pos_slice``.
        length: n, the length of the text; needed only if the cache has no entry of ``ln_final`` or
            ``unembed``.

    Returns:
        Views of the same tensors, positions ``[noisy]``; keys of patterns stay ``[noisy | clean]``.

    Raises:
        InputError: if the cache is not of a dual pass, or n is unknown.
    """
    return _one_stream(cache, length, "noisy")


def clean_stream(cache: Any, length: int | None = None) -> ActivationCache:
    """Return the clean stream of a dual pass, for which no logits are computed.

    Args:
        cache: as for :func:`noisy_stream`.
        length: as for :func:`noisy_stream`.

    Returns:
        Views of the same tensors, positions ``[clean]``; keys of patterns stay ``[noisy | clean]``.

    Raises:
        InputError: if the cache is not of a dual pass, or n is unknown.
    """
    return _one_stream(cache, length, "clean")


def _one_stream(
    cache: Any, length: int | None, stream: Literal["noisy", "clean"]
) -> ActivationCache:
    """Return every entry's rows of one stream."""
    axis = 1 if cache.has_batch_dim else 0
    n = _length_of(cache, axis) if length is None else length
    rows = slice(0, n) if stream == "noisy" else slice(n, 2 * n)
    entries: dict[str, Tensor] = {}
    for key, x in cache.items():
        spec = lookup(key.removesuffix("_grad"))
        if stream not in spec.streams:
            continue
        if spec.streams == (stream,) or not _has_positions(spec, x, axis):
            entries[key] = x
        else:
            where = spec.row_axis - 1 + axis
            if x.shape[where] != 2 * n:
                raise InputError(
                    f"{key} has {x.shape[where]} positions, not 2 x {n}: give the whole cache of a "
                    "dual pass (clean=...), without pos_slice"
                )
            entries[key] = x.movedim(where, 0)[rows].movedim(0, where)
    result = copy.copy(cache)
    result.cache_dict = entries
    predicted = getattr(cache, "predicted", None)
    if predicted is not None and stream == "clean":
        result.predicted = predicted.clean_stream()
    return result


def _has_positions(spec: HookPointSpec, x: Tensor, axis: int) -> bool:
    """Whether rows of an entry are positions; a modulation is one for all, unless edited by row."""
    by_row = spec.kind == "modulation" and x.ndim == axis + 2 and x.shape[axis] != 1
    return spec.rows != "none" or by_row


def _length_of(cache: Any, axis: int) -> int:
    """Return n, from an entry of the read-out, which holds the noisy stream alone.

    Raises:
        InputError: if the cache has no such entry.
    """
    for key, x in cache.items():
        if lookup(key.removesuffix("_grad")).rows == "read-out":
            return x.shape[axis]
    raise InputError(
        "the length of the text cannot be read from this cache: cache ln_final.hook_in too, or "
        "give length=n"
    )
