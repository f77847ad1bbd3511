"""The distributions that activations are taken from, and which tokens each masks.

k is the number of tokens of a block that can be masked: all but BOS. In the dual view every block
of a window has its own noise, beside the clean blocks before it.

``"t-uniform"``
    One ``t ~ U(low, high)`` a block; each of its k tokens is masked with probability t,
    independently. Every position of the noisy stream is a row.

``"nelbo-weighted"``
    The terms of the NELBO, in proportion to their weights. With ``x_i`` the tokens of a block::

        NELBO = integral_0^1 (1/t) E[ sum_{i masked} -log p(x_i) ] dt
              = sum_i integral_0^1 E[ -log p(x_i) | i is masked ] dt

    since i is masked with probability t. So a term is a token i, drawn uniformly; a time
    ``t ~ U(low, high)``; i masked, and every other token of the block masked with probability t.
    Only i is a row. Over t in (0, 1) the number of masks is uniform in 1..k, and the pattern is
    uniform among those of its size: the weights ``1/k * 1/binomial(k, m) * 1/m``.

``"on-policy"``
    Every step of denoising runs that go on from prompts cut from the corpus. Every position of the
    active block is a row, where the step's t is in (low, high).

``"clean-stream"``
    The finished text, without noise. Every position of the clean stream is a row.

It runs no network.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DISTRIBUTIONS = ("t-uniform", "nelbo-weighted", "on-policy", "clean-stream")
DRAWN = ("t-uniform", "nelbo-weighted")
"""Distributions whose masks are drawn here; the others take none, or those of a run."""

_MASKS = 1  # sets these streams apart from others of the same seed


@dataclass(frozen=True)
class NoisedWindows:
    """Windows of one length under their masks, and which positions are rows.

    Attributes:
        masked: which positions are masked ``[batch, pos]``.
        t: time of each position's block ``[batch, pos]``.
        rows: which positions are rows of the harvest ``[batch, pos]``.
    """

    masked: Bool[Tensor, "batch pos"]
    t: Float[Tensor, "batch pos"]
    rows: Bool[Tensor, "batch pos"]


def draw_masks(
    numbers: Sequence[int],
    length: int,
    block_size: int,
    distribution: str,
    t: tuple[float, float],
    seed: int,
    draw: int = 0,
) -> NoisedWindows:
    """Draw the masks of windows; those of a window depend on its number, the seed and the draw.

    Args:
        numbers: number of each window in its corpus.
        length: number of positions of each, BOS included.
        block_size: tokens per block.
        distribution: one of ``DRAWN``, or ``"clean-stream"``, which masks nothing.
        t: ends of the interval that times are drawn from.
        seed: random seed.
        draw: number of the draw, where windows are drawn several times.
    """
    shape = (len(numbers), length)
    if distribution == "clean-stream":
        none = torch.zeros(shape, dtype=torch.bool)
        return NoisedWindows(none, torch.zeros(shape, dtype=torch.float64), ~none)
    position = np.arange(length)
    block, low, high = position // block_size, *t
    masked, times, rows = np.empty(shape, bool), np.empty(shape), np.empty(shape, bool)
    for i, number in enumerate(numbers):
        generator = np.random.default_rng([seed, _MASKS, number, draw])
        blocks = int(block[-1]) + 1
        times[i] = (low + (high - low) * generator.random(blocks))[block]
        masked[i] = generator.random(length) < times[i]
        # A place of a whole block, so that each token is drawn equally often: BOS, and places that
        # a short last block does not have, are no tokens, and drawing one gives no row.
        place = generator.integers(block_size, size=blocks)
        rows[i] = position % block_size == place[block]
    if distribution == "nelbo-weighted":
        masked |= rows
        rows[:, 0] = False
    else:
        rows[:] = True
    masked[:, 0] = False
    return NoisedWindows(*(torch.from_numpy(x) for x in (masked, times, rows)))


def masks_left(masked: Bool[Tensor, "batch pos"], block_size: int) -> Int[Tensor, "batch pos"]:
    """Count the masks of each position's block."""
    block = torch.arange(masked.shape[1]) // block_size
    counts = torch.zeros(len(masked), int(block[-1]) + 1, dtype=torch.long)
    return counts.index_add_(1, block, masked.long())[:, block]


def most_rows(
    distribution: str, length: int, block_size: int, draws: int, prompt: int, new_tokens: int
) -> int:
    """Return the most rows that a window gives, whatever is drawn.

    Args:
        distribution: one of ``DISTRIBUTIONS``.
        length: number of positions of the window.
        block_size: tokens per block.
        draws: number of draws.
        prompt: number of positions of the prompt, BOS included.
        new_tokens: number of tokens that a run writes.
    """
    if distribution == "on-policy":
        # A step reveals at least one mask of its block, those behind the text included, and has the
        # block's positions within the text as rows.
        end = prompt + new_tokens
        starts = range(prompt - prompt % block_size, end, block_size)
        masks = [start + block_size - max(start, prompt) for start in starts]
        inside = [min(start + block_size, end) - start for start in starts]
        return sum(m * n for m, n in zip(masks, inside, strict=True))
    blocks = -(-length // block_size)
    return draws * (blocks if distribution == "nelbo-weighted" else length)
