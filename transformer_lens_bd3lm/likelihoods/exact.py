"""Exact likelihoods, orders and effects: sums over masked states instead of samples.

A block with k maskable tokens has ``2^k - 1`` masked states. Write ``p(x_i | R)`` for the network's
probability of the true token at i when R is revealed, the rest of the block masked, and all earlier
blocks clean. First hitting reveals in a uniformly random order, so the probability of a block is a
mixture over orders, which a dynamic program over subsets sums::

    F({}) = 1,   F(S) = sum_{i in S} F(S - i) p(x_i | S - i) / (k - |S| + 1),   p(x) = F(all)
    G(all) = 1,  G(R) = sum_{i not in R} p(x_i | R) G(R + i) / (k - |R|)

    gamma(R, i) = F(R) p(x_i | R) G(R + i) / ((k - |R|) p(x))       posterior of revealing i from R
    grad log p(x) = sum gamma(R, i) grad log p(x_i | R)

This is the likelihood of what the model *writes*. The NELBO (Arriola et al., section 3) is the mean
over all orders of the log, so a bound; its integral over t has a closed form::

    NELBO = sum_m 1/m * mean_{|M| = m} sum_{i in M} -log p(x_i | not M)
    NELBO - NLL = KL(uniform over orders || posterior over orders)

The clean stream never sees noise: its keys and values are computed once, and pattern number j runs
in all blocks of a text at once. All of this needs c constant and the model's own sampler.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge, require_bridge
from transformer_lens_bd3lm.bridge.kv_cache import CleanStream
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.denoising.samplers import FirstHitting
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.masked_passes import NoisyText, read_noisy_text
from transformer_lens_bd3lm.likelihoods.statistics import PerToken, of_tokens


@dataclass(frozen=True, repr=False)
class Exact(PerToken):
    """Sums over every masked state of every block of some texts, in nats.

    Figures a token and a character are those of the NLL.

    Attributes:
        tokens: the texts ``[batch, pos]``.
        block_size: the dial.
        counted: positions that have a likelihood ``[batch, pos]``: all but those given.
        nll_by_block: exact NLL of the sampler ``[batch, block]``, given the blocks before.
        nelbo_by_block: exact NELBO ``[batch, block]``; at least the NLL.
        nelbo_by_rank: what each token adds to the NELBO when it is revealed as number ``rank`` of
            its block ``[batch, pos, rank]``; sums over ranks and a block's tokens to the NELBO.
        order_posterior: probability, given the text, that the token was revealed as number ``rank``
            ``[batch, pos, rank]``; over a block's tokens each rank sums to 1.
        characters: of all texts; None where ids were given.
    """

    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    block_size: int
    counted: Bool[Tensor, "batch pos"] = field(repr=False)
    nll_by_block: Float[Tensor, "batch block"] = field(repr=False)
    nelbo_by_block: Float[Tensor, "batch block"] = field(repr=False)
    nelbo_by_rank: Float[Tensor, "batch pos rank"] = field(repr=False)
    order_posterior: Float[Tensor, "batch pos rank"] = field(repr=False)
    characters: int | None = field(default=None, repr=False)

    @property
    def nll(self) -> Float[Tensor, " batch"]:
        """Exact negative log-likelihood of each text under the sampler, nats."""
        return self.nll_by_block.sum(-1)

    @property
    def nelbo(self) -> Float[Tensor, " batch"]:
        """The exactly computed bound on it, nats."""
        return self.nelbo_by_block.sum(-1)

    @property
    def gap(self) -> Float[Tensor, " batch"]:
        """NELBO - NLL, nats: KL from uniform orders to the orders' posterior; 0 at block size 1."""
        return self.nelbo - self.nll

    @property
    def nelbo_by_token(self) -> Float[Tensor, "batch pos"]:
        """What each token adds to the NELBO, nats; 0 at BOS."""
        return self.nelbo_by_rank.sum(-1)

    @property
    def total_nats(self) -> float:
        """Exact NLL of all texts, nats."""
        return float(self.nll.sum())

    @property
    def total_tokens(self) -> int:
        """Tokens counted."""
        return int(self.counted.sum())

    @property
    def total_characters(self) -> int | None:
        """Characters of the texts, if they were given as strings."""
        return self.characters

    def __repr__(self) -> str:
        return (
            f"Exact(block_size={self.block_size}, nll={self.total_nats:.4f} nats, "
            f"nelbo={float(self.nelbo.sum()):.4f} nats, {of_tokens(self)})"
        )


@dataclass(frozen=True)
class Orders:
    """The dynamic program over blocks with k maskable places each.

    Attributes:
        log_p: ``log p(x_i | R)`` for every set R of revealed places, a bit mask, and place i
            outside it ``[block, 2^k, k]``, nats; anything where i is in R.
    """

    log_p: Float[Tensor, "block set place"]

    @property
    def k(self) -> int:
        """Maskable places."""
        return self.log_p.shape[-1]

    def sets(self, size: int) -> tuple[Int[Tensor, " level"], Int[Tensor, "level member"]]:
        """All sets of so many places, and the members of each."""
        numbers = torch.arange(2**self.k)
        bits = (numbers[:, None] >> torch.arange(self.k)) & 1
        chosen = numbers[bits.sum(-1) == size]
        return chosen, bits[chosen].nonzero()[:, 1].view(len(chosen), size)

    def forward(self) -> Float[Tensor, "block set"]:
        """``log F``, nats: of having revealed exactly this set."""
        log_f = torch.zeros_like(self.log_p[..., 0])
        for size in range(1, self.k + 1):
            sets, members = self.sets(size)
            before = sets[:, None] ^ (1 << members)
            terms = log_f[:, before] + self.log_p[:, before, members]
            log_f[:, sets] = terms.logsumexp(-1) - math.log(self.k - size + 1)
        return log_f

    def backward(self) -> Float[Tensor, "block set"]:
        """``log G``, nats: of revealing the rest from here."""
        log_g = torch.zeros_like(self.log_p[..., 0])
        everything = 2**self.k - 1
        for left in range(1, self.k + 1):
            missing_sets, missing = self.sets(left)
            sets = everything ^ missing_sets
            after = sets[:, None] | (1 << missing)
            terms = log_g[:, after] + self.log_p[:, sets[:, None], missing]
            log_g[:, sets] = terms.logsumexp(-1) - math.log(left)
        return log_g

    def free(self) -> Bool[Tensor, "set place"]:
        """Which places are still masked at a set."""
        return ((torch.arange(2**self.k)[:, None] >> torch.arange(self.k)) & 1) == 0

    def gamma(self) -> Float[Tensor, "block set place"]:
        """Posterior, given the text, of being at R and revealing i next; 0 where i is in R."""
        log_f, log_g, free = self.forward(), self.backward(), self.free()
        after = torch.arange(2**self.k)[:, None] | (1 << torch.arange(self.k))
        left = free.sum(-1, keepdim=True).clamp(min=1).double()
        path = log_f[..., None] + self.log_p + log_g[:, after] - left.log()
        return (path - log_f[:, -1:, None]).exp().masked_fill(~free, 0.0)

    def bound_weights(self) -> Float[Tensor, "set place"]:
        """``1 / (m C(k, m))`` of each NELBO term, m places still masked; 0 where i is in R."""
        free = self.free()
        m = free.sum(-1).tolist()
        weights = torch.tensor(
            [1 / (n * math.comb(self.k, n)) if n else 0.0 for n in m], dtype=torch.float64
        )
        return weights[:, None] * free

    def by_rank(self, terms: Float[Tensor, "block set place"]) -> Float[Tensor, "block place rank"]:
        """Terms of all sets of one size together: rank r is revealing from r revealed places."""
        ranks = torch.stack([terms[:, self.sets(size)[0]].sum(1) for size in range(self.k)], -1)
        return ranks


def pattern_numbers(places: Int[Tensor, " place"]) -> Int[Tensor, " set"]:
    """Which pattern masks the complement of each set of revealed places: bit i is place i."""
    k = len(places)
    hidden = (2**k - 1) ^ torch.arange(2**k)
    return (((hidden[:, None] >> torch.arange(k)) & 1) << places).sum(-1)


@dataclass(frozen=True)
class States:
    """Every masked state of some texts: pattern j hides bit i of j at place i of every block."""

    text: NoisyText

    @property
    def count(self) -> int:
        """Patterns, the empty one included."""
        return 2**self.text.block_size

    def masked(self, numbers: Int[Tensor, " pattern"]) -> Bool[Tensor, "pattern batch pos"]:
        """Which positions these patterns mask; never BOS."""
        batch, n = self.text.tokens.shape
        place = torch.arange(n) % self.text.block_size
        masked = ((numbers[:, None] >> place) & 1).bool() & self.text.counted[0]
        return masked[:, None].expand(-1, batch, -1)

    def passes(
        self, stream: CleanStream
    ) -> Iterator[tuple[Int[Tensor, " pattern"], Float[Tensor, "pattern batch pos"]]]:
        """All patterns but the empty one, and ``log p`` of the true tokens that each masks."""
        for numbers in torch.arange(1, self.count).split(self.text.together):
            yield numbers, self.text.log_p(stream, self.masked(numbers))

    def table(self, stream: CleanStream) -> Float[Tensor, "pattern batch pos"]:
        """``log p`` of the true tokens under every pattern, nats; 0 where it masks nothing."""
        nothing = torch.zeros(1, *self.text.tokens.shape, dtype=torch.float64)
        return torch.cat([nothing, *(log_p for _, log_p in self.passes(stream))])

    def groups(self) -> Iterator[tuple[Int[Tensor, "block place"], Int[Tensor, " place"]]]:
        """Blocks with the same maskable places: their positions, and those places."""
        size, found = self.text.block_size, {}
        for start in range(0, self.text.tokens.shape[1], size):
            places = tuple(self.text.counted[0, start : start + size].nonzero()[:, 0].tolist())
            if places:
                found.setdefault(places, []).append(start)
        for places, starts in found.items():
            yield torch.tensor(starts)[:, None] + torch.tensor(places), torch.tensor(places)

    def orders(
        self, table: Float[Tensor, "pattern batch pos"]
    ) -> Iterator[tuple[Int[Tensor, "block place"], Int[Tensor, " place"], Orders]]:
        """The dynamic program of each group of blocks, whose rows are ``batch x block``."""
        for at, places in self.groups():
            log_p = table[pattern_numbers(places)][:, :, at]
            yield at, places, Orders(log_p.permute(1, 2, 0, 3).flatten(0, 1))


def read_states(
    bridge: Any,
    tokens: Any,
    block_size: int | str | None,
    hooks: Any,
    scope: str,
    sampler: Any,
    max_states: int,
    rows: int,
    given: int,
) -> States:
    """Read at the door what :func:`exact` was given; nothing has been run then.

    Raises:
        InputError: for what does not fit, or too many states.
        NotExactError: where the sum would not be the likelihood of the sampler.
    """
    if sampler is not None and sampler != FirstHitting():
        raise NotExactError(
            f"{sampler!r}: the sum is over uniform orders and the model's own probabilities, which "
            "FirstHitting() with temperature 1 and no nucleus draws from; no likelihood of this "
            "sampler is known"
        )
    text = read_noisy_text(bridge, tokens, block_size, hooks, scope, rows, given)
    size = text.block_size
    if 2**size > max_states:
        raise InputError(
            f"block_size={size} has {2**size} states a block, max_states is {max_states}: raise "
            "it, or estimate the bound"
        )
    return States(text)


@torch.no_grad()
def exact(
    bridge: Any,
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
    """Exact NLL, NELBO and order posterior of finished texts, with no sampling error.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``; position 0 is
            BOS, given and not counted.
        block_size: the dial; the bridge's by default.
        hooks: TransformerLens's ``[(name or filter, fn), ...]``; they see the noisy stream's rows,
            all blocks at once. Or ``StepHooks`` that select no steps, each with its own scope.
        scope: ``"active"`` edits the noisy stream alone, as an active step hook at every step
            would; ``"commit"`` also the clean stream, whose keys and values later blocks read.
        sampler: only ``FirstHitting()`` has this likelihood.
        given: leading positions that are given, a prompt say: never masked and not counted; 1 is
            BOS alone.
        max_states: refuse more states a block than this.
        rows: rows of a pass; memory grows with it.

    Raises:
        InputError: for what does not fit, or too many states.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: with time conditioning, or for another sampler.
    """
    bridge = read_bridge(bridge)
    limits = (max_states, rows, given)
    states = read_states(bridge, tokens, block_size, hooks, scope, sampler, *limits)
    return summed(states, states.table(states.text.clean()))


def summed(states: States, table: Float[Tensor, "pattern batch pos"]) -> Exact:
    """All the sums over a table of log-probabilities."""
    (batch, n), size = states.text.tokens.shape, states.text.block_size
    by_block = torch.zeros(2, batch, -(-n // size), dtype=torch.float64)
    by_rank = torch.zeros(2, batch, n, size, dtype=torch.float64)
    for at, _, orders in states.orders(table):
        shape, block = (batch, len(at)), at[:, 0] // size
        bound = orders.by_rank(-orders.bound_weights() * orders.log_p)
        by_block[0][:, block] = -orders.forward()[:, -1].view(shape)
        by_block[1][:, block] = bound.sum((-1, -2)).view(shape)
        for kept, terms in zip(by_rank, (bound, orders.by_rank(orders.gamma())), strict=True):
            kept[:, at, : orders.k] = terms.view(*shape, orders.k, orders.k)
    text = states.text
    characters = None if text.characters is None else sum(text.characters)
    return Exact(text.tokens, size, text.counted, *by_block, *by_rank, characters)


@dataclass(frozen=True, repr=False)
class ExactEffect:
    """What an edit does to the likelihood of texts, over every order, with no sampling error.

    Attributes:
        base: the sums without the edit.
        edited: the sums with it.
    """

    base: Exact
    edited: Exact

    @property
    def log_p(self) -> Float[Tensor, " batch"]:
        """Change of log p(text), nats; negative where the edit makes the text less likely."""
        return self.base.nll - self.edited.nll

    @property
    def log_p_by_block(self) -> Float[Tensor, "batch block"]:
        """The same for each block given the blocks before, nats."""
        return self.base.nll_by_block - self.edited.nll_by_block

    def __repr__(self) -> str:
        return (
            f"ExactEffect(log_p={float(self.log_p.sum()):+.4f} nats, nll "
            f"{self.base.total_nats:.4f} to {self.edited.total_nats:.4f} nats, "
            f"{of_tokens(self.base)})"
        )


def exact_effect(bridge: Any, tokens: Any, hooks: Any, **how: Any) -> ExactEffect:
    """The causal effect of an edit on log p(text); arguments and errors as :func:`exact`."""
    bridge = read_bridge(bridge)
    pass_hooks = read_pass_hooks(bridge, hooks, how.pop("scope", "active"))
    return ExactEffect(
        exact(bridge, tokens, hooks=None, **how), exact(bridge, tokens, hooks=pass_hooks, **how)
    )


def exact_backward(
    bridge: Any,
    tokens: Any,
    block_size: int | str | None = None,
    hooks: Any = None,
    *,
    scope: str = "active",
    given: int = 1,
    max_states: int = 256,
    rows: int = 2048,
) -> Exact:
    """Add the gradient of the texts' exact NLL to every parameter's ``.grad``.

    ``grad log p(x) = sum gamma(R, i) grad log p(x_i | R)``: the weights come from one enumeration
    without gradients, then each pass is run again and let go, so memory does not grow with the
    number of states. Arguments and errors as :func:`exact`, of a bridge that was booted before;
    gradients also flow into what the hooks close over.

    Raises:
        InputError: under ``torch.inference_mode``, where there are no gradients.
    """
    require_bridge(bridge)
    if torch.is_inference_mode_enabled():
        raise InputError(
            "exact_backward was called under torch.inference_mode, where no gradient can be "
            "computed: call it outside"
        )
    limits = (max_states, rows, given)
    states = read_states(bridge, tokens, block_size, hooks, scope, None, *limits)
    with torch.no_grad():
        table = states.table(states.text.clean())
        found, weights = summed(states, table), torch.zeros_like(table)
        for at, places, orders in states.orders(table):
            numbers = pattern_numbers(places)[:, None, None]
            gamma = orders.gamma().unflatten(0, (len(table[0]), len(at)))
            weights[numbers, :, at[None]] = gamma.permute(2, 1, 3, 0)
    with torch.enable_grad():
        stream = states.text.clean()
        leaves = stream.leaves()
        for numbers, log_p in states.passes(leaves):
            (-(weights[numbers] * log_p).sum()).backward()
        stream.backward(leaves)
    return found
