"""What a reveal order costs: log p of a text under one order, against all orders of its blocks.

Under one order pi the probability of a block of k masked tokens is a product along the order, by
the chain rule (arXiv 2606.00997); a model that is trained on masks gives each order its own::

    -log p(x | pi) = sum_i -log p(x_pi(i) | x_pi(1) .. x_pi(i-1))

    NELBO = mean over uniform orders of -log p(x | pi)
    NLL   = -log mean over uniform orders of p(x | pi)
    p(pi | x) = p(x | pi) / (k! p(x))                              posterior of the order

One table of log p(x_i | R) over all sets R of a block's tokens holds every order: it is computed
once, with ``exact``'s passes. Of a block with many orders some are drawn; the bounds stay exact.

It does not say in which order a run was written: under first hitting and ancestral sampling that is
drawn beforehand, uniformly and whatever the model predicts.
"""

import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.masked_predictions import read_finished, require_masks
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int, is_int, read_several
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.exact import Exact, sum_patterns
from transformer_lens_bd3lm.likelihoods.mask_patterns import MaskPatterns, read_mask_patterns
from transformer_lens_bd3lm.likelihoods.reveal_orders import RevealOrders
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

NAMES = ("left_to_right", "right_to_left", "confidence")


@dataclass(frozen=True, kw_only=True, repr=False)
class OrderCost(Result):
    """Negative log-likelihoods of texts under given reveal orders, and over all orders, in nats.

    Attributes:
        model: the checkpoint's name.
        exact: exact NLL, NELBO and order posterior of the texts.
        names: names of the given orders.
        ranks: place of each token in its block's order ``[order, batch, pos]``, 0 first; -1 where
            a token is not counted.
        nats_by_block: -log p of each block under each given order ``[order, batch, block]``, nats.
        orders_by_block: -log p of each block under all of its orders, or drawn ones
            ``[batch, block, draw]``, nats; NaN beyond the number of its orders.
        kind: ``"exact"`` if all orders of every block are in ``orders_by_block``, else
            ``"estimate"``: some are drawn, uniformly. All else in this result is exact.
        effects: given order minus the mean over orders, nats a token ``[order]``: mean over texts,
            with intervals over whole texts. Below 0 the order is better than a random one.
        contract: what was measured.
    """

    model: str
    exact: Exact = field(repr=False)
    names: tuple[str, ...]
    ranks: Int[Tensor, "order batch pos"] = field(repr=False)
    nats_by_block: Float[Tensor, "order batch block"] = field(repr=False)
    orders_by_block: Float[Tensor, "batch block draw"] = field(repr=False)
    kind: Literal["exact", "estimate"]
    effects: Effects = field(repr=False)
    contract: Contract = field(repr=False)

    @property
    def nats(self) -> Float[Tensor, "order batch"]:
        """-log p of each text under each given order, nats."""
        return self.nats_by_block.sum(-1)

    @property
    def log_posterior_by_block(self) -> Float[Tensor, "order batch block"]:
        """Log of the posterior of each given order in each block, over that of a uniform order."""
        return self.exact.nll_by_block - self.nats_by_block

    @property
    def spread(self) -> Float[Tensor, "batch block"]:
        """Standard deviation of -log p over a block's orders, nats; 0 where there is one."""
        mean = self.orders_by_block.nanmean(-1, keepdim=True)
        return (self.orders_by_block - mean).square().nanmean(-1).sqrt()

    @property
    def title(self) -> str:
        """Model and block size."""
        return f"{self.model}: cost of a reveal order at block size {self.exact.block_size}"

    def _figures(self) -> str:
        costs = ", ".join(f"{name} {self.effects.text(i)}" for i, name in enumerate(self.names))
        return f"less a random order, nats/token: {costs}, {count(len(self.ranks[0]), 'text')}"

    def to_dict(self) -> dict[str, Any]:
        """Return all costs, and the exact likelihoods, as plain values for JSON."""
        values = {
            "model": self.model,
            "orders": self.names,
            "kind": self.kind,
            "nats_by_block": self.nats_by_block,
            "log_posterior_over_uniform_by_block": self.log_posterior_by_block,
            "spread_nats_by_block": self.spread,
            "against_random_nats_per_token": self.effects.to_dict(),
            "exact": self.exact.to_dict(),
            "contract": vars(self.contract),
        }
        return plain_values(values)


@torch.no_grad()
def order_cost(
    bridge: Bridge,
    texts: Any,
    orders: Any = ("left_to_right", "right_to_left"),
    *,
    block_size: int | str | None = None,
    hooks: Any = None,
    draws: int = 1000,
    seed: int = 0,
    given: int = 1,
    max_states: int = 256,
    rows: int = 2048,
) -> OrderCost:
    """Compute -log p of texts under given reveal orders, and its spread over all orders.

    Exact for the texts, from one pass over every mask pattern of a block (chain rule: arXiv
    2606.00997).

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        texts: a string, strings of equally many tokens, or ids ``[batch, pos]``; position 0 is BOS.
        orders: an order or several: ``"left_to_right"``, ``"right_to_left"``, ``"confidence"`` (the
            position whose likeliest token is most probable, next), or a sequence of all counted
            positions, first revealed first. Blocks go from left to right in any order.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        hooks: hooks of the passes, as in :func:`exact`; not with ``"confidence"``.
        draws: number of orders drawn for a block that has more of them, to show their spread.
        seed: random seed of the draws.
        given: number of leading positions that are given and not counted; 1 is BOS alone.
        max_states: largest number of mask patterns a block; more are refused.
        rows: largest number of positions in one pass, as in :func:`exact`.

    Raises:
        InputError: for arguments that do not fit, too many mask patterns, and the autoregressive
            baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
        CheckpointError: for a name whose checkpoint cannot be loaded.
    """
    bridge = read_bridge(bridge)
    require_masks(bridge)
    check_int("draws", draws, 1)
    check_int("seed", seed, 0, 2**63 - 1)
    limits = (max_states, rows, given, "texts")
    patterns = read_mask_patterns(bridge, texts, block_size, hooks, "active", None, *limits)
    counted = patterns.passes.counted
    names, positions = _read_orders(orders, counted[0].nonzero()[:, 0].tolist())
    if "confidence" in names and hooks is not None:
        raise InputError(
            'orders="confidence" with hooks: the order would be that of the model without them; '
            "set the hooks on the bridge, with bridge.hooks(...), or give the order as positions"
        )
    table = patterns.table()
    size = patterns.passes.block_size
    by_name = [
        _by_confidence(bridge, patterns, given, rows)
        if name == "confidence"
        else _in_blocks(torch.tensor(order), counted.shape[0], counted.shape[1], size)
        for name, order in zip(names, positions, strict=True)
    ]
    ranks = torch.stack(by_name)
    result = sum_patterns(patterns, table)
    nats, spread, all_orders = _along(patterns, table, ranks, draws, seed)
    per_token = (nats.sum(-1) - result.nelbo) / counted.sum(-1)
    return OrderCost(
        model=Path(bridge.cfg.model_name).name,
        exact=result,
        names=names,
        ranks=ranks,
        nats_by_block=nats,
        orders_by_block=spread,
        kind="exact" if all_orders else "estimate",
        effects=mean_effects(per_token.T),
        contract=Contract(
            target="-log p of a text under one reveal order, minus its mean over uniform orders "
            "(the NELBO); nats a token",
            edited="the order in which the tokens of a block are revealed",
            fixed="the text; blocks go from left to right",
            masks="every mask pattern along an order; earlier blocks are clean",
        ),
    )


def _read_orders(orders: Any, counted: list[int]) -> tuple[tuple[str, ...], list[list[int]]]:
    """Return the name of each order, and its positions, first revealed first.

    Raises:
        InputError: for an unknown name, positions that are not all counted ones, once each, and
            anything else.
    """
    rule = f"give {', '.join(NAMES)}, or lists of positions, first revealed first"
    several = [orders] if isinstance(orders, str) else read_several("orders", orders, rule)
    if several and all(is_int(x) for x in several):
        several = [several]
    if not several:
        raise InputError(f"orders=(): give one of {', '.join(NAMES)}, or positions")
    names, positions = [], []
    for number, order in enumerate(several):
        if isinstance(order, str):
            check_choice("orders", order, NAMES)
            names.append(order)
            positions.append(counted[::-1] if order == "right_to_left" else counted)
            continue
        order = read_several(f"orders[{number}]", order, rule)
        if not all(is_int(x) for x in order) or sorted(order) != counted:
            raise InputError(
                f"orders[{number}] has {len(order)} positions {order[:8]}: give each counted "
                f"position once, {counted[0]}..{counted[-1]}, first revealed first"
            )
        names.append(f"order {number}")
        positions.append(order)
    return tuple(names), positions


def _in_blocks(
    order: Int[Tensor, " counted"], batch: int, n: int, size: int
) -> Int[Tensor, "batch pos"]:
    """Return the place of each position in its block's order; -1 where it is not in the order."""
    time, ranks = torch.full((n,), n), torch.full((n,), -1)
    time[order] = torch.arange(len(order))
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        ranks[block] = time[block].argsort().argsort()
    return ranks.masked_fill(time == n, -1).expand(batch, n)


def _by_confidence(
    bridge: Bridge, patterns: MaskPatterns, given: int, rows: int
) -> Int[Tensor, "batch pos"]:
    """Return the ranks that reveal the position with the most probable token next, in each block.

    The true token is revealed there, so that the order is one of the text.
    """
    passes = patterns.passes
    size = passes.block_size
    of_bridge = size if bridge.original_model.config.cross_attn else None
    texts = read_finished(bridge, passes.tokens, of_bridge, given, rows)
    ranks = torch.full(passes.tokens.shape, -1)
    for part in texts.parts(len(ranks)):
        number = torch.arange(part.start, part.stop, device=texts.tokens.device)
        masked, order = texts.counted[part].clone(), ranks[part]
        for rank in range(size):
            hidden = masked.to(texts.tokens.device)
            x_t = texts.tokens[part].masked_fill(hidden, bridge.cfg.mask_token_id)
            sure = texts.log_probs(x_t, number).amax(-1).cpu().double().exp()
            score = texts.by_block(torch.where(masked, sure, -1.0) + 1.0)
            best = score.max(-1)
            row, block = (best.values > 0).nonzero().unbind(-1)
            position = block * size + best.indices[row, block]
            order[row, position] = rank
            masked[row, position] = False
            if not bool(masked.any()):
                break
    return ranks


def _along(
    patterns: MaskPatterns,
    table: Float[Tensor, "pattern batch pos"],
    ranks: Int[Tensor, "order batch pos"],
    draws: int,
    seed: int,
) -> tuple[Float[Tensor, "order batch block"], Float[Tensor, "batch block draw"], bool]:
    """Sum the table along given orders, and along all or drawn orders of each block."""
    (batch, n), size = patterns.passes.tokens.shape, patterns.passes.block_size
    blocks = -(-n // size)
    nats = torch.zeros(len(ranks), batch, blocks, dtype=torch.float64)
    width = min(math.factorial(min(size, 20)), draws)
    spread = torch.full((batch, blocks, width), torch.nan, dtype=torch.float64)
    generator, everything = torch.Generator().manual_seed(seed), True
    for at, places, sums in patterns.reveal_orders(table):
        block, k = at[:, 0] // size, len(places)
        if math.factorial(k) <= draws:
            orders = torch.tensor(list(itertools.permutations(range(k))))
        else:
            everything = False
            orders = torch.rand(draws, k, generator=generator).argsort(-1)
        costs = along_orders(sums, orders.expand(len(sums.log_p), -1, -1))
        spread[:, block, : len(orders)] = costs.view(batch, len(at), -1)
        own = ranks[:, :, at].argsort(-1).permute(1, 2, 0, 3).flatten(0, 1)
        costs = along_orders(sums, own).view(batch, len(at), -1)
        nats[:, :, block] = costs.permute(2, 0, 1)
    return nats, spread, everything


def along_orders(
    sums: RevealOrders, orders: Int[Tensor, "block order place"]
) -> Float[Tensor, "block order"]:
    """Sum -log p of each block along orders of its places, nats.

    Args:
        sums: ``log p(x_i | R)`` for every set R of each block's places.
        orders: places of each order, first revealed first.
    """
    total = torch.zeros(orders.shape[:2], dtype=torch.float64)
    revealed = torch.zeros_like(orders[..., 0])
    number = torch.arange(len(orders))[:, None]
    for place in orders.unbind(-1):
        total -= sums.log_p[number, revealed, place]
        revealed = revealed | (1 << place)
    return total
