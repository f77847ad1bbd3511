"""The logit lens: predictions at masked positions from the residual stream after each layer.

The residual after layer l is read out as the checkpoint's forward reads out the last one::

    log p_l = SUBS(unembed(ln_final(resid_l) * (1 + scale) + shift))

Only masked positions are read, since only they are trained to predict, and the mask token has
probability 0. At the last layer this is the model's own prediction. On a processed bridge scale and
shift are part of the weights, and the lens gives the same values.

It translates no basis: a layer that writes in another basis than the last seems to predict nothing.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge, require_bridge
from transformer_lens_bd3lm.bridge.texts import read_ids
from transformer_lens_bd3lm.checks import is_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.inputs import read_input
from transformer_lens_bd3lm.model.subs import masked_log_probs

MODULATION = ("final_adaln.hook_scale", "final_adaln.hook_shift")


@torch.no_grad()
def logit_lens(
    bridge: Bridge, cache: Any, ids: Any, position: Any = None
) -> Float[Tensor, "depth token d_vocab"]:
    """Return log-probabilities in nats at masked positions, by depth.

    Depth 0 is after the embedding, depth i + 1 is after layer i. Tokens are in the order of
    ``(x_t == mask).nonzero()``, so ``lens[-1]`` equals
    ``bd3lm.log_probs(logits, x_t, mask)[x_t == mask]``; with one ``position`` there is one token
    for each row of the batch.

    Args:
        bridge: the bridge that made the cache, as booted or processed.
        cache: an ``ActivationCache`` of either view with the residuals (``blocks.0.hook_resid_pre``
            and each ``hook_resid_post``), and ``final_adaln.*`` where they are not folded. Of the
            dual view the noisy stream is read; with ``pad_block`` only the text that was given.
        ids: the input that the cache was made from: x_t as ids ``[batch, pos]`` or a string.
        position: one position that is masked in every row, or booleans ``[batch, pos]`` that are
            True only at masks; all masks by default.

    Returns:
        Log-probabilities ``[depth, token, d_vocab]``; -inf for the mask token.

    Raises:
        InputError: for positions that are not masked, which are not trained to predict; for a cache
            of other ids, of another bridge or of this one before its weights were processed, or
            without an activation that is needed; and for the autoregressive baseline.
    """
    x_t = _read_x_t(require_bridge(bridge), ids)
    row, at = _read_positions(x_t, position, bridge.cfg.mask_token_id)
    names = lens_names(bridge)
    _check_cache(bridge, cache, x_t, names)
    return torch.stack(
        [read_out(bridge, cache[name], cache, row, at) for name in names if name not in MODULATION]
    )


def lens_names(bridge: Bridge) -> list[str]:
    """Return the hook names that a lens reads: residuals by depth, then what is not folded."""
    names = ["blocks.0.hook_resid_pre"]
    names += [f"blocks.{layer}.hook_resid_post" for layer in range(bridge.cfg.n_layers)]
    modulated = bridge.cfg.adaln and "scale" not in bridge.final_adaln.folded
    return [*names, *MODULATION] if modulated else names


@torch.no_grad()
def read_out(
    bridge: Bridge,
    residual: Float[Tensor, "batch pos d_model"],
    cache: Any,
    row: Int[Tensor, " token"],
    at: Int[Tensor, " token"],
    translate: Any = None,
) -> Float[Tensor, "token d_vocab"]:
    """Return log-probabilities in nats from a residual stream at (row, position) pairs.

    Args:
        bridge: the bridge that made the residual.
        residual: residual stream after some layer.
        cache: activations by name, with ``final_adaln.*`` where they are not folded.
        row: row of each token to read.
        at: its position.
        translate: function of the residuals ``[token, d_model]`` that is applied first.
    """
    device = bridge.embed.weight.device
    h = residual[row, at].to(device)
    h = bridge.ln_final((h if translate is None else translate(h))[None])[0]
    if bridge.cfg.adaln and "scale" not in bridge.final_adaln.folded:
        scale, shift = (
            vector[row, at if vector.shape[1] > 1 else 0].to(device)
            for vector in (cache[name] for name in MODULATION)
        )
        h = h * (1 + scale) + shift
    return masked_log_probs(bridge.unembed(h), bridge.cfg.mask_token_id)


def _read_x_t(bridge: Bridge, ids: Any) -> Int[Tensor, "batch pos"]:
    """Return x_t from ids, a string, or ids of both streams ``[x_t | x_0]``.

    Raises:
        InputError: for anything else, and for the autoregressive baseline, which has no masks.
    """
    config = bridge.original_model.config
    if config.causal:
        raise InputError(
            "this checkpoint is the autoregressive baseline (causal=True): it has never seen a "
            "mask; transformer_lens.tools.analysis.logit_lens is for such models"
        )
    view = read_input(config, read_ids(bridge, ids, "ids"))
    return view.ids[:, : view.length].cpu()


def _read_positions(
    x_t: Int[Tensor, "batch pos"], position: Any, mask_id: int
) -> tuple[Int[Tensor, " token"], Int[Tensor, " token"]]:
    """Return the row and the position of each token to read.

    Raises:
        InputError: if a position is not masked, or none is left.
    """
    masked, n = x_t == mask_id, x_t.shape[1]
    if position is None:
        wanted = masked
    elif is_int(position) and -n <= position < n:
        wanted = (torch.arange(n) == position % n).expand_as(masked)
    elif isinstance(position, Tensor) and position.dtype == torch.bool:
        wanted = position.cpu()
    else:
        wanted = None
    if wanted is None or wanted.shape != masked.shape:
        came = tuple(position.shape) if isinstance(position, Tensor) else repr(position)
        raise InputError(
            f"position={came}: give one of 0..{n - 1}, or booleans [batch, pos] = "
            f"{list(masked.shape)}"
        )
    clean = (wanted & ~masked).nonzero()
    if len(clean):
        row, at = clean[0].tolist()
        raise InputError(
            f"position {at} is not masked in row {row}: the loss never looks at clean positions, "
            "so what the network predicts there is untrained"
        )
    if not bool(wanted.any()):
        raise InputError(
            "no position to read: ids hold no mask there, mask what is to be predicted"
        )
    row, at = wanted.nonzero().unbind(-1)
    return row, at


def _check_cache(
    bridge: Bridge, cache: Any, x_t: Int[Tensor, "batch pos"], names: list[str]
) -> None:
    """Check that a cache holds the activations of these ids in this bridge as it is now.

    Raises:
        InputError: naming what is missing or differs.
    """
    missing = [name for name in names if name not in cache]
    if missing:
        raise InputError(
            f"cache lacks {', '.join(missing)}: make it without names_filter, or keep these"
        )
    if getattr(cache, "model", None) not in (None, bridge):
        raise InputError("the cache is another bridge's: make it with the one that is given")
    if not set(MODULATION) & set(names) and any(
        bool(cache[name].any()) for name in MODULATION if name in cache
    ):
        raise InputError(
            "the cache was made before the bridge's weights were processed: make it again"
        )
    shape = tuple(cache[names[0]].shape)
    if len(shape) != 3 or shape[0] != len(x_t) or shape[1] < x_t.shape[1]:
        raise InputError(
            f"{names[0]} has shape {shape} in the cache, the ids {tuple(x_t.shape)}: give the ids "
            "that it was made from, and keep its batch axis and all positions"
        )
    if "embed.hook_in" in cache:
        seen = cache["embed.hook_in"][:, : x_t.shape[1]].cpu()
        if not torch.equal(seen, x_t):
            raise InputError("the cache was made from other ids: give x_t as it was run")
