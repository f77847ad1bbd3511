"""Input of a forward pass, read into one of two views.

The network sees n tokens in one of two ways (Arriola et al., section 3.2)::

    sampling view   x_t            n ids     one stream: the finished blocks, then the noisy one
    dual view       [x_t | x_0]    2n ids    a noisy and a clean stream, each at positions 0 .. n-1

Denoising uses the sampling view. Training and likelihoods use the dual view: in one pass every
noisy block reads the clean blocks before it, and so has the prediction that the sampling view has
with these blocks finished. Who reads whom is in ``masks``.

Whatever would fail later with an obscure index error, or be wrong in silence, is refused here.
Nothing is tokenized, padded or run.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.errors import BlockSizeError, InputError
from transformer_lens_bd3lm.model.ids import check_ids, has_values, require_later
from transformer_lens_bd3lm.model.masks import causal_mask, dual_mask, sampling_mask


@dataclass(frozen=True)
class View:
    """Input of one forward pass: ids, and how their positions read each other.

    Attributes:
        ids: token ids; in the dual view ``[noisy | clean]``, 2 * length wide.
        length: tokens in one stream.
        block_size: tokens per block (ignored unless ``kind`` is ``"block"``).
        kind: ``"block"`` (block diffusion), ``"causal"`` or ``"open"`` (no mask).
        dual: whether there is a clean stream.
    """

    ids: Int[Tensor, "batch pos"]
    length: int
    block_size: int
    kind: str
    dual: bool

    def positions(self) -> Int[Tensor, " pos"]:
        """Return the rotary position of each id; both streams count from 0."""
        positions = torch.arange(self.length, device=self.ids.device)
        return positions.repeat(2) if self.dual else positions

    def mask(self) -> Bool[Tensor, "q k"] | None:
        """Return the attention mask, True where visible; None if every position reads all."""
        n, device = self.length, self.ids.device
        if self.dual:
            return dual_mask(n, self.block_size, device)
        if self.kind == "block":
            return sampling_mask(n, n, self.block_size, device)
        return causal_mask(n, n, device) if self.kind == "causal" else None


def read_input(
    config: Any,
    input_ids: Any,
    *,
    clean: Any = None,
    sample_mode: bool | None = None,
    block_size: Any = None,
) -> View:
    """Return the view that the arguments of a forward pass ask for.

    Args:
        config: config of the checkpoint.
        input_ids: ids of the noisy or only stream, or of both as ``[x_t | x_0]``.
        clean: ids of the clean stream x_0, if it is given apart; the view is dual then.
        sample_mode: keyword of the public code: True is the sampling view, False the dual view.
        block_size: tokens per block in this pass; by default the config's.

    Raises:
        InputError: for ids, shapes and lengths that do not fit the checkpoint or each other.
        BlockSizeError: for a block size that the checkpoint cannot have.
    """
    n = config.model_length
    if block_size is not None:
        size = read_block_size(block_size, n, config.cross_attn)
    else:
        size = read_block_size(config.block_size, n) if config.cross_attn else n
    ids = check_ids(input_ids, config.vocab_size, "input_ids")
    clean_is_given = clean is not None
    if clean_is_given:
        if sample_mode:
            raise InputError(
                "clean with sample_mode=True: the sampling view has no clean stream; drop one"
            )
        ids = _join(ids, check_ids(clean, config.vocab_size, "clean"))
    asked_for = sample_mode is False
    both_are_joined = sample_mode is not True and ids.shape[1] == 2 * n and config.cross_attn
    dual = clean_is_given or asked_for or both_are_joined
    if dual and not config.cross_attn:
        raise InputError(
            "the dual view was asked for, but this checkpoint has cross_attn=False and only one "
            "stream: call it with input_ids alone"
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


def _join(
    x_t: Int[Tensor, "batch pos"], x_0: Int[Tensor, "clean_batch clean_pos"]
) -> Int[Tensor, "batch both"]:
    """Join a noisy and a clean stream of the same tokens."""
    if x_0.shape != x_t.shape:
        raise InputError(
            f"clean has shape {tuple(x_0.shape)} and the noisy ids {tuple(x_t.shape)}: both "
            "streams are [batch, pos] of the same tokens"
        )
    return torch.cat([x_t, x_0.to(x_t.device)], dim=1)


def read_block_size(
    value: Any, model_length: int, has_blocks: bool = True, name: str = "block_size"
) -> int:
    """Return a block size in tokens.

    Args:
        value: an int, or ``"full"`` for the whole context.
        model_length: context of the checkpoint, in tokens.
        has_blocks: whether the checkpoint has blocks (``cross_attn``).
        name: name of the argument, for messages.

    Raises:
        BlockSizeError: for anything but 1..model_length or ``"full"``, and without blocks.
    """
    if not has_blocks:
        raise BlockSizeError(
            f"{name}={value!r} was given, but this checkpoint has cross_attn=False: its one "
            "stream has no blocks, and no block size to set"
        )
    if isinstance(value, str) and value == "full":
        return model_length
    rule = f'give an int in 1..{model_length} or "full"'
    return check_int(name, value, 1, model_length, rule, BlockSizeError)


def read_sigma(
    config: Any, timesteps: Any, ids: Int[Tensor, "batch pos"], dtype: torch.dtype
) -> Float[Tensor, " batch"]:
    """Return sigma of each row, in float32 or wider; zeros without time conditioning.

    Args:
        config: config of the checkpoint.
        timesteps: sigma as one number or one per row; 0 by default. At time t it is -log(1 - t).
        ids: token ids of the pass.
        dtype: dtype of the model.

    Raises:
        InputError: if ``timesteps`` is not one finite number >= 0, or one per row.
    """
    batch = ids.shape[0]
    wide = torch.promote_types(dtype, torch.float32)
    if timesteps is None:
        return torch.zeros(batch, device=ids.device, dtype=wide)
    try:
        sigma = torch.as_tensor(timesteps, device=ids.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"timesteps={timesteps!r}: give sigma as one number, or one per row"
        ) from error
    if sigma.ndim == 2 and sigma.shape[1] == 1:
        sigma = sigma[:, 0]
    if sigma.ndim == 0:
        sigma = sigma.expand(batch)
    if sigma.shape != (batch,) or sigma.dtype == torch.bool or sigma.is_complex():
        raise InputError(
            f"timesteps has shape {tuple(sigma.shape)} ({sigma.dtype}): give sigma as one number, "
            f"or one per row [{batch}]"
        )
    valid = sigma.isfinite() & (sigma >= 0)
    if not has_values(valid):
        require_later(valid, "timesteps: a sigma that is not finite, or is negative")
    elif not bool(valid.all()):
        raise InputError(
            f"timesteps holds {sigma[~valid][0].item()}: sigma = -log(1 - t) of a time t in [0, 1) "
            "is finite and not negative"
        )
    return sigma.to(wide) if config.time_conditioning else torch.zeros_like(sigma, dtype=wide)


def read_padding(view: View, attention_mask: Tensor | None) -> Tensor | None:
    """Return which positions hold real tokens, ``[batch, pos]``; None if all do.

    Args:
        view: view of the pass; both streams of a dual view have the same padding.
        attention_mask: True or 1 at real tokens ``[batch, pos]``, of one stream.

    Raises:
        InputError: if the shape does not fit, or padding stands before a real token.
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
    """Refuse keywords of tokenizers and of the public code that would change nothing here.

    Args:
        token_type_ids: types that a tokenizer may add; zeros and None pass.
        store_kv: switch of the public code's cache; False and None pass.

    Raises:
        InputError: for other values.
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
