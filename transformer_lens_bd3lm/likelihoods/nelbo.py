"""The NELBO of finished texts: exact, or estimated, each by its name.

The NELBO of a block of k maskable tokens (Arriola et al., section 3) is an integral over t of the
loss of a random mask, each token masked with probability t, at weight 1/t. It is computed in one of
three ways::

    exact        sum over all 2^k - 1 mask patterns, in closed form                  no error
    stratified   sum_m 1/m * sum_{i in M} -log p(x_i | not M), one random |M| = m    unbiased
    monte_carlo  one t a block, one mask, weight 1/t                                 unbiased

Draws of one replicate depend on each other; standard errors come from independent replicates. How
masks are drawn, and what ``clip`` and ``strata`` mean, is in ``mask_draws``.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.exact import sum_patterns
from transformer_lens_bd3lm.likelihoods.mask_draws import Clip, monte_carlo, stratified
from transformer_lens_bd3lm.likelihoods.mask_patterns import read_mask_patterns
from transformer_lens_bd3lm.likelihoods.masked_passes import MaskedPasses, read_masked_passes
from transformer_lens_bd3lm.likelihoods.statistics import Nats
from transformer_lens_bd3lm.result import plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class Nelbo(Nats):
    """NELBO of texts, exact or estimated, in nats.

    Attributes:
        method: ``"exact"``, ``"stratified"`` or ``"monte_carlo"``.
        tokens: the texts ``[batch, pos]``.
        block_size: tokens per block, at most the length of the texts.
        counted: which positions have a likelihood ``[batch, pos]``: all but the given ones.
        by_token: what each token adds ``[batch, pos]``, nats, mean over replicates.
    """

    method: str
    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    block_size: int
    counted: Bool[Tensor, "batch pos"] = field(repr=False)
    by_token: Float[Tensor, "batch pos"] = field(repr=False)

    def _figures(self) -> str:
        return f"block_size={self.block_size}, {self.method}: {self.figures()}"

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values for JSON, and the nats of each text and token."""
        values = {
            "method": self.method,
            "block_size": self.block_size,
            "nats_by_token": self.by_token,
        }
        return plain_values(values) | super().to_dict()


def check_choices(method: str, strata: str, clip: Clip | None, replicates: int, seed: int) -> None:
    """Check the method and its options.

    Raises:
        InputError: for an unknown method, or options that it does not have.
    """
    check_choice("method", method, ("exact", "stratified", "monte_carlo"))
    check_choice("strata", strata, ("permuted", "none", "public"))
    if method != "monte_carlo" and (clip is not None or strata != "permuted"):
        raise InputError(f'clip and strata are options of method="monte_carlo", not of {method!r}')
    if method != "exact" and replicates < 2:
        raise InputError(f"replicates={replicates}: a standard error needs at least 2")
    if seed < 0:
        raise InputError(f"seed={seed}: give 0 or more")


@torch.no_grad()
def nelbo(
    bridge: Bridge,
    tokens: Any,
    block_size: int | str | None = None,
    method: str = "exact",
    *,
    replicates: int = 8,
    seed: int = 0,
    strata: str = "permuted",
    clip: Clip | None = None,
    hooks: Any = None,
    scope: str = "active",
    given: int = 1,
    max_states: int = 256,
    rows: int = 2048,
) -> Nelbo:
    """Compute or estimate the NELBO of finished texts (Arriola et al., section 3).

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``, as in
            :func:`exact`; position 0 is BOS, given and not counted.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        method: ``"exact"`` sums over all mask patterns; ``"stratified"`` draws one pattern of m
            masks for every number m; ``"monte_carlo"`` draws one time t and one mask per block.
        replicates: number of independent estimates, at least 2; without effect if exact.
        seed: random seed of the mask draws.
        strata: how Monte Carlo draws t. [0, 1] is cut into one stratum per block, and each block
            draws from one: ``"permuted"`` assigns them at random; ``"public"`` gives the j-th block
            the j-th, as the public code does, which is biased. ``"none"`` draws from [0, 1].
        clip: restriction of Monte Carlo's draws, a :class:`Clip`; biased.
        hooks: TransformerLens's ``[(name or filter, fn), ...]`` or ``StepHooks``, as in
            :func:`exact`.
        scope: how far they reach, as in :func:`exact`.
        given: number of leading positions that are given, as in :func:`exact`.
        max_states: largest number of mask patterns of the exact sum, as in :func:`exact`.
        rows: largest number of positions in one pass, as in :func:`exact`.

    Raises:
        InputError: for arguments that do not fit.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
    """
    check_choices(method, strata, clip, replicates, seed)
    bridge = read_bridge(bridge)
    if method == "exact":
        limits = (max_states, rows, given)
        patterns = read_mask_patterns(bridge, tokens, block_size, hooks, scope, None, *limits)
        sums = sum_patterns(patterns, patterns.table())
        return _result(patterns.passes, method, "exact", sums.nelbo_by_token, sums.nelbo[None])
    passes = read_masked_passes(bridge, tokens, block_size, hooks, scope, rows, given)
    generator = torch.Generator().manual_seed(seed)
    if method == "stratified":
        draws = [stratified(passes, generator) for _ in range(replicates)]
    else:
        draws = [monte_carlo(passes, generator, strata, clip) for _ in range(replicates)]
    owner = torch.arange(replicates).repeat_interleave(len(draws[0].masked))
    masked, weight = (
        torch.cat(x) for x in zip(*((m.masked, m.weight) for m in draws), strict=True)
    )
    by_token = torch.zeros(replicates, *passes.tokens.shape, dtype=torch.float64)
    by_token.index_add_(0, owner, -weight * passes.log_probs(masked))
    kind = "biased" if clip is not None or strata == "public" else "estimate"
    return _result(passes, method, kind, by_token.mean(0), by_token.sum(-1))


def _result(
    passes: MaskedPasses,
    method: str,
    kind: Literal["exact", "estimate", "biased"],
    by_token: Float[Tensor, "batch pos"],
    replicates: Float[Tensor, "replicate batch"],
) -> Nelbo:
    """Return the result of these passes."""
    characters = None if passes.characters is None else torch.tensor(passes.characters)
    return Nelbo(
        kind=kind,
        replicates=replicates,
        token_counts=passes.counted.sum(-1),
        characters=characters,
        method=method,
        tokens=passes.tokens,
        block_size=passes.block_size,
        counted=passes.counted,
        by_token=by_token,
    )
