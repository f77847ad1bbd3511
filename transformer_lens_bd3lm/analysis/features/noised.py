"""Noisy blocks of texts under mask patterns, each distinct one once, for hooks that read by row.

All patterns of a block, or randomly drawn ones, are shared out over its numbers of masks: with k
tokens that can be masked, n patterns of m masks, and the share s = 1/n of each::

    NELBO = sum_m 1/m * sum over patterns of m masks of s * sum over masked i of -log p(x_i)
    a mean over rows = 1/k sum_m sum over patterns of m masks of s * (mean over rows)

The second line is a uniform t, given that the block has a mask. Blocks of any texts are rows of one
pass, so a hook sees ``[1, row, ...]``, in the order of :class:`.NoisyBlocks`; earlier blocks are
read from the clean stream, which no hook sees.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.masked_predictions import read_rows, require_masks
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.kv_cache import CleanStream
from transformer_lens_bd3lm.bridge.noisy_blocks import NoisyBlocks
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.distinct_masks import distinct_blocks
from transformer_lens_bd3lm.likelihoods.mask_draws import stratified
from transformer_lens_bd3lm.likelihoods.mask_patterns import read_mask_patterns
from transformer_lens_bd3lm.likelihoods.masked_passes import MaskedPasses, read_masked_passes
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.model.subs import masked_log_probs

_AT_ONCE = 2**23  # log-probabilities that a pass may have


@dataclass(frozen=True)
class NoisedBlocks:
    """Distinct noisy blocks of texts of one length, sorted by text and start; on the CPU.

    Attributes:
        passes: the texts, and how a pass over them is run.
        stream: keys and values of the texts as they are.
        numbers: number of each text among all that were given ``[batch]``.
        text: row of each block's text in ``passes`` ``[block]``.
        start: first position of each block.
        masked: which places of each block are masked ``[block, place]``.
        share: share of the block's pattern among those of its text, start and number of masks.
    """

    passes: MaskedPasses
    stream: CleanStream
    numbers: Int[Tensor, " batch"]
    text: Int[Tensor, " block"]
    start: Int[Tensor, " block"]
    masked: Bool[Tensor, "block place"]
    share: Float[Tensor, " block"]

    @property
    def left(self) -> Int[Tensor, " block"]:
        """Number of masks left in each block, at least 1."""
        return self.masked.sum(-1)

    @property
    def counted(self) -> Bool[Tensor, "block place"]:
        """Which places hold a token of the text that is not given."""
        by_block = self.passes.by_block(self.passes.counted[0])
        return by_block[self.start // self.passes.block_size]

    @property
    def text_number(self) -> Int[Tensor, " block"]:
        """Number of each block's text among all that were given."""
        return self.numbers[self.text]

    def parts(self, chosen: Bool[Tensor, " block"]) -> Iterator[Tensor]:
        """Yield the numbers of chosen blocks, as many as one pass takes."""
        words = self.passes.bridge.original_model.config.vocab_size
        rows = min(self.passes.rows, _AT_ONCE // words)
        at_once = max(rows // self.passes.block_size, 1)
        if bool(chosen.any()):
            yield from chosen.nonzero()[:, 0].split(at_once)

    def noisy(self, part: Int[Tensor, " block"]) -> NoisyBlocks:
        """Return some blocks as the rows of one pass."""
        length = self.passes.tokens.shape[1]
        return NoisyBlocks(length, self.text[part], self.start[part], self.masked[part])

    def log_probs(
        self, blocks: NoisyBlocks, hooks: list[tuple[str, Any]]
    ) -> Float[Tensor, "masked d_vocab"]:
        """Compute the predictions of a pass under hooks, in nats; float64, on the CPU.

        Raises:
            NotExactError: if a prediction is NaN.
        """
        bridge = self.passes.bridge
        with read_pass_hooks(bridge, hooks).on():
            logits = bridge.unembed(self.passes.block_outputs(self.stream, blocks))[0]
        log_p = masked_log_probs(at_least_float32(logits), bridge.cfg.mask_token_id).cpu().double()
        if bool(log_p.isnan().any()):
            raise NotExactError(f"predictions are NaN in {logits.dtype}: boot in a wider dtype")
        return log_p


def by_place(blocks: NoisyBlocks, rows: Float[Tensor, "row *dims"]) -> Float[Tensor, "b p *dims"]:
    """Return values of a pass's rows by block and place; NaN where a place has no row.

    A hook point of the read-out has the masked rows alone, which come first.
    """
    at = tuple(x[: len(rows)] for x in blocks.rows)
    full = torch.full((*blocks.masked.shape, *rows.shape[1:]), torch.nan, dtype=torch.float64)
    full[at] = rows.detach().cpu().double()
    return full


def read_noised(
    bridge: Bridge,
    texts: Any,
    block_size: int | str | None,
    method: str,
    replicates: int,
    seed: int,
    max_states: int,
    rows: int,
) -> list[NoisedBlocks]:
    """Check texts and settings, and return the noisy blocks of the texts of each length.

    Raises:
        InputError: for arguments that do not fit, and hooks on the bridge.
        NotExactError: with time conditioning, or in training mode with dropout.
    """
    require_masks(bridge)
    by_length: dict[int, list[tuple[int, Tensor]]] = {}
    for number, ids in enumerate(read_rows(bridge, texts)):
        by_length.setdefault(len(ids), []).append((number, ids))
    generator = torch.Generator().manual_seed(seed)
    noised = []
    for several in by_length.values():
        ids = torch.stack([row for _, row in several]).to(bridge.cfg.device)
        if method == "exact":
            patterns = read_mask_patterns(
                bridge, ids, block_size, None, "active", None, max_states, rows, 1, "texts"
            )
            passes, masked = patterns.passes, patterns.all_masked
        else:
            passes = read_masked_passes(bridge, ids, block_size, rows=rows, name="texts")
            masked = torch.cat([stratified(passes, generator).masked for _ in range(replicates)])
        if passes.hooked:
            raise InputError(
                "the bridge has hooks, or flags that copy heads: remove them "
                "(bridge.reset_hooks(), bridge.set_use_attn_result(False)) to read features alone"
            )
        numbers = torch.tensor([number for number, _ in several])
        noised.append(_distinct(passes, numbers, passes.by_block(masked)))
    return noised


def _distinct(
    passes: MaskedPasses, numbers: Tensor, blocks: Bool[Tensor, "pattern batch block place"]
) -> NoisedBlocks:
    """Return the distinct blocks, and the share of each."""
    at = blocks.any(-1).nonzero()
    first, owner = distinct_blocks(blocks, at)
    pattern, text, block = at[first].unbind(-1)
    masked, times = blocks[pattern, text, block], torch.bincount(owner).double()
    cell = (text * blocks.shape[2] + block) * (blocks.shape[3] + 1) + masked.sum(-1)
    sums = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add(0, cell, times)
    start = block * passes.block_size
    stream = passes.clean_stream()
    return NoisedBlocks(passes, stream, numbers, text, start, masked, times / sums[cell])
