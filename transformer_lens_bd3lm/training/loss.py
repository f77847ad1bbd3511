"""Training loss of block diffusion: one draw of the NELBO, from the logits of a forward pass.

With the log-linear schedule (Arriola et al., equation 8) each token of a block is masked with
probability t, t ~ U(0, 1] for every block, and N tokens count::

    loss = 1/N * sum over masked i of  (1 / t_i) * -log p(x_0,i | x_t, clean earlier blocks)

Its expectation over t and masks is the NELBO in nats a token, which ``nelbo`` gives exactly. A draw
that masks nothing has loss 0. It is not refused: without such draws the mean would be too high. The
logits must be those of the dual view, ``bridge(x_t, clean=x_0)``, or of a text of one block.

Nothing is drawn here, and no model is run.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_bos_given, check_finished, check_int, check_noised
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.model.ids import check_ids, fill_hidden
from transformer_lens_bd3lm.model.inputs import View, read_padding
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.model.subs import masked_log_probs, read_mask_id


def masked_nll(
    logits: Float[Tensor, "token d_vocab"], x_0: Int[Tensor, " token"], mask_id: int
) -> Float[Tensor, " token"]:
    """Compute ``-log p(x_0 | x_t)`` of masked tokens, in nats, in float32 or wider."""
    log_p = masked_log_probs(at_least_float32(logits), mask_id)
    return -log_p.gather(-1, x_0[:, None])[:, 0]


def diffusion_loss(
    logits: Any,
    x_t: Any,
    x_0: Any,
    t: Any,
    *,
    block_size: Any = None,
    attention_mask: Any = None,
    mask_id: Any = None,
    per_token: bool = False,
) -> Float[Tensor, ""] | Float[Tensor, "batch pos"]:
    """Estimate the NELBO from one draw of masks, in nats per token; differentiable in ``logits``.

    It is the loss of Arriola et al., equation 8, under the log-linear schedule: the cross-entropy
    of each masked token, weighted by 1/t of its block.

    Args:
        logits: raw logits of the noisy stream ``[batch, pos, d_vocab]``.
        x_t: noisy ids that they were computed from ``[batch, pos]``.
        x_0: clean ids ``[batch, pos]``. Position 0 is BOS, which is never masked and not counted.
        t: probability with which each token was masked, in (0, 1]: one number, one per row
            ``[batch]``, one per position ``[batch, pos]``, or with ``block_size`` one per block
            ``[batch, block]``.
        block_size: tokens per block, or ``"full"``; needed only for ``t`` of ``[batch, block]``.
        attention_mask: True at real tokens ``[batch, pos]``, padded on the right. Padding is not
            counted, and may have any ids.
        mask_id: id of the mask token; by default the last id. Where ``x_t`` and ``x_0`` differ,
            ``x_t`` must be the mask.
        per_token: whether to return the weighted loss of each position, 0 where nothing is masked,
            instead of its sum over the N counted tokens divided by N.

    Returns:
        A scalar, or the loss of each position ``[batch, pos]``, in float32 or wider.

    Raises:
        InputError: if shapes do not fit, a time is outside (0, 1], a revealed token is not the
            clean one, BOS is masked, ``x_0`` holds the mask, or no token is counted.
        BlockSizeError: for a block size other than an int >= 1 or ``"full"``.
    """
    logits, mask_id = _read_logits(logits, mask_id)
    x_t, x_0 = (
        _read_stream(ids, logits.shape[-1], name, attention_mask).to(logits.device)
        for ids, name in ((x_t, "x_t"), (x_0, "x_0"))
    )
    for ids, name in ((x_t, "x_t"), (x_0, "x_0")):
        if ids.shape != logits.shape[:-1]:
            raise InputError(
                f"{name} has shape {tuple(ids.shape)}, the logits {tuple(logits.shape)}: give the "
                "ids [batch, pos] of the logits [batch, pos, d_vocab]"
            )
    counted = _counted_positions(x_0, attention_mask)
    _check_masks(x_t, x_0, counted, mask_id)
    wide = torch.promote_types(logits.dtype, torch.float32)
    t = _read_times(t, x_t.shape, block_size).to(logits.device, wide)
    _check_times(t)
    masked = (x_t == mask_id) & counted
    weighted = masked_nll(logits[masked], x_0[masked], mask_id) / t[masked]
    if not per_token:
        return weighted.sum() / counted.sum()
    return torch.zeros_like(t).index_put((masked,), weighted)


def _read_logits(logits: Any, mask_id: Any) -> tuple[Float[Tensor, "batch pos d_vocab"], int]:
    """Check that logits are ``[batch, pos, d_vocab]``, and return them with the mask's id."""
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim != 3:
        given = (
            f"{logits.dtype} of shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        raise InputError(f"logits is {given}: give raw logits [batch, pos, d_vocab]")
    d_vocab = logits.shape[-1]
    return logits, read_mask_id(d_vocab - 1 if mask_id is None else mask_id, d_vocab)


def _read_stream(
    ids: Any, d_vocab: int, name: str, attention_mask: Any
) -> Int[Tensor, "batch pos"]:
    """Check the ids of one stream; ids at padding that no token has become 0."""
    if isinstance(ids, Tensor) and attention_mask is not None and not ids.is_floating_point():
        hidden = ~torch.as_tensor(attention_mask).bool()
        if hidden.shape == ids.shape:
            ids = fill_hidden(ids.long(), hidden, d_vocab, 0)
    return check_ids(ids, d_vocab, name)


def _counted_positions(
    x_0: Int[Tensor, "batch pos"], attention_mask: Any
) -> Bool[Tensor, "batch pos"]:
    """Return which positions are counted: all but BOS and padding."""
    batch, n = x_0.shape
    counted = (torch.arange(n, device=x_0.device) > 0).expand(batch, n)
    real = read_padding(View(x_0, n, n, "open", dual=False), attention_mask)
    counted = counted if real is None else counted & real
    if not bool(counted.any()):
        raise InputError("no token is counted: give BOS and at least one real token in some row")
    return counted


def _check_masks(
    x_t: Int[Tensor, "batch pos"],
    x_0: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
    mask_id: int,
) -> None:
    """Check that ``x_t`` is ``x_0`` with masks at counted positions."""
    real = counted.clone()
    real[:, 0] = True
    way_out = "give finished texts, or mask_id=... if another id is the mask"
    check_finished("x_0", x_0[real], mask_id, way_out)
    check_bos_given("x_t", x_t, mask_id)
    check_noised("x_t", x_t, "x_0", x_0, mask_id, real)


def _read_times(t: Any, shape: tuple[int, int], block_size: Any) -> Float[Tensor, "batch pos"]:
    """Return the time of every position, from one number or one a row, block or position."""
    batch, n = shape
    size = None if block_size is None else _read_size(block_size, n)
    try:
        times = torch.as_tensor(t, dtype=None if isinstance(t, Tensor) else torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"t={t!r}: give a number, or a tensor of them") from error
    if times.dtype == torch.bool or times.is_complex():
        raise InputError(f"t is {times.dtype}: give real numbers in (0, 1]")
    times = times if times.is_floating_point() else times.double()
    if times.ndim == 0:
        return times.expand(batch, n)
    if times.shape == (batch,):
        return times[:, None].expand(batch, n)
    if times.shape == (batch, n):
        return times
    if size is not None and times.shape == (batch, -(-n // size)):
        return times.repeat_interleave(size, dim=1)[:, :n]
    blocks = "[batch, block] with block_size=..."
    if size is not None:
        blocks = f"[batch, block] = [{batch}, {-(-n // size)}]"
    raise InputError(
        f"t has shape {tuple(times.shape)}: give a number, [batch] = [{batch}], "
        f"[batch, pos] = [{batch}, {n}], or {blocks}"
    )


def _read_size(block_size: Any, n: int) -> int:
    """Return a block size in tokens; one beyond the text's length n is the same as ``"full"``."""
    if block_size == "full":
        return n
    rule = 'give an int >= 1 or "full"'
    return min(check_int("block_size", block_size, 1, rule=rule, error=BlockSizeError), n)


def _check_times(t: Float[Tensor, "batch pos"]) -> None:
    """Check that every time is in (0, 1]."""
    inside = (t > 0) & (t <= 1)
    if not bool(inside.all()):
        raise InputError(
            f"t holds {t[~inside][0].item()}: a time is in (0, 1], since its losses weigh 1/t; "
            "draw it as 1 - torch.rand(...), which is never 0"
        )
