"""Two passes over one noised text, compared place by place.

The two passes differ in one thing: the dial, or the weights. What is compared::

    cosine            r_a . r_b / (|r_a| |r_b|), mean over rows        a residual, [depth, pos]
    CKA               <K_a, K_b> / (|K_a| |K_b|)                       many residuals, [depth]
    attention change  1/2 sum_k |A_a - A_b|, mean over predictions     patterns, [layer, head]
    KL                sum_v p_a log(p_a / p_b), nats                   predictions, [batch, pos]

Cosine asks whether a residual still points where it did; CKA (Kornblith et al. 2019) whether
residuals still lie about each other as they did, in whatever directions. K is their U-centred Gram
matrix (Song et al. 2012), of s samples x_i, zero on the diagonal::

    K_ij = x_i . x_j - r_i / (s - 2) - r_j / (s - 2) + sum_k r_k / ((s - 1) (s - 2))
    r_i  = sum_{j != i} x_i . x_j

so ``<K_a, K_b>`` is the debiased HSIC: about 0 for unrelated samples, where plain centring makes
few samples look alike by chance. K has s (s - 3) / 2 degrees of freedom, so chance alone still
scatters it by about one over their root: 0.22 at 8 samples, 0.02 at 70.

Only masked positions are trained to predict, so only their predictions and their attention are
compared. The autoregressive baseline masks nothing: a token is predicted one position before it.

It does not say what the passes are; see ``dial``.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.bridge.texts import read_ids
from transformer_lens_bd3lm.checks import check_bos_given, check_finished, check_noised
from transformer_lens_bd3lm.denoising.noise import Noise
from transformer_lens_bd3lm.denoising.pass_hooks import read_pass_hooks
from transformer_lens_bd3lm.denoising.replay import divergence
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.model.inputs import check_ids
from transformer_lens_bd3lm.model.subs import masked_log_probs

FEWEST = 8  # samples of a CKA
CHUNK = 256  # masked positions whose predictions are in float64 at once
ROUNDING = 4  # units in the last place that a residual may be off


@dataclass(frozen=True)
class StreamChange:
    """How alike one stream's residuals at the two settings are, from 1 (the same) down.

    Depth 0 is the embedding, depth i + 1 is after layer i.

    Attributes:
        cosine: mean over rows ``[depth, pos]``.
        cka: linear CKA, debiased, over all rows and positions together ``[depth]``.
        cka_by_position: the same over the rows at one position ``[depth, pos]``.

    A CKA is NaN of fewer than 8 samples, which chance alone scatters by more than 0.22, and where
    samples differ by no more than rounding, or one alone differs from all others. The positions of
    one text are no independent samples: take many rows before you read much into small differences.
    """

    cosine: Float[Tensor, "depth pos"]
    cka: Float[Tensor, " depth"]
    cka_by_position: Float[Tensor, "depth pos"]


def wide(x: Tensor) -> Float[Tensor, "..."]:
    """In float64 on the CPU, where every figure is made."""
    return x.detach().cpu().double()


def cosine(
    a: Float[Tensor, "batch pos d_model"], b: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, " pos"]:
    """Mean over rows of the cosine between two residuals."""
    return torch.cosine_similarity(wide(a), wide(b), dim=-1, eps=1e-300).mean(0)


def hsic(
    x: Float[Tensor, "*where sample d_x"], y: Float[Tensor, "*where sample d_y"]
) -> Float[Tensor, "*where"]:
    """``<K_x, K_y>`` of U-centred Gram matrices, from centred samples, without the matrices.

    ``sum_ij (x_i . x_j) (y_i . y_j)`` is ``|x^T y|^2``, or a sum over pairs where they are fewer.
    """
    s = x.shape[-2]
    pairs = s <= x.shape[-1]
    plain = (x @ x.mT) * (y @ y.mT) if pairs else (x.mT @ y).square()
    x_own, y_own = x.square().sum(-1), y.square().sum(-1)
    among = x_own.sum(-1) * y_own.sum(-1) / ((s - 1) * (s - 2))
    return plain.sum((-2, -1)) - s / (s - 2) * (x_own * y_own).sum(-1) + among


def cka(
    a: Float[Tensor, "*where sample d_model"], b: Float[Tensor, "*where sample d_model"]
) -> Float[Tensor, "*where"]:
    """Linear CKA, debiased; NaN of few samples, and where only rounding tells samples apart."""
    if a.shape[-2] < FEWEST:
        return torch.full(a.shape[:-2], torch.nan, dtype=torch.float64)
    x, y = (wide(each) for each in (a, b))
    x_centred, y_centred = (each - each.mean(-2, keepdim=True) for each in (x, y))
    norms = []
    for raw, centred in ((x, x_centred), (y, y_centred)):
        own = hsic(centred, centred)
        norms.append(own.masked_fill(own <= rounding(raw, centred, a.dtype), torch.nan).sqrt())
    return hsic(x_centred, y_centred) / (norms[0] * norms[1])


def rounding(
    raw: Float[Tensor, "*where sample d_model"],
    centred: Float[Tensor, "*where sample d_model"],
    dtype: torch.dtype,
) -> Float[Tensor, "*where"]:
    """What samples that differ by rounding alone may add to ``|K|^2``.

    Off by d, an entry of K is off by about ``2 |x| |d| + |d|^2``. The sums of :func:`hsic` cancel,
    so in float64 it is the square that rounds.
    """
    x, d = (each.square().sum(-1).mean(-1).sqrt() for each in (centred, raw))
    d = d * ROUNDING * max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps ** 0.5)
    return (raw.shape[-2] * (2 * x * d + d.square())).square()


def residual_change(
    a: Float[Tensor, "batch all d_model"], b: Float[Tensor, "batch all d_model"], streams: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One depth of :class:`StreamChange`'s figures, stream by stream."""
    return [
        (
            cosine(x, y),
            cka(x.flatten(0, 1), y.flatten(0, 1)),
            cka(x.transpose(0, 1), y.transpose(0, 1)),
        )
        for x, y in zip(a.chunk(streams, dim=1), b.chunk(streams, dim=1), strict=True)
    ]


def attention_change(
    a: Float[Tensor, "query head key"], b: Float[Tensor, "query head key"], streams: int = 2
) -> Float[Tensor, "3 head"]:
    """One layer's total variation distance, and the share on the noisy stream at a and at b."""
    a, b = wide(a), wide(b)
    noisy = a.shape[-1] // streams
    moved = (a - b).abs().sum(-1) / 2
    return torch.stack([moved, *(x[..., :noisy].sum(-1) for x in (a, b))]).mean(1)


def prediction_change(
    a: Float[Tensor, "query d_vocab"], b: Float[Tensor, "query d_vocab"], mask_id: int
) -> Float[Tensor, " query"]:
    """KL(p_a || p_b) in nats, from raw logits at masked positions."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return torch.cat(
        [divergence(*(masked_log_probs(wide(x), mask_id) for x in part)) for part in parts]
    )


@dataclass(frozen=True)
class NoisedText:
    """Texts, and where they are masked, on the bridge's device.

    Attributes:
        bridge: a BD3LM bridge.
        tokens: x_0 ``[batch, pos]``.
        masked: where x_t is the mask ``[batch, pos]``; what is predicted, where nothing is masked.
    """

    bridge: Any
    tokens: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]

    @property
    def streams(self) -> int:
        """Two with blocks, noisy and clean; else one."""
        return 2 if self.bridge.cfg.cross_attn else 1

    @property
    def queries(self) -> Bool[Tensor, "batch pos"]:
        """Where the masked tokens are predicted."""
        return self.masked.roll(-1, dims=1) if self.bridge.cfg.causal else self.masked

    def pass_at(
        self,
        block_size: int | str | None,
        timesteps: Any,
        hooks: Any,
        see: Callable[[str, Tensor], None],
        names: Iterable[str] | None = None,
    ) -> Float[Tensor, "query d_vocab"]:
        """One forward, in the dual view if there is one: raw logits of the masked tokens.

        Every residual ``[batch, all, d_model]``, and each layer's attention of the queries
        ``[query, head, all]``, is shown to ``see`` on the way, after the hooks; with ``names``,
        what is at those hook points in place of the residuals.
        """
        bridge, queries = self.bridge, self.queries

        def residual(x: Tensor, hook: Any, name: str) -> None:
            see(name, x)

        def pattern(x: Tensor, hook: Any, name: str) -> None:
            see(name, x[:, :, : queries.shape[1]].transpose(1, 2)[queries])

        own: list[tuple[str, Any]] = [
            (name, partial(residual, name=name)) for name in names or residuals(bridge)
        ]
        own += [(name, partial(pattern, name=name)) for name in patterns(bridge)]
        x_t, how = self.tokens, {}
        if not bridge.cfg.causal:
            x_t = x_t.masked_fill(self.masked, bridge.cfg.mask_token_id)
        if bridge.cfg.cross_attn:
            how = {"clean": self.tokens, "block_size": block_size}
        given = read_pass_hooks(bridge, hooks).fns
        with read_pass_hooks(bridge, [*given, *own]).on():
            logits = bridge(x_t, timesteps=timesteps, **how)
        return logits[queries]


@dataclass(frozen=True)
class PassChange:
    """How alike two passes are; float64 on the CPU, but for the logits.

    Attributes:
        streams: residuals of the noisy stream, and of the clean one if there is one.
        attention: change, and the share on the noisy stream at a and at b ``[3, layer, head]``.
        logits: of the masked tokens ``[query, d_vocab]``, at a and at b.
    """

    streams: list[StreamChange]
    attention: Float[Tensor, "3 layer head"]
    logits: tuple[Tensor, Tensor]


def compare_passes(
    a: Callable[..., Tensor], b: Callable[..., Tensor], text: NoisedText
) -> PassChange:
    """Run one pass, keep what is looked at, and compare the other with it on the way.

    Args:
        a: a pass of ``text``, which takes ``see``.
        b: another, of the same shapes.
        text: what both run over.
    """
    before: dict[str, Tensor] = {}
    changes: dict[str, Any] = {}
    depths, layers = residuals(text.bridge), patterns(text.bridge)

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


def residuals(bridge: Any) -> list[str]:
    """Hook names of the stream, by depth."""
    layers = range(bridge.cfg.n_layers)
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in layers)]


def patterns(bridge: Any) -> list[str]:
    """Hook names of the attention patterns, by layer."""
    return [f"blocks.{i}.attn.hook_pattern" for i in range(bridge.cfg.n_layers)]


def read_noised_text(
    bridge: Any, tokens: Any, x_t: Any, seed: int, name: str = "tokens"
) -> NoisedText:
    """Read texts and masks at the door; nothing has been run then.

    Raises:
        InputError: for what does not fit.
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
            raise InputError("the autoregressive baseline (causal=True) sees no masks: drop x_t")
        return NoisedText(bridge, ids, torch.ones_like(ids).cumsum(1) > 1)
    if x_t is None:
        masked = Noise(seed).times(len(ids), 0, ids.shape[1]) < 0.5
        masked[:, 0] = False
        if not bool(masked.any()):
            raise InputError(f"seed={seed} masks nothing of so short a text: give another, or x_t")
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
