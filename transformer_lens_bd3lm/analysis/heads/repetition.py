"""Random tokens that repeat themselves: texts on which copying heads are found."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import brief


@dataclass(frozen=True)
class RepeatedTokens:
    """Random tokens, and the same tokens once more under masks.

    Attributes:
        x_t: token ids with masks in the second copy ``[batch, pos]``.
        clean: the same ids without masks ``[batch, pos]``.
        lag: positions from a token of the first copy to the same token of the second ``[batch]``.
    """

    x_t: Int[Tensor, "batch pos"]
    clean: Int[Tensor, "batch pos"]
    lag: Int[Tensor, " batch"]

    __repr__ = brief


def repeated_tokens(
    bridge: Bridge,
    rows: int = 32,
    length: int = 24,
    *,
    gap: int = 8,
    rate: float = 0.5,
    seed: int = 0,
) -> RepeatedTokens:
    """Draw texts of random tokens that repeat under masks, to find heads that copy.

    A text is BOS, ``length`` random tokens, 0 to ``gap`` filler tokens, the first ``length`` tokens
    once more, and the rest of the ``gap`` filler tokens. No token is in a text three times, so each
    mask can be copied from one position only. The lag is drawn by row: under a single lag a head
    that always attends that far back would copy as well, and ``HeadScores.content`` would be NaN.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        rows: number of texts.
        length: tokens of a copy.
        gap: number of filler tokens, each of which is in a text once.
        rate: probability with which each position of the second copy is masked; at 1 all of
            them are, and with them most of a query's neighbors in its own block.
        seed: random seed of tokens, lags and masks.

    Raises:
        InputError: for counts or a rate out of range, or a text that is longer than the context or
            needs more words than the vocabulary has.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        TokenizerError: for a name whose checkpoint has no tokenizer.
    """
    bridge = read_bridge(bridge)
    config, tokenizer = bridge.original_model.config, bridge.tokenizer
    total = 1 + 2 * length + gap
    if min(rows, length) < 1 or gap < 0 or not 0 < rate <= 1:
        raise InputError(
            f"rows={rows}, length={length}, gap={gap}, rate={rate}: give at least 1, 1 and 0, and "
            "a rate in (0, 1]"
        )
    words = torch.ones(config.vocab_size, dtype=torch.bool)
    words[[bridge.cfg.mask_token_id, *tokenizer.all_special_ids]] = False
    words = words.nonzero()[:, 0]
    if total > config.model_length or length + gap > len(words):
        raise InputError(
            f"length={length} and gap={gap} make {total} positions of {length + gap} words: this "
            f"checkpoint has {config.model_length} and {len(words)}"
        )
    generator = torch.Generator().manual_seed(seed)
    clean = torch.full((rows, total), tokenizer.bos_token_id)
    lag = length + torch.randint(gap + 1, (rows,), generator=generator)
    for text, behind in zip(clean, lag.tolist(), strict=True):
        drawn = words[torch.randperm(len(words), generator=generator)[: length + gap]]
        copy, once = drawn[:length], drawn[length:]
        text[1:] = torch.cat([copy, once[: behind - length], copy, once[behind - length :]])
    place = torch.arange(total) - 1 - lag[:, None]
    masked = torch.rand(clean.shape, generator=generator) < rate
    masked &= (place >= 0) & (place < length)
    device = bridge.cfg.device
    x_t = clean.masked_fill(masked, bridge.cfg.mask_token_id)
    return RepeatedTokens(x_t.to(device), clean.to(device), lag.to(device))
