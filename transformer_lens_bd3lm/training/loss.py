"""What a BD3LM is trained with: one draw of the NELBO, from a forward's logits.

With the log-linear schedule (Arriola et al., equation 8) each token of a block is masked with
probability t, t ~ U(0, 1] for every block, and N tokens count::

    loss = 1/N * sum over masked i of  (1 / t_i) * -log p(x_0,i | x_t, clean earlier blocks)

Its expectation over t and masks is the NELBO in nats a token, which ``nelbo`` gives exactly. A draw
that masks nothing is worth exactly 0: it is not refused, for without such draws the mean would be
too high. The network must have seen ``x_t`` beside the clean tokens, ``bridge(x_t, clean=x_0)``,
or be told of one block alone.

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
    """``-log p(x_0 | x_t)`` of masked tokens, in nats, from raw logits, in float32 or wider."""
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
    """One draw of the NELBO, in nats a token; differentiable in ``logits``.

    Args:
        logits: raw logits of the noisy stream ``[batch, pos, d_vocab]``.
        x_t: the noisy ids they were computed from ``[batch, pos]``.
        x_0: the clean ids ``[batch, pos]``; position 0 is BOS, never masked and not counted.
        t: the probability with which each token was masked, in (0, 1]: a number, one a row
            ``[batch]``, one a position ``[batch, pos]``, or with ``block_size`` one a block
            ``[batch, block]``.
        block_size: tokens a block, or ``"full"``; says where the blocks of ``t`` begin.
        attention_mask: True at real tokens ``[batch, pos]``, padded on the right; padding counts
            for nothing, whatever its ids.
        mask_id: the mask token's id; the last id by default, which ``x_t`` and ``x_0`` must bear
            out: where they differ, ``x_t`` has the mask.
        per_token: what each position adds ``[batch, pos]``, in place of the sum over N tokens
            divided by N: 0 where nothing is masked.

    Returns:
        A scalar, or one value a position, in float32 or wider.

    Raises:
        InputError: if shapes do not fit, a time is none, a revealed token is not the clean one, BOS
            is masked, or nothing counts.
        BlockSizeError: if ``block_size`` is none.
    """
    logits, mask_id = read_logits(logits, mask_id)
    x_t, x_0 = (
        read_stream(ids, logits.shape[-1], name, attention_mask).to(logits.device)
        for ids, name in ((x_t, "x_t"), (x_0, "x_0"))
    )
    for ids, name in ((x_t, "x_t"), (x_0, "x_0")):
        if ids.shape != logits.shape[:-1]:
            raise InputError(
                f"{name} has shape {tuple(ids.shape)}, the logits {tuple(logits.shape)}: give the "
                "ids [batch, pos] of the logits [batch, pos, d_vocab]"
            )
    counted = read_counted(x_0, attention_mask)
    check_noise(x_t, x_0, counted, mask_id)
    wide = torch.promote_types(logits.dtype, torch.float32)
    t = read_times(t, x_t.shape, block_size).to(logits.device, wide)
    check_times(t)
    masked = (x_t == mask_id) & counted
    weighted = masked_nll(logits[masked], x_0[masked], mask_id) / t[masked]
    if not per_token:
        return weighted.sum() / counted.sum()
    return torch.zeros_like(t).index_put((masked,), weighted)


def read_logits(logits: Any, mask_id: Any) -> tuple[Float[Tensor, "batch pos d_vocab"], int]:
    """Raw logits as they came, and the mask's id among them.

    Raises:
        InputError: if they are none, or it is no id of theirs.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.ndim != 3:
        came = (
            f"{logits.dtype} of shape {tuple(logits.shape)}"
            if isinstance(logits, Tensor)
            else type(logits).__name__
        )
        raise InputError(f"logits is {came}: give raw logits [batch, pos, d_vocab]")
    d_vocab = logits.shape[-1]
    return logits, read_mask_id(d_vocab - 1 if mask_id is None else mask_id, d_vocab)


def read_stream(ids: Any, d_vocab: int, name: str, attention_mask: Any) -> Int[Tensor, "batch pos"]:
    """Ids of one stream, whatever the padding is.

    Raises:
        InputError: for what are no ids of the vocabulary.
    """
    if isinstance(ids, Tensor) and attention_mask is not None and not ids.is_floating_point():
        hidden = ~torch.as_tensor(attention_mask).bool()
        if hidden.shape == ids.shape:
            ids = fill_hidden(ids.long(), hidden, d_vocab, 0)
    return check_ids(ids, d_vocab, name)


def read_counted(x_0: Int[Tensor, "batch pos"], attention_mask: Any) -> Bool[Tensor, "batch pos"]:
    """Positions that count: all but BOS and padding.

    Raises:
        InputError: if the padding does not fit, or nothing counts.
    """
    batch, n = x_0.shape
    counted = (torch.arange(n, device=x_0.device) > 0).expand(batch, n)
    real = read_padding(View(x_0, n, n, "open", dual=False), attention_mask)
    counted = counted if real is None else counted & real
    if not bool(counted.any()):
        raise InputError("nothing counts: give BOS and at least one real token in some row")
    return counted


def check_noise(
    x_t: Int[Tensor, "batch pos"],
    x_0: Int[Tensor, "batch pos"],
    counted: Bool[Tensor, "batch pos"],
    mask_id: int,
) -> None:
    """Refuse an ``x_t`` that is not ``x_0`` with some of its tokens masked.

    Raises:
        InputError: and says where.
    """
    real = counted.clone()
    real[:, 0] = True
    way_out = "give finished texts, or mask_id=... if another id is the mask"
    check_finished("x_0", x_0[real], mask_id, way_out)
    check_bos_given("x_t", x_t, mask_id)
    check_noised("x_t", x_t, "x_0", x_0, mask_id, real)


def read_times(t: Any, shape: tuple[int, int], block_size: Any) -> Float[Tensor, "batch pos"]:
    """Times at every position, from a number or one a row, block or position.

    Raises:
        InputError: for another shape, or what is no number.
        BlockSizeError: if ``block_size`` is none.
    """
    batch, n = shape
    size = None if block_size is None else read_size(block_size, n)
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


def read_size(block_size: Any, n: int) -> int:
    """Tokens a block; one that is longer than the text is as good as ``"full"``.

    Raises:
        BlockSizeError: for anything but 1 or more, or ``"full"``.
    """
    if block_size == "full":
        return n
    rule = 'give an int >= 1 or "full"'
    return min(check_int("block_size", block_size, 1, rule=rule, error=BlockSizeError), n)


def check_times(t: Float[Tensor, "batch pos"]) -> None:
    """Refuse a time outside (0, 1].

    Raises:
        InputError: and says which.
    """
    fine = (t > 0) & (t <= 1)
    if not bool(fine.all()):
        raise InputError(
            f"t holds {t[~fine][0].item()}: a time is in (0, 1], and its tokens weigh 1/t; "
            "1 - torch.rand(...) is never 0"
        )
