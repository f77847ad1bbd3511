"""All mask patterns of finished texts: which positions each masks, and the log-probabilities there.

A block of k maskable tokens has ``2^k - 1`` mask patterns. The blocks of a text do not see each
other's noise, so pattern number j masks the same places of all of them.

It does not sum over the patterns; see ``reveal_orders``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.denoising.samplers import FirstHitting
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.masked_passes import MaskedPasses, read_masked_passes
from transformer_lens_bd3lm.likelihoods.reveal_orders import RevealOrders


def pattern_numbers(places: Int[Tensor, " place"]) -> Int[Tensor, " set"]:
    """Return the number of the mask pattern that leaves each set of places revealed."""
    k = len(places)
    hidden = (2**k - 1) ^ torch.arange(2**k)
    return (((hidden[:, None] >> torch.arange(k)) & 1) << places).sum(-1)


@dataclass(frozen=True)
class MaskPatterns:
    """All mask patterns of some texts: number j masks place i of every block if bit i of j is 1.

    Attributes:
        passes: the texts, and how a pass over them is run.
    """

    passes: MaskedPasses

    @property
    def count(self) -> int:
        """Number of patterns, the empty one included."""
        return 2**self.passes.block_size

    @property
    def all_masked(self) -> Bool[Tensor, "pattern batch pos"]:
        """Which positions each pattern masks, the empty one first; never a given one."""
        batch, n = self.passes.tokens.shape
        place = torch.arange(n) % self.passes.block_size
        masked = ((torch.arange(self.count)[:, None] >> place) & 1).bool()
        return (masked & self.passes.counted[0])[:, None].expand(-1, batch, -1)

    def table(self) -> Float[Tensor, "pattern batch pos"]:
        """Compute ``log p`` of the true tokens under every pattern, nats; 0 where not masked."""
        return self.passes.log_probs(self.all_masked)

    def _groups(self) -> Iterator[tuple[Int[Tensor, "block place"], Int[Tensor, " place"]]]:
        """Yield blocks with the same maskable places: their positions, and those places."""
        size, groups = self.passes.block_size, {}
        for start in range(0, self.passes.tokens.shape[1], size):
            places = tuple(self.passes.counted[0, start : start + size].nonzero()[:, 0].tolist())
            if places:
                groups.setdefault(places, []).append(start)
        for places, starts in groups.items():
            yield torch.tensor(starts)[:, None] + torch.tensor(places), torch.tensor(places)

    def reveal_orders(
        self, table: Float[Tensor, "pattern batch pos"]
    ) -> Iterator[tuple[Int[Tensor, "block place"], Int[Tensor, " place"], RevealOrders]]:
        """Yield the sums over orders of each group of blocks, whose rows are ``batch x block``."""
        for at, places in self._groups():
            log_p = table[pattern_numbers(places)][:, :, at]
            yield at, places, RevealOrders(log_p.permute(1, 2, 0, 3).flatten(0, 1))


def too_many_patterns(block_size: int, max_states: int) -> str:
    """Return the message for blocks with more than ``max_states`` mask patterns."""
    return (
        f"block_size={block_size} has {2**block_size} mask patterns a block, max_states is "
        f"{max_states}: raise it, or estimate the bound"
    )


def read_mask_patterns(
    bridge: Bridge,
    tokens: Any,
    block_size: int | str | None,
    hooks: Any,
    scope: str,
    sampler: Any,
    max_states: int,
    rows: int,
    given: int,
    name: str = "tokens",
) -> MaskPatterns:
    """Check the arguments of :func:`exact` and return the mask patterns, before anything is run.

    ``name`` is that of ``tokens`` where it was given, for messages.

    Raises:
        InputError: for arguments that do not fit, or too many mask patterns.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: where the sum would not be the likelihood of the sampler.
    """
    if sampler is not None and sampler != FirstHitting():
        raise NotExactError(
            f"{sampler!r}: the sum is over uniform orders and the model's own probabilities, which "
            "FirstHitting() with temperature 1 and no nucleus draws from; no likelihood of this "
            "sampler is known"
        )
    passes = read_masked_passes(bridge, tokens, block_size, hooks, scope, rows, given, name)
    size = passes.block_size
    if 2**size > max_states:
        raise InputError(too_many_patterns(size, max_states))
    return MaskPatterns(passes)
