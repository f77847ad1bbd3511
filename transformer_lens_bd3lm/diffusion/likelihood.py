"""How likely a checkpoint finds a text, at any setting of the dial.

The text is wrapped into windows of BOS and n - 1 tokens. At block size 1 the NELBO has one term a
token and is the exact autoregressive NLL. Beyond, each block's number of masks is drawn, stratified
over the batch, with the integral over time in closed form (see
:mod:`transformer_lens_bd3lm.diffusion.train`): an unbiased estimate of the bound, whose standard
error comes from independent replicates.

Tokens after the last whole window are not counted; BOS is never counted.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.diffusion.subs import masked_log_probs
from transformer_lens_bd3lm.diffusion.train import draw_masks
from transformer_lens_bd3lm.errors import InputError


@dataclass(frozen=True)
class Likelihood:
    """NELBO of a text at one block size.

    Attributes:
        block_size: tokens a block.
        nats_per_token: mean over counted tokens and replicates.
        standard_error: of that mean, from the replicates; 0 where it is exact.
        bits_per_character: the same in bits a character of the counted text.
        tokens: tokens counted.
        exact: True at block size 1, where it is the NLL itself; else an estimate of an upper bound.
    """

    block_size: int
    nats_per_token: float
    standard_error: float
    bits_per_character: float
    tokens: int
    exact: bool


def text_windows(bridge: Any, text: str, bos_id: int) -> Int[Tensor, "window pos"]:
    """The text's tokens in whole windows of the context, each after BOS.

    Raises:
        InputError: if the text does not fill one window.
    """
    context = bridge.cfg.n_ctx
    ids = torch.tensor(bridge.tokenizer(text, add_special_tokens=False)["input_ids"])
    count = len(ids) // (context - 1)
    if count == 0:
        raise InputError(f"the text has {len(ids)} tokens: give at least {context - 1}, one window")
    windows = ids[: count * (context - 1)].view(count, context - 1)
    return torch.cat([torch.full((count, 1), bos_id), windows], dim=1)


@torch.no_grad()
def likelihood(
    bridge: Any, text: str, block_size: int, *, replicates: int = 4, batch: int = 16, seed: int = 0
) -> Likelihood:
    """NELBO of a text, and the exact NLL at block size 1.

    Args:
        bridge: a BD3LM bridge with a tokenizer.
        text: the text; counted to its last whole window.
        block_size: the dial; a divisor of the context.
        replicates: independent draws of all masks, at least 2 beyond block size 1.
        batch: windows a forward.
        seed: of the draws.

    Raises:
        InputError: if the block size does not divide the context, or there are too few replicates.
    """
    context = bridge.cfg.n_ctx
    if context % block_size:
        raise InputError(f"block_size={block_size}: give a divisor of the context, {context}")
    exact = block_size == 1
    if not exact and replicates < 2:
        raise InputError(f"replicates={replicates}: a standard error needs at least 2")
    windows = text_windows(bridge, text, bridge.tokenizer.bos_token_id)
    generator = torch.Generator().manual_seed(seed)
    totals = [
        sum(_nats(bridge, x_0, block_size, generator) for x_0 in windows.split(batch))
        for _ in range(1 if exact else replicates)
    ]
    tokens = windows.shape[0] * (context - 1)
    per_token = torch.tensor(totals, dtype=torch.float64) / tokens
    mean = per_token.mean().item()
    characters = sum(len(bridge.tokenizer.decode(window[1:])) for window in windows)
    return Likelihood(
        block_size=block_size,
        nats_per_token=mean,
        standard_error=0.0 if exact else per_token.std().item() / math.sqrt(replicates),
        bits_per_character=mean * tokens / characters / math.log(2),
        tokens=tokens,
        exact=exact,
    )


def _nats(bridge: Any, x_0: Tensor, block_size: int, generator: torch.Generator) -> float:
    masked, weight = draw_masks(*x_0.shape, block_size, generator)
    mask_id = bridge.cfg.mask_token_id
    x_t = torch.where(masked, mask_id, x_0).to(bridge.cfg.device)
    logits = bridge(x_t, clean=x_0.to(x_t.device), block_size=block_size).cpu()
    log_p = masked_log_probs(logits[masked].double(), mask_id)
    nll = -log_p.gather(-1, x_0[masked][:, None])[:, 0]
    return float((weight[masked] * nll).sum())


def over_the_dial(
    bridge: Any, text: str, block_sizes: list[int], *, replicates: int = 4, seed: int = 0
) -> Iterator[Likelihood]:
    """:func:`likelihood` at several settings of the dial, one after another."""
    for block_size in block_sizes:
        yield likelihood(bridge, text, block_size, replicates=replicates, seed=seed)
