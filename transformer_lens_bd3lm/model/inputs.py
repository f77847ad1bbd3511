"""What a forward was given, read at the door into one of two views.

The **sampling view** is one stream of n ids. The **dual view** is ``[x_t | x_0]``, 2n long, and
both halves count positions from 0. Everything that could go wrong later with an obscure index
error, or go wrong in silence, is refused here.

It does not tokenize, pad or run anything.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch._subclasses import FakeTensor

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.model.masks import causal_mask, dual_mask, sampling_mask


@dataclass(frozen=True)
class View:
    """One forward's input: ids ``[batch, pos]``, and how positions read each other.

    Attributes:
        ids: token ids; in the dual view ``[noisy | clean]``, 2 * length wide.
        length: tokens in one stream.
        block_size: tokens a block (ignored where ``kind`` is not ``"block"``).
        kind: ``"block"`` (block diffusion), ``"causal"`` or ``"open"`` (no mask).
        dual: whether there is a clean stream.
    """

    ids: Int[Tensor, "batch pos"]
    length: int
    block_size: int
    kind: str
    dual: bool

    def positions(self) -> Int[Tensor, " pos"]:
        """Rotary positions; both halves of the dual view count from 0."""
        positions = torch.arange(self.length, device=self.ids.device)
        return positions.repeat(2) if self.dual else positions

    def mask(self) -> Bool[Tensor, "q k"] | None:
        """The dense square, True where visible; None where everything is."""
        device, n = self.ids.device, self.length
        if self.dual:
            return dual_mask(n, self.block_size, device)
        if self.kind == "open":
            return None
        return (
            causal_mask(n, n, device)
            if self.kind == "causal"
            else sampling_mask(n, n, self.block_size, device)
        )


def read_block_size(value: Any, model_length: int, has_blocks: bool = True) -> int:
    """A block size in tokens, from an int or ``"full"`` (the whole context).

    Raises:
        BlockSizeError: for anything but 1..model_length or ``"full"``, or where there are no
            blocks.
    """
    if not has_blocks:
        raise BlockSizeError(
            f"block_size={value!r} was given, but this checkpoint has cross_attn=False: its one "
            "stream has no blocks, and no dial to turn"
        )
    if isinstance(value, str) and value == "full":
        return model_length
    rule = f'give an int in 1..{model_length} or "full"'
    return check_int("block_size", value, 1, model_length, rule, BlockSizeError)


def check_ids(ids: Any, vocab_size: int, name: str) -> Int[Tensor, "batch pos"]:
    """Token ids ``[batch, pos]`` (a single row is promoted), all inside the vocabulary.

    Raises:
        InputError: for floats, an empty tensor, other shapes, or ids outside the vocabulary.
    """
    if (
        not isinstance(ids, Tensor)
        or ids.is_floating_point()
        or ids.is_complex()
        or ids.dtype == torch.bool
    ):
        kind = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"{name} is {kind}: give integer token ids [batch, pos]")
    ids = ids.long() if ids.ndim != 1 else ids.long()[None]
    if ids.ndim != 2 or ids.numel() == 0:
        raise InputError(
            f"{name} has shape {tuple(ids.shape)}: give token ids [batch, pos], not empty"
        )
    if not has_values(ids):
        require_later((ids >= 0) & (ids < vocab_size), f"{name}: an id outside the vocabulary")
        return ids
    low, high = (int(end) for end in ids.aminmax())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{name} holds id {low if low < 0 else high}: the vocabulary is 0..{vocab_size - 1}"
        )
    return ids


def fill_hidden(
    ids: Int[Tensor, "batch pos"], hidden: Bool[Tensor, "batch pos"], vocab_size: int, filler: int
) -> Int[Tensor, "batch pos"]:
    """Replace ids that no token has where nobody reads them: padding may be any number."""
    outside = (ids < 0) | (ids >= vocab_size)
    return ids.masked_fill(hidden.to(ids.device) & outside, filler)


def has_values(x: Tensor) -> bool:
    """Whether a tensor's values can be read now.

    There are none yet while a graph is captured (``torch.compile``, ``torch.export``), none in fake
    tensors, and each is many under ``torch.func.vmap``.
    """
    return not (
        torch.compiler.is_compiling()
        or isinstance(x, FakeTensor)
        or torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


def require_later(condition: Tensor, message: str) -> None:
    """Make a check of values that are not there yet part of a captured graph, if one is captured.

    The graph raises a RuntimeError with this message. Under vmap, and where there will never be
    values, nothing is checked.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition.all(), message)


def read_input(
    config: Any,
    input_ids: Any,
    *,
    clean: Any = None,
    sample_mode: bool | None = None,
    block_size: Any = None,
) -> View:
    """Decide the view and check everything about it.

    Args:
        config: the checkpoint's config.
        input_ids: the noisy or only stream, or ``[x_t | x_0]`` joined.
        clean: x_0, if the streams come apart; it makes the view dual.
        sample_mode: the checkpoint's own switch; True is the sampling view.
        block_size: the dial for this call; the config's by default.

    Raises:
        InputError: what came, the rule, the way out.
    """
    n = config.model_length
    if block_size is None:
        size = read_block_size(config.block_size, n) if config.cross_attn else n
    else:
        size = read_block_size(block_size, n, config.cross_attn)
    ids = check_ids(input_ids, config.vocab_size, "input_ids")
    if clean is not None:
        if sample_mode:
            raise InputError(
                "clean with sample_mode=True: the sampling view has no clean stream; drop one"
            )
        clean = check_ids(clean, config.vocab_size, "clean")
        if clean.shape != ids.shape:
            raise InputError(
                f"clean has shape {tuple(clean.shape)} and the noisy ids {tuple(ids.shape)}: both "
                "streams "
                "are [batch, pos] of the same tokens"
            )
        ids = torch.cat([ids, clean.to(ids.device)], dim=1)
    joined = (
        clean is None and sample_mode is not True and ids.shape[1] == 2 * n and config.cross_attn
    )
    dual = clean is not None or sample_mode is False or joined
    if dual and not config.cross_attn:
        raise InputError(
            "the dual view was asked for, but this checkpoint has cross_attn=False and only one "
            "stream: "
            "call it with input_ids alone"
        )
    if dual and ids.shape[1] % 2:
        raise InputError(
            f"sample_mode=False with {ids.shape[1]} ids: the dual view is [x_t | x_0], an even "
            "number"
        )
    length = ids.shape[1] // 2 if dual else ids.shape[1]
    if length > n:
        raise InputError(
            f"{length} tokens: this checkpoint's context is {n}; give at most that many"
        )
    kind = "block" if config.cross_attn else "causal" if config.causal else "open"
    return View(ids, length, size, kind, dual)


def read_sigma(
    config: Any, timesteps: Any, ids: Int[Tensor, "batch pos"], dtype: torch.dtype
) -> Float[Tensor, " batch"]:
    """Sigma per row ``[batch]``, float32 or wider: zeros by default and if the network sees none.

    Raises:
        InputError: if ``timesteps`` is not one finite number ≥ 0, or one a row.
    """
    batch = ids.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    if timesteps is None:
        return torch.zeros(batch, device=ids.device, dtype=wide)
    try:
        sigma = torch.as_tensor(timesteps, device=ids.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"timesteps={timesteps!r}: give sigma as a number, or one a row"
        ) from error
    if sigma.ndim == 2 and sigma.shape[1] == 1:
        sigma = sigma[:, 0]
    if sigma.ndim == 0:
        sigma = sigma.expand(batch)
    if sigma.shape != (batch,) or sigma.dtype == torch.bool or sigma.is_complex():
        raise InputError(
            f"timesteps has shape {tuple(sigma.shape)} ({sigma.dtype}): give sigma as one number, "
            "or "
            f"one a row [{batch}]"
        )
    fine = sigma.isfinite() & (sigma >= 0)
    if not has_values(fine):
        require_later(fine, "timesteps: a sigma that is not finite, or is negative")
    elif not bool(fine.all()):
        raise InputError(
            f"timesteps holds {sigma[~fine][0].item()}: sigma = -log(1 - t) of a time t in [0, 1) "
            "is "
            "finite and not negative"
        )
    return sigma.to(wide) if config.time_conditioning else torch.zeros_like(sigma, dtype=wide)


def read_padding(view: View, attention_mask: Tensor | None) -> Tensor | None:
    """Which positions are real, ``[batch, pos]``; None where all are.

    Raises:
        InputError: if the mask does not fit, or pads on the left, where positions would shift.
    """
    if attention_mask is None:
        return None
    attention_mask = torch.as_tensor(attention_mask)
    shape = (view.ids.shape[0], view.length)
    if attention_mask.shape != shape:
        raise InputError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: give [batch, pos] = "
            f"{list(shape)}"
        )
    real = attention_mask.to(view.ids.device).bool()
    message = (
        "attention_mask hides a token before a visible one: positions would shift, and blocks with "
        'them; pad on the right (padding_side="right")'
    )
    hidden_before = real[:, 1:] & ~real[:, :-1]
    if not has_values(real):
        require_later(real[:, 0] & ~hidden_before.any(-1), message)
        return real
    if bool(real.all()):
        return None
    if bool(hidden_before.any()) or not bool(real[:, 0].all()):
        raise InputError(message)
    return real


def check_keywords(token_type_ids: Any, store_kv: Any) -> None:
    """Refuse keywords that tokenizers and the public code pass and that would change nothing here.

    Raises:
        InputError: for token types other than 0, and for a cache of keys and values.
    """
    if token_type_ids is not None and bool(torch.as_tensor(token_type_ids).any()):
        raise InputError(
            "token_type_ids holds other types than 0: the model has no token types; leave it out, "
            "and pass one text a row"
        )
    if store_kv:
        raise InputError(
            "store_kv=True: a forward pass keeps no keys and values here; "
            "bd3lm.denoise(bridge, ..., kv_cache=True) does"
        )
