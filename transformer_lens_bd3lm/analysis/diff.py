"""Two checkpoints of one shape: what a change in training changed, and where.

Say one of them was trained with a signal that the other lacks. Three views, from the outside of the
network to the inside::

    weights       how far every component moved                       components.py
    predictions   KL(p_a || p_b) under the same masks, and what it does to the true token
    activations   the same noised text through both, layer by layer   passes.py

All of it is paired: one text, one x_t, one dial. The bound's difference uses the same masks for
both, so what noise they share drops out.

It says that something moved, not why: two runs that differ by their seed alone move too.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from rich.console import Group
from rich.table import Table
from torch import Tensor

from transformer_lens_bd3lm.analysis.components import (
    WeightChange,
    check_same_shape,
    compare_weights,
    together,
)
from transformer_lens_bd3lm.analysis.passes import (
    NoisedText,
    PassChange,
    compare_passes,
    prediction_change,
    read_noised_text,
    wide,
)
from transformer_lens_bd3lm.bridge.forward import read_dial
from transformer_lens_bd3lm.diffusion.nelbo import Nelbo, nelbo
from transformer_lens_bd3lm.diffusion.subs import masked_log_probs
from transformer_lens_bd3lm.diffusion.units import between, drawn_again
from transformer_lens_bd3lm.errors import InputError, NotExactError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND = ("cross_attn", "causal", "time_conditioning")
CHUNK = 256  # masked positions whose predictions are in float64 at once
SHOWN = 12  # components, and tokens, in a table


@dataclass(frozen=True)
class TextChange:
    """One noised text under both checkpoints; float64 on the CPU.

    Attributes:
        block_size: the dial of both.
        tokens: the texts x_0 ``[batch, pos]``.
        masked: where x_t hides them ``[batch, pos]``; what is predicted, for the autoregressive
            baseline.
        words: the tokens as text, row by row.
        kl: KL(p_a || p_b), nats ``[batch, pos]``; NaN where nothing is predicted, here and below.
        kl_reverse: KL(p_b || p_a), nats ``[batch, pos]``.
        log_p: of the true token under a and under b, nats ``[2, batch, pos]``.
        agree: whether both have the same most likely token ``[batch, pos]``; False elsewhere.
        bounds: the NELBO of the texts under a and b, from the same masks; None with time
            conditioning, where there is no finite sum.
        passes: residuals, attention and what layers write, place by place.
    """

    block_size: int
    tokens: Int[Tensor, "batch pos"] = field(repr=False)
    masked: Bool[Tensor, "batch pos"] = field(repr=False)
    words: list[list[str]] = field(repr=False)
    kl: Float[Tensor, "batch pos"] = field(repr=False)
    kl_reverse: Float[Tensor, "batch pos"] = field(repr=False)
    log_p: Float[Tensor, "2 batch pos"] = field(repr=False)
    agree: Bool[Tensor, "batch pos"] = field(repr=False)
    bounds: tuple[Nelbo, Nelbo] | None = field(repr=False)
    passes: PassChange = field(repr=False)

    @property
    def mean_kl(self) -> float:
        """KL(p_a || p_b), nats, mean over what is predicted."""
        return float(self.kl[self.masked].mean())

    @property
    def agreement(self) -> float:
        """How often the most likely token is the same."""
        return float(self.agree[self.masked].double().mean())

    @property
    def gain(self) -> float:
        """Nats that the true token is more likely under b, mean over what is predicted."""
        return float((self.log_p[1] - self.log_p[0])[self.masked].mean())

    def bound_difference(
        self, level: float = 0.95, resamples: int = 2000
    ) -> tuple[float, float, tuple[float, float] | None]:
        """Nats a token that b's bound is above a's, its standard error, and interval over rows.

        Args:
            level: how often such intervals should cover the truth.
            resamples: of the bootstrap over rows, which are taken for texts.

        Raises:
            InputError: with time conditioning, where there is no bound to estimate.
        """
        if self.bounds is None:
            raise InputError("these checkpoints see t (time_conditioning=True): no bound is known")
        a, b = self.bounds
        moved = b.replicates - a.replicates
        tokens = a.total_tokens
        value, error = float(moved.mean(0).sum()) / tokens, 0.0
        if len(moved) > 1:
            error = float(moved.sum(-1).std()) / tokens / len(moved) ** 0.5
        if a.texts < 2:
            return value, error, None
        again, counted = drawn_again(
            torch.stack([moved.mean(0), a.token_counts.double()]), resamples
        )
        return value, error, between(again / counted, level)

    def most(self, count: int = SHOWN) -> list[tuple[int, int]]:
        """Row and position of the predictions that differ most, by KL(p_a || p_b)."""
        order = self.kl.nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
        found = [divmod(int(i), self.kl.shape[1]) for i in order[: int(self.masked.sum())]]
        return found[:count]


@dataclass(frozen=True)
class Diff:
    """What differs between two checkpoints of one shape.

    Attributes:
        a: what one is called.
        b: what the other is called.
        weights: every component, the largest relative change first.
        text: predictions and activations; None if no text was given.
    """

    a: str
    b: str
    weights: list[WeightChange] = field(repr=False)
    text: TextChange | None

    @property
    def all_weights(self) -> WeightChange:
        """All components as one."""
        return together("all weights", self.weights)

    def at(self, component: str) -> WeightChange:
        """A component by name, or all that begin so: ``"blocks.3"``, ``"blocks.3.attn.q"``.

        Raises:
            InputError: if there is none.
        """
        parts = [
            each for each in self.weights if f"{each.name}.".startswith(component.rstrip(".") + ".")
        ]
        if not parts:
            raise InputError(f"{component!r} is no component: they are named as {self.names()}")
        return together(component, parts)

    def names(self) -> str:
        """How components are called."""
        return ", ".join(sorted({each.name for each in self.weights})[:: len(self.weights) // 6])

    def tables(self) -> Iterator[Table]:
        """Weights; and with a text, activations by layer and the predictions that moved most."""
        yield self.weight_table()
        if self.text is not None:
            yield self.layer_table()
            yield self.prediction_table()

    def table(self) -> Group:
        """All tables, to be printed."""
        return Group(*self.tables())

    def weight_table(self) -> Table:
        """The components that moved most, and all together."""
        table = titled(f"{self.a} → {self.b}: weights")
        table.caption = "Relative change: |b - a| / |a|. Float64."
        for name in ("component", "relative\nchange", "cosine", "largest\ndifference", "changed"):
            table.add_column(name, justify="left" if name == "component" else "right")
        moved = [each for each in self.weights if each.changed]
        for i, each in enumerate([*moved[:SHOWN], self.all_weights]):
            table.add_row(
                each.name, f"{each.relative:.4g}", f"{each.cosine:.6f}", f"{each.largest:.3g}",
                f"{each.changed:,} of {each.parameters:,}",
                end_section=i == len(moved[:SHOWN]) - 1,
            )  # fmt: skip
        return table

    def layer_table(self) -> Table:
        """A row a depth: what is left of the residuals, what is written, how attention moved."""
        text = self.text
        assert text is not None
        streams = text.passes.streams
        names = ("noisy", "clean") if len(streams) == 2 else ("",)
        table = titled("activations, on one noised text")
        table.caption = (
            "cosine, CKA: 1 is the same. attn out, mlp out: |b - a| / |a| of what is written, "
            f"{names[0] or 'the only'} stream. attn. change: total variation, 0 is the same."
        )
        columns = ["after\nlayer", *(f"cosine\n{name}" for name in names)]
        columns += [*(f"CKA\n{name}" for name in names), "attn\nout", "mlp\nout", "attn.\nchange"]
        for name in (*columns, "most:\nhead"):
            table.add_column(name, justify="right")
        change, written = text.passes.attention[0], text.passes.written
        assert written is not None
        for depth, name in enumerate(["embed", *map(str, range(len(change)))]):
            alike = [float(stream.cosine[depth].mean()) for stream in streams]
            alike += [float(stream.cka[depth]) for stream in streams]
            cells = [f"{x:.4f}" if x == x else "–" for x in alike]
            if depth:
                heads = change[depth - 1]
                cells += [f"{float(x):.4f}" for x in written[:, depth - 1, 0]]
                cells += [f"{float(heads.mean()):.4f}"]
                cells += [f"{int(heads.argmax())}: {float(heads.max()):.4f}"]
            table.add_row(name, *cells)
        return table

    def prediction_table(self) -> Table:
        """The predictions that moved most, and all together."""
        text = self.text
        assert text is not None
        table = titled(f"predictions, {int(text.masked.sum())} masked tokens")
        table.caption = (
            f"All: KL {text.mean_kl:.4f} nats, the same first choice at {text.agreement:.1%}, "
            f"log p of the true token {text.gain:+.4f} nats."
        )
        if text.bounds is not None:
            value, error, interval = text.bound_difference()
            spread = "" if interval is None else " [{:+.4f}, {:+.4f}]".format(*interval)
            table.caption += f" NELBO: {value:+.4f} ± {error:.4f} nats a token{spread}."
        for name in ("row", "position", "token", f"log p\n{self.a}", f"log p\n{self.b}", "KL"):
            table.add_column(name, justify="left" if name == "token" else "right")
        for row, at in text.most():
            log_p = [f"{float(x):.3f}" for x in text.log_p[:, row, at]]
            word = repr(text.words[row][at])
            table.add_row(str(row), str(at), word, *log_p, f"{float(text.kl[row, at]):.4f}")
        return table

    def plot(self) -> "Figure":
        """Weights by component and layer, attention by head, residuals and what layers write."""
        # A floor above this one, so imported when it is there.
        from transformer_lens_bd3lm.plots_checkpoints import diff_figure

        return diff_figure(self)


def titled(title: str) -> Table:
    """An empty table."""
    return Table(title=title, title_justify="left", caption_justify="left")


def check_same_kind(a: Any, b: Any, block_size: Any) -> int:
    """The dial of both, where they read a text alike.

    Raises:
        InputError: for other kinds, vocabularies or dials.
        NotExactError: in training with dropout.
    """
    for key in KIND:
        one, other = (getattr(each.original_model.config, key) for each in (a, b))
        if one != other:
            raise InputError(
                f"{key} is {one} in a and {other} in b: they do not read a text alike. Leave the "
                "text out to compare weights; bd3lm.compare_models compares likelihoods"
            )
    if any(each.training and each.cfg.dropout for each in (a, b)):
        raise NotExactError("a bridge is in training, with dropout: call eval() on both")
    one, other = (None if each.tokenizer is None else each.tokenizer.get_vocab() for each in (a, b))
    if one is not None and other is not None and one != other:
        raise InputError(
            "a and b have different vocabularies: their predictions are not comparable"
        )
    if block_size is None and read_dial(a) != read_dial(b):
        raise InputError(
            f"the dial is at {read_dial(a)} in a and {read_dial(b)} in b: give one block_size= for "
            "both"
        )
    read_dial(b, block_size)
    return read_dial(a, block_size)


def predictions(
    text: NoisedText, logits: tuple[Tensor, Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``log p`` of the true tokens under a and b ``[query]``, and whether the first choice agrees.

    Chunk by chunk, in float64.
    """
    true = text.tokens[text.masked].cpu()
    for a, b, y in zip(*(x.split(CHUNK) for x in (*logits, true)), strict=True):
        p, q = (masked_log_probs(wide(x), text.bridge.cfg.mask_token_id) for x in (a, b))
        at = y[:, None]
        yield p.gather(-1, at)[:, 0], q.gather(-1, at)[:, 0], p.argmax(-1) == q.argmax(-1)


@torch.no_grad()
def diff(
    a: Any,
    b: Any,
    text: Any = None,
    *,
    names: tuple[str, str] = ("a", "b"),
    block_size: int | str | None = None,
    x_t: Any = None,
    seed: int = 0,
    replicates: int = 8,
    timesteps: Any = None,
) -> Diff:
    """What differs between two checkpoints of one shape: weights, predictions, activations.

    Args:
        a: a BD3LM bridge, as booted.
        b: another, of the same shape.
        text: a string, or ids ``[batch, pos]``, position 0 BOS; without one only weights are
            compared. CKA and intervals need several rows.
        names: what to call them.
        block_size: the dial of both; by default their own, if it is one.
        x_t: the ids under masks of your choice ``[batch, pos]``; by default each position but BOS
            is masked with probability 1/2, from ``seed``.
        seed: of those masks, and of the bound's.
        replicates: independent estimates of the bounds, under the same masks for both.
        timesteps: sigma of the forward, for checkpoints that see it.

    Raises:
        InputError: for other shapes, kinds, vocabularies or dials, and for what does not fit.
        NotExactError: if weights are processed, or in training with dropout.
        CheckpointError: if a weight is infinite or NaN.
    """
    check_same_shape(a, b)
    noised = None
    if text is not None:
        size = check_same_kind(a, b, block_size)
        noised = read_noised_text(a, text, x_t, seed)
    weights = compare_weights(a, b)
    if noised is None:
        return Diff(*names, weights, None)
    other = NoisedText(b, *(x.to(b.cfg.device) for x in (noised.tokens, noised.masked)))
    passes = compare_passes(
        *(partial(each.pass_at, size, timesteps, []) for each in (noised, other)),
        noised, written=True,
    )  # fmt: skip
    logits, masked = passes.logits, noised.masked.cpu()
    nothing = torch.full(masked.shape, torch.nan, dtype=torch.float64)
    mask_id = a.cfg.mask_token_id
    kl, kl_reverse = (
        nothing.masked_scatter(masked, prediction_change(*pair, mask_id))
        for pair in (logits, logits[::-1])
    )
    *log_p, agree = map(torch.cat, zip(*predictions(noised, logits), strict=True))
    bounds = None
    if not a.cfg.time_conditioning:
        method = "exact" if a.cfg.causal else "monte_carlo"
        how: dict[str, Any] = {"seed": seed, "replicates": replicates}
        sides = ((each, x.tokens) for each, x in ((a, noised), (b, other)))
        one, two = (nelbo(each, ids, block_size, method, **how) for each, ids in sides)
        bounds = one, two
    return Diff(
        *names,
        weights,
        TextChange(
            block_size=size,
            tokens=noised.tokens.cpu(),
            masked=masked,
            words=[[decoded(a, i) for i in row] for row in noised.tokens.tolist()],
            kl=kl,
            kl_reverse=kl_reverse,
            log_p=torch.stack([nothing.masked_scatter(masked, each) for each in log_p]),
            agree=torch.zeros_like(masked).masked_scatter(masked, agree),
            bounds=bounds,
            passes=passes,
        ),
    )


def decoded(bridge: Any, token: int) -> str:
    """A token as text, or its id without a tokenizer."""
    return str(token) if bridge.tokenizer is None else bridge.tokenizer.decode([token])
