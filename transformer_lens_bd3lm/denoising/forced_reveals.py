"""Reveals that are decided beforehand: tokens, an order, or both, in place of the sampler's.

Everything else stays the same: noise, network and cache.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_tokenizer, is_int
from transformer_lens_bd3lm.denoising.canvas import Canvas
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import brief


@dataclass(frozen=True)
class ForcedReveals:
    """Tokens that chosen positions become, and steps at which they are revealed.

    Attributes:
        tokens: ``{position: id or string of one token}`` for all rows, or ids ``[batch, pos]``, as
            ``run.tokens`` are, with -1 or the id that is there already where nothing is forced. A
            position becomes its token when it is revealed.
        order: ``{step index: position or positions}`` for all rows, or step indices ``[batch,
            pos]``, as ``run.commit_step`` are, with -1 where the sampler decides. At each of these
            steps a row reveals these positions and no others; they are not revealed before.

    Raises:
        InputError: from :func:`denoise`, for positions that are given already or outside the
            text, ids outside the vocabulary or of the mask, strings of several tokens, and steps
            at which another block is denoised.
    """

    tokens: Mapping[int, int | str] | Tensor | None = None
    order: Mapping[int, int | Iterable[int]] | Tensor | None = None

    __repr__ = brief

    def __post_init__(self) -> None:
        if isinstance(self.order, Mapping):  # read again by a fork, and when the run is saved
            once = {i: list(x) if isinstance(x, Iterator) else x for i, x in self.order.items()}
            object.__setattr__(self, "order", once)


@dataclass(frozen=True)
class Plan:
    """Forced ids and step indices of one canvas ``[batch, pos]``, -1 where nothing is forced."""

    tokens: Int[Tensor, "batch pos"]
    order: Int[Tensor, "batch pos"]

    @classmethod
    def of(cls, bridge: Bridge, canvas: Canvas, force: ForcedReveals | None) -> "Plan":
        """Return the plan of a run; without ``force`` nothing is planned.

        Raises:
            InputError: for positions that are not to be denoised, or ids outside the vocabulary.
        """
        if force is None:
            force = ForcedReveals()
        if not isinstance(force, ForcedReveals):
            raise InputError(
                f"force is {type(force).__name__}: give ForcedReveals(tokens=..., order=...)"
            )
        tokens = cls._entries(bridge, canvas, "tokens", force.tokens)
        order = cls._entries(bridge, canvas, "order", force.order)
        vocab, mask_id = bridge.original_model.config.vocab_size, canvas.mask_id
        if bool(((tokens >= vocab) | (tokens == mask_id)).any()):
            raise InputError(
                f"force tokens hold an id that is no token: give ids 0..{vocab - 1}, not the mask "
                f"({mask_id})"
            )
        return cls(tokens, order)

    @classmethod
    def _entries(
        cls, bridge: Bridge, canvas: Canvas, name: str, given: Any
    ) -> Int[Tensor, "batch pos"]:
        """Return forced ids or step indices over the whole canvas, from a tensor, a dict or None.

        Raises:
            InputError: for another type or shape, and positions that are not to be denoised.
        """
        shape, wanted = canvas.tokens.shape, canvas.to_denoise()
        entries = torch.full(shape, -1, dtype=torch.long)
        if isinstance(given, Tensor):
            if given.ndim != 2 or given.shape[0] != shape[0] or given.shape[1] > shape[1]:
                raise InputError(
                    f"force {name} has shape {list(given.shape)}: give [batch, pos] = {list(shape)}"
                )
            fractional = given.is_floating_point() or given.dtype == torch.bool
            if fractional or bool((given < -1).any()):
                raise InputError(f"force {name} is {given.dtype}: give ints, -1 or more")
            entries[:, : given.shape[1]] = given
            if name == "tokens":  # what stands there already is not forced
                entries[entries == canvas.tokens.cpu()] = -1
        elif isinstance(given, Mapping):
            for position, value in cls._pairs(bridge, name, given):
                if not 0 <= position < shape[1]:
                    raise InputError(
                        f"force {name} names position {position}: the canvas has {shape[1]}"
                    )
                if bool((entries[:, position] >= 0).any()):
                    raise InputError(f"force {name} names position {position} twice")
                rows = wanted[:, position]
                entries[rows if bool(rows.any()) else slice(None), position] = value
        elif given is not None:
            raise InputError(f"force {name} is {type(given).__name__}: give a dict or a tensor")
        if bool((entries >= 0)[~wanted].any()):
            raise InputError(
                f"force {name} names a position that is given already, or not to be denoised: name "
                "positions that hold the mask"
            )
        return entries

    @staticmethod
    def _pairs(bridge: Bridge, name: str, given: Mapping[int, Any]) -> list[tuple[int, int]]:
        """Return pairs of a position and its token id or step index.

        Raises:
            InputError: for strings of several tokens, and for anything but ints from 0.
        """
        if name == "tokens":
            pairs = [
                (position, _single_token(bridge, token) if isinstance(token, str) else token)
                for position, token in given.items()
            ]
        else:
            pairs = [
                (position, index)
                for index, positions in given.items()
                for position in ([positions] if isinstance(positions, int) else positions)
            ]
        for pair in pairs:
            if not all(map(is_int, pair)) or pair[1] < 0:
                raise InputError(f"force {name} holds {pair}: give ints that count from 0")
        return pairs

    def free(self, window: tuple[int, int]) -> Bool[Tensor, "batch block"]:
        """Return the positions of a block that the sampler may reveal, at any step."""
        return self.order[:, slice(*window)] < 0

    def at_step(self, index: int, window: tuple[int, int]) -> Bool[Tensor, "batch block"]:
        """Return the positions of the block that are to be revealed at a step of this index.

        Raises:
            InputError: if another block holds one of them.
        """
        forced = self.order == index
        elsewhere = forced.clone()
        elsewhere[:, slice(*window)] = False
        if bool(elsewhere.any()):
            position = int(elsewhere.nonzero()[0, 1])
            raise InputError(
                f"force reveals position {position} at step {index}, where the block being "
                f"denoised is {window[0]}..{window[1] - 1}"
            )
        return forced[:, slice(*window)]


def _single_token(bridge: Bridge, text: str) -> int:
    """Return the id of a string of one token.

    Raises:
        InputError: if the string is not one token, or there is no tokenizer.
    """
    check_tokenizer(bridge, f"force names {text!r}, give its id")
    ids = bridge.to_tokens(text, prepend_bos=False, truncate=False)[0].tolist()
    if len(ids) != 1:
        raise InputError(f"force names {text!r}, which is {len(ids)} tokens: give one, or its id")
    return ids[0]
