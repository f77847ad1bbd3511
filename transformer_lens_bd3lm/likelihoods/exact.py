"""Exact likelihoods of finished texts: sums over mask patterns and reveal orders, not samples.

The NLL is the negative log-likelihood of what the model *writes*: a mixture over reveal orders,
each equally likely under first hitting. The NELBO (Arriola et al., section 3), the mean over orders
of the log, is an upper bound on it::

    NELBO - NLL = KL(uniform over orders || posterior over orders)

``masked_passes`` runs the mask patterns, ``reveal_orders`` sums over them. The clean stream never
sees noise: its keys and values are computed once. All of this needs the conditioning c to be
constant, and the model's own sampler.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.likelihoods.mask_patterns import MaskPatterns, read_mask_patterns
from transformer_lens_bd3lm.likelihoods.statistics import PerToken, of_tokens
from transformer_lens_bd3lm.result import Result, plain_values


@dataclass(frozen=True, repr=False)
class Exact(PerToken, Result):
    """Exact likelihoods of texts: sums over every mask pattern of every block, in nats.

    ``nats_per_token``, ``bits_per_character`` and ``perplexity`` are computed from the NLL.

    Attributes:
        tokens: the texts ``[batch, pos]``.
        block_size: tokens per block, at most the length of the texts.
        counted: which positions have a likelihood ``[batch, pos]``: all but the given ones.
        nll_by_block: exact NLL of each block given the earlier ones, under the sampler
            ``[batch, block]``, nats.
        nelbo_by_block: exact NELBO of each block ``[batch, block]``, nats; at least the NLL.
        nelbo_by_rank: what each token adds to the NELBO when it is revealed as number ``rank`` of
            its block ``[batch, pos, rank]``, nats; sums over ranks and a block's tokens to the
            NELBO.
        order_posterior: probability, given the text, that the token was revealed as number
            ``rank`` of its block, 0 first ``[batch, pos, rank]``; over a block's tokens each rank
            sums to 1.
        characters: number of characters of all texts; None where ids were given.
        tokenizer: tokenizer of the model; None without one.
        trained_at: block sizes that the checkpoint was trained at, if the one asked for is none of
            them, which is off-distribution; else empty.
    """

    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    block_size: int
    counted: Bool[Tensor, "batch pos"] = field(repr=False)
    nll_by_block: Float[Tensor, "batch block"] = field(repr=False)
    nelbo_by_block: Float[Tensor, "batch block"] = field(repr=False)
    nelbo_by_rank: Float[Tensor, "batch pos rank"] = field(repr=False)
    order_posterior: Float[Tensor, "batch pos rank"] = field(repr=False)
    characters: int | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    trained_at: tuple[int, ...] = field(default=(), repr=False)

    @property
    def nll(self) -> Float[Tensor, " batch"]:
        """Exact negative log-likelihood of each text under the sampler, nats."""
        return self.nll_by_block.sum(-1)

    @property
    def nelbo(self) -> Float[Tensor, " batch"]:
        """Exact NELBO of each text, an upper bound on its NLL, nats."""
        return self.nelbo_by_block.sum(-1)

    @property
    def gap(self) -> Float[Tensor, " batch"]:
        """NELBO - NLL of each text, nats: KL(uniform orders || posterior); 0 at block size 1."""
        return self.nelbo - self.nll

    @property
    def nelbo_by_token(self) -> Float[Tensor, "batch pos"]:
        """What each token adds to the NELBO, nats; 0 where it is given."""
        return self.nelbo_by_rank.sum(-1)

    @property
    def expected_rank(self) -> Float[Tensor, "batch pos"]:
        """Mean rank at which each token was revealed in its block, given the text; 0 is first."""
        return self.order_posterior @ torch.arange(self.block_size, dtype=torch.float64)

    @property
    def total_nats(self) -> float:
        """Exact NLL of all texts, nats."""
        return float(self.nll.sum())

    @property
    def total_tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counted.sum())

    @property
    def total_characters(self) -> int | None:
        """Number of characters of the texts, if they were given as strings."""
        return self.characters

    def _figures(self) -> str:
        return (
            f"block_size={self.block_size}, nll={self.total_nats:.4f} nats, "
            f"nelbo={float(self.nelbo.sum()):.4f} nats, {of_tokens(self)}"
        )

    def word(self, row: int, position: int) -> str:
        """Return a token as text; its id without a tokenizer."""
        token = int(self.tokens[row, position])
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])

    def to_dict(self) -> dict[str, Any]:
        """Return all values but ``nelbo_by_rank`` as plain values for JSON, text by text."""
        texts = [
            {
                "tokens": [self.word(row, i) for i in range(self.tokens.shape[1])],
                "nll_nats": self.nll[row],
                "nelbo_nats": self.nelbo[row],
                "gap_nats": self.gap[row],
                "nll_nats_by_block": self.nll_by_block[row],
                "nelbo_nats_by_block": self.nelbo_by_block[row],
                "nelbo_nats_by_token": self.nelbo_by_token[row],
                "expected_rank": self.expected_rank[row],
                "order_posterior": self.order_posterior[row],
            }
            for row in range(len(self.tokens))
        ]
        values = {"block_size": self.block_size, "trained_at": self.trained_at}
        return plain_values(values | self.per_token() | {"texts": texts})


@torch.no_grad()
def exact(
    bridge: Bridge,
    tokens: Any,
    block_size: int | str | None = None,
    hooks: Any = None,
    *,
    scope: str = "active",
    sampler: Any = None,
    given: int = 1,
    max_states: int = 256,
    rows: int = 2048,
) -> Exact:
    """Compute the exact NLL, NELBO and order posterior of finished texts, without sampling.

    The NLL is that of what the first-hitting sampler writes (a sum over all reveal orders); the
    NELBO is the bound of Arriola et al., section 3, in closed form.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``. Position 0 is
            BOS, given and not counted; strings get it whatever ``cfg.default_prepend_bos`` is.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        hooks: TransformerLens's ``[(name or filter, fn), ...]``, which see noisy streams, all
            blocks at once, in batch rows of texts within mask patterns, each distinct one once;
            or ``StepHooks`` that select no steps, each with its own scope.
        scope: ``"active"``: the hooks edit the noisy stream alone, as an active step hook at every
            step does; ``"commit"``: also the clean stream, whose keys and values later blocks read.
        sampler: None or ``FirstHitting()``, the one sampler that has this likelihood.
        given: number of leading positions that are given (BOS and a prompt): never masked and not
            counted; 1 is BOS alone.
        max_states: largest number of mask patterns a block; more are refused.
        rows: largest number of positions in one pass, unless one text has more; the result does
            not depend on it beyond rounding. A position needs about ``(2 n_layers + 25) d_model``
            numbers: at the released size in float32, 2048 are 0.3 GB. With hooks a pass has whole
            texts and logits of all their masked positions too.

    Raises:
        InputError: for arguments that do not fit, or too many mask patterns.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: with time conditioning, in training mode with dropout, for another sampler,
            or where predictions are NaN.
    """
    bridge = read_bridge(bridge)
    limits = (max_states, rows, given)
    patterns = read_mask_patterns(bridge, tokens, block_size, hooks, scope, sampler, *limits)
    return sum_patterns(patterns, patterns.table())


def sum_patterns(patterns: MaskPatterns, table: Float[Tensor, "pattern batch pos"]) -> Exact:
    """Sum a table of log-probabilities over the mask patterns and reveal orders of each block."""
    passes = patterns.passes
    (batch, n), size = passes.tokens.shape, passes.block_size
    by_block = torch.zeros(2, batch, -(-n // size), dtype=torch.float64)
    by_rank = torch.zeros(2, batch, n, size, dtype=torch.float64)
    for at, _, orders in patterns.reveal_orders(table):
        shape, block = (batch, len(at)), at[:, 0] // size
        bound = orders.by_rank(-orders.bound_weights() * orders.log_p)
        by_block[0][:, block] = -orders.log_f()[:, -1].view(shape)
        by_block[1][:, block] = bound.sum((-1, -2)).view(shape)
        for kept, terms in zip(by_rank, (bound, orders.by_rank(orders.gamma())), strict=True):
            kept[:, at, : orders.k] = terms.view(*shape, orders.k, orders.k)
    return Exact(
        tokens=passes.tokens,
        block_size=size,
        counted=passes.counted,
        nll_by_block=by_block[0],
        nelbo_by_block=by_block[1],
        nelbo_by_rank=by_rank[0],
        order_posterior=by_rank[1],
        characters=None if passes.characters is None else sum(passes.characters),
        tokenizer=passes.bridge.tokenizer,
        trained_at=passes.trained_at,
    )
