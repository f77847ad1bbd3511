"""Effects of edits on exact likelihoods, and the gradient of an exact likelihood.

An edit by hooks changes log p(text) by the difference of two exact sums. The gradient needs no
graph of the sums, since with the posterior gamma of ``reveal_orders``::

    grad log p(x) = sum_{R, i} gamma(R, i) grad log p(x_i | R)
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge, require_bridge
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.likelihoods.exact import Exact, exact, sum_patterns
from transformer_lens_bd3lm.likelihoods.mask_patterns import pattern_numbers, read_mask_patterns
from transformer_lens_bd3lm.likelihoods.statistics import of_tokens
from transformer_lens_bd3lm.result import Result, plain_values


@dataclass(frozen=True, repr=False)
class ExactEffect(Result):
    """Change of the exact likelihood of texts that an edit causes.

    Attributes:
        base: exact likelihoods without the edit.
        edited: exact likelihoods with the edit.
    """

    base: Exact
    edited: Exact

    @property
    def log_p(self) -> Float[Tensor, " batch"]:
        """Change of log p(text) of each text, nats; below 0 where the edit makes it less likely."""
        return self.base.nll - self.edited.nll

    @property
    def log_p_by_block(self) -> Float[Tensor, "batch block"]:
        """Change of log p of each block given the earlier ones, nats."""
        return self.base.nll_by_block - self.edited.nll_by_block

    def _figures(self) -> str:
        return (
            f"log_p={float(self.log_p.sum()):+.4f} nats, nll {self.base.total_nats:.4f} to "
            f"{self.edited.total_nats:.4f} nats, {of_tokens(self.base)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the changes, and both likelihoods, as plain values for JSON."""
        values = {
            "log_p_change_nats": self.log_p,
            "log_p_change_nats_by_block": self.log_p_by_block,
            "base": self.base.to_dict(),
            "edited": self.edited.to_dict(),
        }
        return plain_values(values)


def exact_effect(bridge: Bridge, tokens: Any, hooks: Any, **options: Any) -> ExactEffect:
    """Compute the causal effect of an edit on log p(text), over every reveal order.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        tokens: as in :func:`exact`.
        hooks: the edit, as in :func:`exact`.
        options: further arguments of :func:`exact`.

    Raises:
        InputError: for arguments that do not fit, or too many mask patterns.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: where :func:`exact` raises it.
    """
    bridge = read_bridge(bridge)
    pass_hooks = read_pass_hooks(bridge, hooks, options.pop("scope", "active"))
    return ExactEffect(
        exact(bridge, tokens, hooks=None, **options),
        exact(bridge, tokens, hooks=pass_hooks, **options),
    )


def exact_backward(
    bridge: Bridge,
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

    One enumeration without gradients gives each mask pattern's posterior weight; then each pass is
    run again with gradients and its graph is freed, so memory does not grow with the number of
    mask patterns. Gradients also flow into tensors that the hooks close over.

    Args:
        bridge: a BD3LM bridge, booted before, since the gradients stay in it.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``; BOS first.
        block_size: tokens per block, or ``"full"``.
        hooks: hooks of the passes, as in :func:`exact`.
        scope: how far they reach, as in :func:`exact`.
        given: number of leading positions that are given.
        max_states: largest number of mask patterns a block.
        rows: largest number of positions in one pass, as in :func:`exact`.

    Returns:
        The exact likelihoods, without gradients.

    Raises:
        InputError: for arguments that do not fit, a checkpoint's name among them, and under
            ``torch.inference_mode``, where no gradient can be computed.
        HookNameError: for a hook name that the bridge does not have.
        HookReturnError: for a hook that returns another shape, dtype or device.
        NotExactError: where :func:`exact` raises it.
    """
    require_bridge(bridge)
    if torch.is_inference_mode_enabled():
        raise InputError(
            "exact_backward was called under torch.inference_mode, where no gradient can be "
            "computed: call it outside"
        )
    limits = (max_states, rows, given)
    patterns = read_mask_patterns(bridge, tokens, block_size, hooks, scope, None, *limits)
    masked, passes = patterns.all_masked, patterns.passes
    with torch.no_grad():
        table = patterns.table()
        result, weights = sum_patterns(patterns, table), torch.zeros_like(table)
        for at, places, orders in patterns.reveal_orders(table):
            numbers = pattern_numbers(places)[:, None, None]
            gamma = orders.gamma().unflatten(0, (len(table[0]), len(at)))
            weights[numbers, :, at[None]] = gamma.permute(2, 1, 3, 0)
        weights = passes.by_block(weights)
    with torch.enable_grad():
        for texts, part in passes.by_texts():
            stream = part.clean_stream()
            leaves = stream.leaves()
            for at, log_p in part.by_pass(leaves, masked[:, texts]):
                (-(weights[:, texts][at.unbind(-1)] * log_p).sum()).backward()
            stream.backward(leaves)
    return result
