"""Texts with masks, and two passes over them compared at every residual and attention pattern.

The two passes differ in one thing: the block size, or the weights. Only masked positions are
trained to predict, so only their predictions and their attention are compared. The autoregressive
baseline masks nothing: a token is predicted one position before it.

The measures are in ``similarity``; what differs between the passes is up to the caller.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.similarity import attention_change, residual_change
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import read_ids
from transformer_lens_bd3lm.checks import check_bos_given, check_finished, check_noised
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.ids import check_ids


@dataclass(frozen=True)
class StreamChange:
    """Similarity of one stream's residuals in two passes; 1 is the same.

    Depth 0 is the embedding, depth i + 1 is after layer i.

    Attributes:
        cosine: mean over rows ``[depth, pos]``.
        cka: linear CKA, debiased, over all rows and positions together ``[depth]``.
        cka_by_position: the CKA over the rows at one position ``[depth, pos]``.

    A CKA is NaN for fewer than 8 samples, which chance alone scatters by more than 0.22, and where
    samples differ by no more than rounding, or only one differs from the others. The positions of
    one text are not independent samples: small differences need many rows.
    """

    cosine: Float[Tensor, "depth pos"]
    cka: Float[Tensor, " depth"]
    cka_by_position: Float[Tensor, "depth pos"]


@dataclass(frozen=True)
class NoisedText:
    """Finished texts and which positions are masked, on the bridge's device.

    Attributes:
        bridge: a BD3LM bridge.
        tokens: the finished texts x_0 ``[batch, pos]``.
        masked: which positions of x_t are masked ``[batch, pos]``; for the autoregressive baseline,
            which masks nothing, those that are predicted.
    """

    bridge: Bridge
    tokens: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]

    @property
    def x_t(self) -> Int[Tensor, "batch pos"]:
        """The texts with masks; without, for the autoregressive baseline."""
        if self.bridge.cfg.causal:
            return self.tokens
        return self.tokens.masked_fill(self.masked, self.bridge.cfg.mask_token_id)

    @property
    def streams(self) -> int:
        """Number of streams: noisy and clean with blocks, else one."""
        return 2 if self.bridge.cfg.cross_attn else 1

    @property
    def queries(self) -> Bool[Tensor, "batch pos"]:
        """Which positions predict the masked tokens."""
        return self.masked.roll(-1, dims=1) if self.bridge.cfg.causal else self.masked

    def pass_at(
        self,
        block_size: int | str | None,
        timesteps: Any,
        hooks: Any,
        see: Callable[[str, Tensor], None],
        names: Iterable[str] | None = None,
    ) -> Float[Tensor, "query d_vocab"]:
        """Run one pass, in the dual view with blocks, and return raw logits of the masked tokens.

        Args:
            block_size: tokens per block, or ``"full"``; ignored without blocks.
            timesteps: sigma of the pass.
            hooks: hooks of the pass.
            see: called with the hook name and, after the hooks, each residual
                ``[batch, all, d_model]`` and each layer's attention of the queries
                ``[query, head, all]``.
            names: hook points to see in place of the residuals.
        """
        bridge, queries = self.bridge, self.queries

        def residual(x: Tensor, hook: Any, name: str) -> None:
            see(name, x)

        def pattern(x: Tensor, hook: Any, name: str) -> None:
            see(name, x[:, :, : queries.shape[1]].transpose(1, 2)[queries])

        own: list[tuple[str, Any]] = [
            (name, partial(residual, name=name)) for name in names or residual_names(bridge)
        ]
        own += [(name, partial(pattern, name=name)) for name in pattern_names(bridge)]
        dual = {"clean": self.tokens, "block_size": block_size} if bridge.cfg.cross_attn else {}
        edits = read_pass_hooks(bridge, hooks).fns
        with read_pass_hooks(bridge, [*edits, *own]).on():
            logits = bridge(self.x_t, timesteps=timesteps, **dual)
        return logits[queries]


@dataclass(frozen=True)
class PassChange:
    """Similarity of two passes; float64 on the CPU, except the logits.

    Attributes:
        streams: similarity of the noisy stream's residuals, and of the clean one's with blocks.
        attention: attention change, and the share on the noisy stream at a and at b
            ``[3, layer, head]``.
        logits: raw logits of the masked tokens ``[query, d_vocab]``, at a and at b.
    """

    streams: list[StreamChange]
    attention: Float[Tensor, "3 layer head"]
    logits: tuple[Tensor, Tensor]


def compare_passes(
    a: Callable[..., Tensor], b: Callable[..., Tensor], text: NoisedText
) -> PassChange:
    """Run one pass, keep its activations, and compare the other pass with them as it runs.

    Args:
        a: a pass of ``text``, a function that takes ``see``.
        b: another, of the same shapes.
        text: the texts of both.
    """
    before: dict[str, Tensor] = {}
    changes: dict[str, Any] = {}
    depths, layers = residual_names(text.bridge), pattern_names(text.bridge)

    def keep(name: str, x: Tensor) -> None:
        # A hook further on may write into the stream.
        before[name] = x.clone() if name in depths else x

    def compare(name: str, x: Tensor) -> None:
        change = residual_change if name in depths else attention_change
        changes[name] = change(before.pop(name), x, text.streams)

    logits = a(see=keep), b(see=compare)
    streams = [
        StreamChange(*map(torch.stack, zip(*stream, strict=True)))
        for stream in zip(*(changes[name] for name in depths), strict=True)
    ]
    attention = torch.stack([changes[name] for name in layers], dim=1)
    return PassChange(streams, attention, logits)


def residual_names(bridge: Bridge) -> list[str]:
    """Return the hook names of the residual stream, by depth."""
    layers = range(bridge.cfg.n_layers)
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in layers)]


def pattern_names(bridge: Bridge) -> list[str]:
    """Return the hook names of the attention patterns, by layer."""
    return [f"blocks.{i}.attn.hook_pattern" for i in range(bridge.cfg.n_layers)]


def read_noised_text(
    bridge: Bridge, tokens: Any, x_t: Any, seed: int, name: str = "tokens"
) -> NoisedText:
    """Check texts and masks, before anything is run.

    Args:
        bridge: a BD3LM bridge.
        tokens: a string, strings of equally many tokens, or ids ``[batch, pos]``; strings get BOS.
        x_t: the ids with masks ``[batch, pos]``; by default each position but BOS is masked with
            probability 1/2.
        seed: random seed of those masks.
        name: name of ``tokens`` in messages.

    Raises:
        InputError: for texts or masks that do not fit.
    """
    config, mask_id = bridge.original_model.config, bridge.cfg.mask_token_id
    ids = read_ids(bridge, tokens, name, prepend_bos=True)
    if not 2 <= ids.shape[1] <= config.model_length:
        raise InputError(
            f"{ids.shape[1]} tokens: give BOS and at least one more, at most {config.model_length}"
        )
    check_finished("tokens", ids, mask_id, "give finished texts, and masks in x_t")
    if bridge.cfg.causal:
        if x_t is not None:
            raise InputError(
                "x_t: the autoregressive baseline (causal=True) reads no masks, so leave x_t out"
            )
        return NoisedText(bridge, ids, torch.ones_like(ids).cumsum(1) > 1)
    if x_t is None:
        masked = Noise(seed).times(len(ids), 0, ids.shape[1]) < 0.5
        masked[:, 0] = False
        if not bool(masked.any()):
            raise InputError(
                f"seed={seed} masks nothing in so short a text: give another seed, or x_t"
            )
        return NoisedText(bridge, ids, masked.to(ids.device))
    noised = check_ids(x_t, config.vocab_size, "x_t").to(ids.device)
    if noised.shape != ids.shape:
        raise InputError(
            f"x_t has shape {tuple(noised.shape)} and tokens {tuple(ids.shape)}: both are [batch, "
            "pos] of the same texts"
        )
    check_noised("x_t", noised, "tokens", ids, mask_id)
    check_bos_given("x_t", noised, mask_id)
    masked = noised == mask_id
    if not bool(masked.any()):
        raise InputError("x_t masks nothing to predict: mask some position after the first")
    return NoisedText(bridge, ids, masked)
