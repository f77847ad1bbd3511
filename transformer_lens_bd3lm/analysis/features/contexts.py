"""Contexts of the highest activations of a feature, by masks left, at masks and at written tokens.

A context is one token of a text under one mask pattern of its block. Of one token at one kind of
place and number of masks left, only the pattern with the highest activation is taken. The network
reads the earlier text as it is, so its activations are those of a plain forward without masks.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.features.noised import NoisedBlocks
from transformer_lens_bd3lm.analysis.sae.splice import joined
from transformer_lens_bd3lm.bridge.hook_points import lookup
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks

BEFORE = 20  # tokens that are shown before the block
_MOST_RANGES = 4


@dataclass(frozen=True)
class Context:
    """One activation of a feature, with the text that the network read there.

    Attributes:
        kind: ``"masked"`` or ``"written"``.
        text: number of the text.
        position: position in the text.
        masks_left: number of masks left in its block.
        activation: the feature's activation there.
        start: position of the first token that is shown; the last one ends the block.
        tokens: final ids of the shown tokens.
        masked: which of them are masked.
        activations: the feature's activation at each of them; NaN where it was not read.
        log_p: log p of the final token there, nats; NaN where it is written.
        log_p_without: the same with the feature set to 0.
    """

    kind: str
    text: int
    position: int
    masks_left: int
    activation: float
    start: int = field(repr=False)
    tokens: tuple[int, ...] = field(repr=False)
    masked: tuple[bool, ...] = field(repr=False)
    activations: tuple[float, ...] = field(repr=False)
    log_p: float = field(repr=False)
    log_p_without: float = field(repr=False)


def ranges_of(most: int) -> tuple[tuple[int, int], ...]:
    """Return the ranges of masks left, both ends included, into which 1 .. ``most`` are cut."""
    parts = min(most, _MOST_RANGES)
    ends = [round(most * i / parts) for i in range(parts + 1)]
    return tuple((low + 1, high) for low, high in pairwise(ends))


@dataclass(frozen=True)
class Peak:
    """Place of a high activation: which length, block and place, before its text is read."""

    group: int
    block: int
    place: int
    activation: float
    masked: bool


def top_peaks(
    noised: list[NoisedBlocks],
    active: list[Tensor],
    masks: tuple[int, int],
    masked: bool,
    n: int,
) -> list[Peak]:
    """Return the ``n`` highest activations of different tokens, in a range of masks left."""
    found: list[tuple[float, int, int, int]] = []
    for group, (blocks, values) in enumerate(zip(noised, active, strict=True)):
        fits = (blocks.left >= masks[0]) & (blocks.left <= masks[1])
        here = fits[:, None] & (blocks.masked == masked) & blocks.counted
        here &= values.nan_to_num() != 0
        block, place = here.nonzero().unbind(-1)
        order = values[block, place].argsort(descending=True, stable=True)
        seen: set[tuple[int, int]] = set()
        for i in order.tolist():
            b, p = int(block[i]), int(place[i])
            token = (int(blocks.text[b]), int(blocks.start[b]) + p)
            if token not in seen:
                seen.add(token)
                found.append((float(values[b, p]), group, b, p))
            if len(seen) == n:
                break
    found.sort(key=lambda each: -each[0])
    return [Peak(group, b, p, value, masked) for value, group, b, p in found[:n]]


def context_of(
    peak: Peak,
    blocks: NoisedBlocks,
    values: Float[Tensor, "block place"],
    log_p: Float[Tensor, "block place"],
    log_p_without: Float[Tensor, "block place"],
    earlier: Float[Tensor, "batch pos"],
) -> Context:
    """Return a context with its text.

    Args:
        peak: where it is.
        blocks: the blocks of the texts of its length.
        values: the feature's activations in them.
        log_p: log p of the true tokens of masked places.
        log_p_without: the same with the feature set to 0.
        earlier: the feature's activations in these texts as they are; NaN where not read.
    """
    b, p = peak.block, peak.place
    row, first = int(blocks.text[b]), int(blocks.start[b])
    start = max(first - BEFORE, 0)
    inside = range(min(blocks.passes.block_size, blocks.passes.tokens.shape[1] - first))
    states, activations = blocks.masked[b].tolist(), values[b].tolist()
    return Context(
        kind="masked" if peak.masked else "written",
        text=int(blocks.numbers[row]),
        position=first + p,
        masks_left=int(blocks.left[b]),
        activation=peak.activation,
        start=start,
        tokens=tuple(blocks.passes.tokens[row, start : first + len(inside)].tolist()),
        masked=(False,) * (first - start) + tuple(states[i] for i in inside),
        activations=(
            *earlier[row, start:first].tolist(),
            *(activations[i] for i in inside),
        ),
        log_p=float(log_p[b, p]) if peak.masked else torch.nan,
        log_p_without=float(log_p_without[b, p]) if peak.masked else torch.nan,
    )


def read_clean(
    blocks: NoisedBlocks, sae: Any, name: str, numbers: Tensor, rows: list[int]
) -> Float[Tensor, "batch pos feature"]:
    """Return features of texts as they are, of some rows; NaN of the others.

    They are NaN where no clean text is read: in full diffusion, and at the read-out.
    """
    passes = blocks.passes
    shape = (*passes.tokens.shape, len(numbers))
    kept = torch.full(shape, torch.nan, dtype=torch.float64)
    if not passes.bridge.original_model.config.cross_attn or lookup(name).rows == "read-out":
        return kept
    at_once = max(passes.rows // passes.tokens.shape[1], 1)
    for first in range(0, len(rows), at_once):
        part = torch.tensor(rows[first : first + at_once])

        def keep(x: Tensor, hook: Any, part: Tensor = part) -> None:
            features = sae.encode(joined(sae, name, x))[..., numbers.to(x.device)]
            kept[part] = features.detach().cpu().double()

        with read_pass_hooks(passes.bridge, [(name, keep)]).on():
            passes.bridge(
                passes.tokens[part.to(passes.tokens.device)],
                sample_mode=True,
                block_size=passes.block_size,
            )
    return kept
