"""What a token adds to the NELBO, and when it is revealed: two quantities, sentence by sentence.

Sentences of one length run together. A token that is given (BOS) has no value.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.by_depth.tokens import ROWS, ParsedText
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.forced_reveals import ForcedReveals
from transformer_lens_bd3lm.denoising.samplers import Confidence
from transformer_lens_bd3lm.likelihoods.exact import exact
from transformer_lens_bd3lm.likelihoods.nelbo import nelbo


def nats_of(
    parsed: ParsedText, size: int, method: str, replicates: int, seed: int
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos"]]]:
    """Yield what each token adds to the NELBO, in nats; NaN where it is given."""
    block_size = size if parsed.bridge.cfg.cross_attn else None
    for number, (part, ids) in enumerate(parsed.groups()):
        bound = nelbo(
            parsed.bridge, ids, block_size, method, replicates=replicates, seed=seed + number,
            rows=ROWS, max_states=2**size,
        )  # fmt: skip
        yield part, bound.by_token.masked_fill(~bound.counted, torch.nan)


def ranks_of(when: Float[Tensor, "batch pos"], size: int) -> Float[Tensor, "batch pos"]:
    """Rank times within each block, from 0 first to 1 last.

    Args:
        when: times of reveal; NaN for a position that is not revealed, and then of its rank.
        size: tokens per block; a block with a single time has NaN, as it has no order.
    """
    ranks = torch.full_like(when, torch.nan)
    for start in range(0, when.shape[1], size):
        part = slice(start, start + size)
        known = ~when[:, part].isnan()
        number = known.sum(-1, keepdim=True)
        order = when[:, part].nan_to_num(math.inf).argsort(-1).argsort(-1)
        share = order / (number - 1).clamp(min=1)
        ranks[:, part] = share.masked_fill(~known | (number < 2), torch.nan)
    return ranks


def posterior_order(
    parsed: ParsedText, size: int
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos"]]]:
    """Yield the expected rank of each token given the text, from 0 first to 1 last."""
    block_size = size if parsed.bridge.cfg.cross_attn else None
    for part, ids in parsed.groups():
        result = exact(parsed.bridge, ids, block_size, max_states=2**size, rows=ROWS)
        width = result.order_posterior.shape[-1]
        rank = result.order_posterior @ torch.arange(width, dtype=torch.float64)
        block = torch.arange(ids.shape[1]) // result.block_size
        places = torch.zeros(int(block[-1]) + 1).index_add_(0, block, result.counted[0].float())
        last = (places[block] - 1).expand_as(rank)
        share = rank / last.clamp(min=1)
        yield part, share.masked_fill(~result.counted | (last < 1), torch.nan)


def confident_order(
    parsed: ParsedText, size: int
) -> Iterator[tuple[list[int], Float[Tensor, "batch pos"]]]:
    """Yield the rank at which the sampler ``Confidence``, forced to write the text, reveals."""
    block_size = size if parsed.bridge.cfg.cross_attn else None
    for part, ids in parsed.groups():
        masked = ids.clone()
        masked[:, 1:] = parsed.bridge.cfg.mask_token_id
        run = denoise(
            parsed.bridge, masked, max_new_tokens=0, block_size=block_size, sampler=Confidence(),
            force=ForcedReveals(tokens=ids.cpu()), pad_block=False, progress=False,
        )  # fmt: skip
        step = run.commit_step.double()
        yield part, ranks_of(step.masked_fill(step < 0, torch.nan), size)
