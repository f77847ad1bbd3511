"""Pairs of texts with the same masks, and what is scored at those masks."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.text_pairs import (
    check_same_masks,
    read_targets,
    read_text_pairs,
)
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_bos_given, check_finished
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.subs import masked_log_probs


@dataclass(frozen=True)
class MaskedPair:
    """A clean and a corrupted text with masks at the same positions.

    Attributes:
        clean: ids with masks ``[1, pos]``.
        corrupted: ids with masks ``[1, pos]``.
        finished: in the dual view, both texts without masks.
        at: positions that are scored ``[token]``.
        target: ids whose log p counts ``[token]``.
        against: ids whose log p is subtracted ``[token]``; None for log p alone.
    """

    clean: Int[Tensor, "1 pos"]
    corrupted: Int[Tensor, "1 pos"]
    finished: tuple[Tensor, Tensor] | None
    at: Int[Tensor, " token"]
    target: Int[Tensor, " token"]
    against: Int[Tensor, " token"] | None

    def score(self, logits: Tensor, mask_id: int) -> Float[Tensor, ""]:
        """Return log p of the target minus that of ``against``, summed over tokens, nats."""
        log_probs = masked_log_probs(logits[0, self.at].double(), mask_id)
        value = log_probs.gather(-1, self.target[:, None]).sum()
        if self.against is not None:
            value = value - log_probs.gather(-1, self.against[:, None]).sum()
        return value

    def last_block_only(self, block_size: int) -> bool:
        """Return whether no block reads a mask of an earlier one."""
        first = int(self.at[0]) // block_size
        return self.finished is not None or first == (self.clean.shape[1] - 1) // block_size


def read_masked_pairs(
    bridge: Bridge, clean: Any, corrupted: Any, target: Any, against: Any, masks: Any
) -> list[MaskedPair]:
    """Check texts, masks and targets; the arguments of :func:`.attribute_edges`.

    Raises:
        InputError: naming what does not fit.
    """
    config, mask_id = bridge.original_model.config, bridge.cfg.mask_token_id
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it has never seen a "
            "mask; transformer_lens.tools.analysis.attribution_patch is for such models"
        )
    texts = read_text_pairs(bridge, clean, corrupted)
    given = _read_masks(masks, [a for a, _ in texts])
    targets = read_targets(bridge, target, len(texts))
    opposed = read_targets(bridge, against, len(texts), "against")
    pairs = []
    for number, (a, b) in enumerate(texts):
        name, a, b, finished = f"text {number}", a[None], b[None], None
        if given is not None:
            check_finished("clean", a, mask_id, "masks are given apart")
            check_finished("corrupted", b, mask_id, "masks are given apart")
            here = given[number].to(a.device)
            finished, (a, b) = (a, b), (x.masked_fill(here, mask_id) for x in (a, b))
        check_bos_given("clean", a, mask_id)
        check_same_masks(number, a[0], b[0], mask_id)
        masked = a == mask_id
        if not bool(masked.any()):
            raise InputError(f"{name} holds no mask: mask what is to be predicted")
        at = masked[0].nonzero()[:, 0]
        own, other = targets[number], opposed[number]
        if own is None and finished is None:
            raise InputError("target=None needs finished texts: give target, or masks=")
        if own is None and finished is not None:
            own = finished[0][0, at]
        pairs.append(
            MaskedPair(
                clean=a,
                corrupted=b,
                finished=finished,
                at=at,
                target=_at_masks(own, at, "target", name),
                against=None if other is None else _at_masks(other, at, "against", name),
            )
        )
    return pairs


def _read_masks(masks: Any, texts: list[Tensor]) -> list[Bool[Tensor, "1 pos"]] | None:
    """Return which positions of each text are masked in the dual view, from booleans.

    Raises:
        InputError: for anything but booleans of the texts' shapes.
    """
    if masks is None:
        return None
    rows = list(masks) if isinstance(masks, list | tuple) or getattr(masks, "ndim", 0) else []
    fits = len(rows) == len(texts) and all(
        isinstance(row, Tensor) and row.dtype == torch.bool and row.shape == text.shape
        for row, text in zip(rows, texts, strict=False)
    )
    if not fits:
        raise InputError("masks: give booleans [text, pos], or one tensor [pos] for each text")
    return [row[None] for row in rows]


def _at_masks(ids: Tensor | None, at: Tensor, what: str, name: str) -> Int[Tensor, " token"]:
    """Return one id for each mask.

    Raises:
        InputError: for another number of ids.
    """
    if ids is None or len(ids) != len(at):
        came = 0 if ids is None else len(ids)
        raise InputError(
            f"{name}: {what} has {came} tokens and the text {len(at)} masks: give one for each"
        )
    return ids
