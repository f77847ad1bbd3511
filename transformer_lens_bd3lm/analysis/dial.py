"""What turning the dial changes inside the model, on the same noised text.

``block_size`` only changes who reads whom. The same dual view ``[x_t | x_0]`` runs at a setting a
and at a setting b, and the two passes are compared place by place::

    cosine            r_a . r_b / (|r_a| |r_b|), mean over rows        a residual, [depth, pos]
    CKA               <K_a, K_b> / (|K_a| |K_b|)                       many residuals, [depth]
    attention change  1/2 sum_k |A_a - A_b|, mean over masked queries  patterns, [layer, head]
    KL                sum_v p_a log(p_a / p_b), nats                   predictions, [batch, pos]

Cosine asks whether a residual still points where it did; CKA (Kornblith et al. 2019) whether
residuals still lie about each other as they did, in whatever directions. K is their U-centred Gram
matrix (Song et al. 2012), of s samples x_i, zero on the diagonal::

    K_ij = x_i . x_j - r_i / (s - 2) - r_j / (s - 2) + sum_k r_k / ((s - 1) (s - 2))
    r_i  = sum_{j != i} x_i . x_j

so ``<K_a, K_b>`` is the debiased HSIC: about 0 for unrelated samples, where plain centring makes
few samples look alike by chance. K has s (s - 3) / 2 degrees of freedom, so chance alone still
scatters it by about one over their root: 0.22 at 8 samples, 0.02 at 70.

Position p of the noisy stream and of the clean stream are two keys: attention that goes from one to
the other has moved. Only masked positions are trained to predict, so only their predictions and
their attention are compared.

It does not say at which setting the model is better; the likelihood over the dial does.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from rich.table import Table
from torch import Tensor

from transformer_lens_bd3lm.checkpoint.views import check_ids, read_block_size
from transformer_lens_bd3lm.diffusion.noise import Noise
from transformer_lens_bd3lm.diffusion.replay import divergence
from transformer_lens_bd3lm.diffusion.rows import resolve
from transformer_lens_bd3lm.diffusion.subs import masked_log_probs
from transformer_lens_bd3lm.errors import InputError, NotExactError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


@dataclass(frozen=True)
class DialComparison:
    """One noised text at two settings of the dial; float64 on the CPU.

    Attributes:
        model: the checkpoint's name.
        a: the dial of one pass, as it was given.
        b: the dial of the other.
        tokens: the finished texts x_0 ``[batch, pos]``.
        masked: where x_t hides them ``[batch, pos]``.
        words: the first row's tokens as text.
        noisy: residuals of the noisy stream.
        clean: residuals of the clean stream; it never reads the noisy one, but the dial turns its
            mask as well.
        attention_change: total variation distance between the attention of masked queries at a and
            b, mean over them ``[layer, head]``; 0 is the same, 1 is no key in common.
        noisy_share: of that attention, the part on the noisy stream, which is the query's own
            block; the rest is on earlier clean blocks. At a and at b ``[2, layer, head]``.
        kl: KL(p_a || p_b) in nats of the SUBS predictions at masked positions ``[batch, pos]``; NaN
            elsewhere.
    """

    model: str
    a: int | str
    b: int | str
    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    masked: Bool[Tensor, "batch pos"] = field(repr=False)
    words: tuple[str, ...] = field(repr=False)
    noisy: StreamChange = field(repr=False)
    clean: StreamChange = field(repr=False)
    attention_change: Float[Tensor, "layer head"] = field(repr=False)
    noisy_share: Float[Tensor, "2 layer head"] = field(repr=False)
    kl: Float[Tensor, "batch pos"] = field(repr=False)

    @property
    def mean_kl(self) -> float:
        """Mean KL(p_a || p_b) over masked positions, nats."""
        return float(self.kl[self.masked].mean())

    @property
    def title(self) -> str:
        """Which model, and between which settings."""
        return f"{self.model}: block size {self.a} → {self.b}"

    def table(self) -> Table:
        """A row a depth: what is left of the residuals, and how far attention moved."""
        table = Table(title=self.title, title_justify="left")
        table.caption, table.caption_justify = self.caption(), "left"
        for name in (
            "after",
            "cosine\nnoisy",
            "cosine\nclean",
            "CKA\nnoisy",
            "CKA\nclean",
            "attn.\nchange",
            "most in\nhead",
            f"own block\n{self.a} → {self.b}",
        ):
            table.add_column(name, justify="left" if name == "after" else "right")
        layers = len(self.attention_change)
        for depth, name in enumerate(["embed", *(f"layer {i}" for i in range(layers))]):
            streams = (self.noisy, self.clean)
            alike = [float(s.cosine[depth].mean()) for s in streams]
            alike += [float(s.cka[depth]) for s in streams]
            attention = self.attention_cells(depth - 1) if depth else ["–"] * 3
            table.add_row(name, *map(two_figures, alike), *attention)
        return table

    def attention_cells(self, layer: int) -> list[str]:
        """One layer's mean change, the head that changes most, and the share on the own block."""
        change = self.attention_change[layer]
        head = int(change.argmax())
        shares = [two_figures(float(share)) for share in self.noisy_share[:, layer].mean(-1)]
        return [
            two_figures(float(change.mean())),
            f"{head} ({two_figures(float(change[head]))})",
            " → ".join(shares),
        ]

    def caption(self) -> str:
        """What the dial does to the predictions."""
        row, position = divmod(int(self.kl.nan_to_num(-1.0).argmax()), self.kl.shape[1])
        return (
            f"KL(p_{self.a} || p_{self.b}) at {int(self.masked.sum())} masked positions: mean "
            f"{self.mean_kl:.3f} nats, most {float(self.kl[row, position]):.3f} at position "
            f"{position}" + (f" of row {row}" if len(self.kl) > 1 else "")
        )

    def plot(self) -> "Figure":
        """The same as a figure: cosine and KL along the text, attention change by head."""
        # A floor above this one, so imported when it is there.
        from transformer_lens_bd3lm.plots import dial_figure

        return dial_figure(self)


def two_figures(value: float) -> str:
    """A number between -1 and 1 in a table; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.2f}"


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
    a: Float[Tensor, "batch both d_model"], b: Float[Tensor, "batch both d_model"]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """One depth of :class:`StreamChange`'s figures, of the noisy stream and of the clean one."""
    return [
        (
            cosine(x, y),
            cka(x.flatten(0, 1), y.flatten(0, 1)),
            cka(x.transpose(0, 1), y.transpose(0, 1)),
        )
        for x, y in zip(a.chunk(2, dim=1), b.chunk(2, dim=1), strict=True)
    ]


def attention_change(
    a: Float[Tensor, "query head both"], b: Float[Tensor, "query head both"]
) -> Float[Tensor, "3 head"]:
    """One layer's total variation distance, and the share on the noisy stream at a and at b."""
    a, b = wide(a), wide(b)
    noisy = a.shape[-1] // 2
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
        masked: where x_t is the mask ``[batch, pos]``.
    """

    bridge: Any
    tokens: Int[Tensor, "batch pos"]
    masked: Bool[Tensor, "batch pos"]

    def pass_at(
        self,
        block_size: int | str | None,
        timesteps: Any,
        hooks: list[tuple[str, Any]],
        see: Callable[[str, Tensor], None],
        names: Iterable[str] | None = None,
    ) -> Float[Tensor, "query d_vocab"]:
        """One dual forward, or a single one without blocks: raw logits of the masked positions.

        Every residual ``[batch, 2 pos, d_model]``, and each layer's attention of masked queries
        ``[query, head, 2 pos]``, is shown to ``see`` on the way, after the hooks; with ``names``,
        what is at those hook points in place of the residuals.
        """
        bridge = self.bridge

        def residual(x: Tensor, hook: Any, name: str) -> None:
            see(name, x)

        def pattern(x: Tensor, hook: Any, name: str) -> None:
            see(name, x[:, :, : self.masked.shape[1]].transpose(1, 2)[self.masked])

        own: list[tuple[str, Any]] = [
            (name, partial(residual, name=name)) for name in names or residuals(bridge)
        ]
        own += [(name, partial(pattern, name=name)) for name in patterns(bridge)]
        x_t = self.tokens.masked_fill(self.masked, bridge.cfg.mask_token_id)
        how: dict[str, Any] = {"timesteps": timesteps}
        if bridge.original_model.config.cross_attn:
            how |= {"clean": self.tokens, "block_size": block_size}
        with bridge.hooks(fwd_hooks=[*hooks, *own]):
            logits = bridge(x_t, **how)
        return logits[self.masked]


def residuals(bridge: Any) -> list[str]:
    """Hook names of the stream, by depth."""
    layers = range(bridge.cfg.n_layers)
    return ["blocks.0.hook_resid_pre", *(f"blocks.{i}.hook_resid_post" for i in layers)]


def patterns(bridge: Any) -> list[str]:
    """Hook names of the attention patterns, by layer."""
    return [f"blocks.{i}.attn.hook_pattern" for i in range(bridge.cfg.n_layers)]


def read_noised_text(bridge: Any, tokens: Any, x_t: Any, seed: int) -> NoisedText:
    """Read texts and masks at the door; nothing has been run then.

    Raises:
        InputError: for what does not fit.
    """
    config, mask_id = bridge.original_model.config, bridge.cfg.mask_token_id
    ids = bridge.to_tokens(tokens, truncate=False) if isinstance(tokens, str) else tokens
    ids = check_ids(ids, config.vocab_size, "tokens").to(bridge.cfg.device)
    if not 2 <= ids.shape[1] <= config.model_length:
        raise InputError(
            f"{ids.shape[1]} tokens: give BOS and at least one more, at most {config.model_length}"
        )
    if bool((ids == mask_id).any()):
        raise InputError("tokens hold the mask: give a finished text, and masks in x_t")
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
    masked = noised == mask_id
    other = ~masked & (noised != ids)
    if bool(other.any()):
        row, position = other.nonzero()[0].tolist()
        raise InputError(
            f"x_t has id {int(noised[row, position])} at row {row}, position {position}, and "
            f"tokens {int(ids[row, position])}: noise only masks, leave the rest as it is"
        )
    if bool(masked[:, 0].any()) or not bool(masked.any()):
        what = "BOS, which is given" if bool(masked[:, 0].any()) else "nothing to predict"
        raise InputError(f"x_t masks {what}: mask some position after the first")
    return NoisedText(bridge, ids, masked)


@torch.no_grad()
def compare_block_sizes(
    bridge: Any,
    tokens: Any,
    a: Any,
    b: Any,
    *,
    x_t: Any = None,
    seed: int = 0,
    hooks: Any = None,
    timesteps: Any = None,
) -> DialComparison:
    """What the dial changes inside the model between block sizes a and b, on one noised text.

    Two dual forwards; the bridge's own dial stays where it is. Of the first pass the residuals, and
    masked queries' attention, are kept until the second has been compared with them.

    Args:
        bridge: a BD3LM bridge.
        tokens: a string, or ids ``[batch, pos]``; position 0 is BOS. A finished text.
        a: a block size in tokens, or ``"full"``.
        b: another. A checkpoint at a block size that it was not trained at is off-distribution.
        x_t: the ids under masks of your choice ``[batch, pos]``. By default each position but BOS
            is masked with probability 1/2: as a run under ``Noise(seed)`` is at time 1/2.
        seed: of those masks.
        hooks: TransformerLens's ``[(name, fn), ...]``, in both passes; they see ``[noisy |
            clean]``. Hooks that are set on the bridge fire too.
        timesteps: sigma of the forward, for checkpoints that see it.

    Raises:
        InputError: for what does not fit; a ``BlockSizeError`` also without blocks
            (``cross_attn=False``), where there is no dial.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: in training with dropout, which would change more than the dial does.
    """
    config = bridge.original_model.config
    for size in (a, b):
        read_block_size(size, config.model_length, config.cross_attn)
    if bridge.training and bridge.cfg.dropout:
        raise NotExactError("the bridge is in training, with dropout: call bridge.eval()")
    text = read_noised_text(bridge, tokens, x_t, seed)
    pairs = list(hooks or [])
    resolve(bridge, [name for name, _ in pairs])

    before: dict[str, Tensor] = {}
    changes: dict[str, Any] = {}
    depths, layers = residuals(bridge), patterns(bridge)

    def keep(name: str, x: Tensor) -> None:
        # A hook further on may write into the stream.
        before[name] = x.clone() if name in depths else x

    def compare(name: str, x: Tensor) -> None:
        change = residual_change if name in depths else attention_change
        changes[name] = change(before[name], x)

    logits_a = text.pass_at(a, timesteps, pairs, keep)
    logits_b = text.pass_at(b, timesteps, pairs, compare)
    masked = text.masked.cpu()
    kl = torch.full(masked.shape, torch.nan, dtype=torch.float64)
    kl[masked] = prediction_change(logits_a, logits_b, bridge.cfg.mask_token_id)
    noisy, clean = (
        StreamChange(*map(torch.stack, zip(*stream, strict=True)))
        for stream in zip(*(changes[name] for name in depths), strict=True)
    )
    change, *shares = torch.stack([changes[name] for name in layers], dim=1)
    return DialComparison(
        model=Path(bridge.cfg.model_name).name,
        a=a,
        b=b,
        tokens=text.tokens.cpu(),
        masked=masked,
        words=tuple(bridge.tokenizer.decode([token]) for token in text.tokens[0].tolist()),
        noisy=noisy,
        clean=clean,
        attention_change=change,
        noisy_share=torch.stack(shares),
        kl=kl,
    )
