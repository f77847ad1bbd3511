"""One feature of a sparse autoencoder: where it is active, what it does, and both by masks left."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import singledispatch
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.features.contexts import Context
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result, plain_values

KINDS = ("masked", "written")
ARMS = ("without the feature", "as large a change at random")


@dataclass(frozen=True, kw_only=True, repr=False)
class Feature(Result):
    """One feature of an SAE: contexts, density, activity, tokens, and the effect of its ablation.

    Rows are tokens under mask patterns of their block, at places that are masked or written (not
    masked), weighted as under a uniform t, given that their block has a mask. All of the texts
    float64, on the CPU.

    Attributes:
        model: the checkpoint's name.
        name: the hook point.
        sae: what the SAE is, in words.
        number: number of the feature.
        d_sae: number of features of the SAE.
        block_size: tokens per block that was asked for.
        kind: ``"exact"``: all mask patterns; or ``"estimate"``, from drawn ones.
        tokens: number of counted tokens of each text ``[text]``.
        ranges: ranges of masks left of the contexts, both ends included.
        contexts: the highest activations of different tokens, in each range, at masks and at
            written tokens, highest first.
        density: share of rows at which the feature is active, at masks and at written tokens
            ``[text, 2]``.
        rate: the same by masks left, from 1 on ``[text, 2, masks]``; NaN where there are no rows.
        histogram: share of all masked and of all written rows with an activation in each bin,
            without those of 0 ``[2, bin]``.
        edges: ends of the bins, in the activation's unit ``[bin + 1]``.
        nelbo: NELBO of each text by masks left, as it is ``[text, masks]``, nats.
        nelbo_change: its change in each of ``ARMS`` ``[2, text, masks]``, nats.
        kl: KL(as it is || arm) of the predictions, with the NELBO's weights ``[2, text, masks]``,
            nats.
        own_change: the part of ``nelbo_change`` at masks where the feature is active.
        own_weight: weight of these masks ``[text, masks]``; 1 is one token over all t.
        measured: probability of each word with the feature minus without it, mean over masks where
            it is active ``[d_vocab]``; NaN if there is none.
        direct: what the feature's own write adds to each word's logit, less the mean over words,
            mean over the same masks ``[d_vocab]``, nats; None where the hook point does not write
            to the residual stream.
        run_rate: share of the masked and of the written positions of a run at which it is active,
            by masks left ``[row, 2, masks]``.
        run_texts: number of each row's text ``[row]``.
        tokenizer: tokenizer of the model; None without one.
        trained_at: as in :class:`.Exact`.
        contract: what was measured.
    """

    model: str
    name: str
    sae: str
    number: int
    d_sae: int
    block_size: int
    kind: Literal["exact", "estimate"]
    tokens: Int[Tensor, " text"] = field(repr=False)
    ranges: tuple[tuple[int, int], ...]
    contexts: tuple[Context, ...] = field(repr=False)
    density: Float[Tensor, "text 2"] = field(repr=False)
    rate: Float[Tensor, "text 2 masks"] = field(repr=False)
    histogram: Float[Tensor, "2 bin"] = field(repr=False)
    edges: Float[Tensor, " edge"] = field(repr=False)
    nelbo: Float[Tensor, "text masks"] = field(repr=False)
    nelbo_change: Float[Tensor, "2 text masks"] = field(repr=False)
    kl: Float[Tensor, "2 text masks"] = field(repr=False)
    own_change: Float[Tensor, "2 text masks"] = field(repr=False)
    own_weight: Float[Tensor, "text masks"] = field(repr=False)
    measured: Float[Tensor, " d_vocab"] = field(repr=False)
    direct: Float[Tensor, " d_vocab"] | None = field(repr=False)
    run_rate: Float[Tensor, "row 2 run_masks"] = field(repr=False)
    run_texts: Int[Tensor, " row"] | None = field(default=None, repr=False)
    tokenizer: Any = field(default=None, repr=False)
    trained_at: tuple[int, ...] = ()
    contract: Contract = field(repr=False)

    @property
    def largest(self) -> float:
        """Highest activation; 0 for a feature that is active nowhere."""
        return max((context.activation for context in self.contexts), default=0.0)

    @property
    def mean_density(self) -> Float[Tensor, " 2"]:
        """Share of rows at which it is active, at masks and at written tokens."""
        return self.density.nanmean(0)

    def of(self, kind: str, masks: tuple[int, int]) -> list[Context]:
        """Return the contexts of one kind of place in one range of masks left.

        Raises:
            InputError: for another kind.
        """
        check_choice("kind", kind, KINDS)
        low, high = masks
        return [x for x in self.contexts if x.kind == kind and low <= x.masks_left <= high]

    def effect(self, by: str | None = None, level: float = 0.95) -> Effects:
        """Compute the change of the NELBO in each of ``ARMS``, nats a token, over texts.

        Args:
            by: None for all masks; ``"masks"`` by number of masks left.
            level: of the intervals.

        Returns:
            Cells ``[2]`` or ``[2, masks]``; above 0 where the feature helps.

        Raises:
            InputError: for another split.
        """
        return self._over_texts(self.nelbo_change, by, level)

    def divergence(self, by: str | None = None, level: float = 0.95) -> Effects:
        """Compute the divergence of the predictions in each of ``ARMS``, nats a token, over texts.

        Args:
            by: as for :meth:`effect`.
            level: of the intervals.

        Raises:
            InputError: for another split.
        """
        return self._over_texts(self.kl, by, level)

    def effect_where_active(self, by: str | None = None, level: float = 0.95) -> Effects:
        """Compute nats that are lost at a mask where the feature is active, in each of ``ARMS``.

        It is the mean change of -log p of the true token over these masks, with the NELBO's
        weights. The interval is that of a ratio of means over texts, linearized at the ratio.

        Args:
            by: as for :meth:`effect`.
            level: of the intervals.

        Raises:
            InputError: for another split.
        """
        change, weight = self.own_change.transpose(0, 1), self.own_weight[:, None]
        if _split(by) is None:
            change, weight = change.sum(-1), weight.sum(-1)
        mean = weight.mean(0)
        mean = mean.where(mean > 0, torch.nan)
        ratio = change.mean(0) / mean
        return mean_effects(ratio + (change - ratio * weight) / mean, level=level)

    def activity(self, level: float = 0.95) -> Effects:
        """Compute how often it is active in the texts, with intervals; cells ``[2, masks]``."""
        return mean_effects(self.rate, level=level)

    def run_activity(self, level: float = 0.95) -> Effects:
        """Compute how often it is active over the runs, with intervals; cells ``[2, masks]``."""
        return mean_effects(self.run_rate, self.run_texts, level=level)

    def top_words(
        self, which: str = "measured", n: int = 10, lowered: bool = False
    ) -> list[tuple[int, float]]:
        """Return the words that the feature raises most, or lowers, with their values.

        Args:
            which: ``"measured"``, changes of probability; or ``"direct"``, of logits.
            n: largest number of words.
            lowered: those that it lowers.

        Returns:
            Token ids and values, the largest change first; none for a feature without masks where
            it is active.

        Raises:
            InputError: for another kind, a number below 1, or where there is no direct effect.
        """
        check_choice("which", which, ("measured", "direct"))
        check_int("n", n, 1)
        values = self.measured if which == "measured" else self.direct
        if values is None:
            raise InputError(
                f'which="direct": {self.name} does not write to the residual stream; give '
                '"measured"'
            )
        signed = (-values if lowered else values).nan_to_num(-torch.inf)
        top = signed.topk(min(n, len(values)))
        return [
            (int(i), float(values[i]))
            for i, x in zip(top.indices, top.values, strict=True)
            if x > 0
        ]

    def word(self, token: int) -> str:
        """Return a token as text; its id without a tokenizer."""
        return str(token) if self.tokenizer is None else self.tokenizer.decode([token])

    def to_html(self, path: str | Path) -> Path:
        """Write the feature as an HTML file that a browser opens without a network.

        Args:
            path: a file name in a folder that exists.

        Returns:
            The file.

        Raises:
            InputError: for a name that cannot be written.
        """
        return feature_page(self, path)

    def _over_texts(self, values: Tensor, by: str | None, level: float) -> Effects:
        per_token = values.transpose(0, 1) / self.tokens[:, None, None]
        return mean_effects(per_token.sum(-1) if _split(by) is None else per_token, level=level)

    def _figures(self) -> str:
        masked = float(self.mean_density[0])
        return (
            f"{self.number} at {self.name}: active at {masked:.2%} of masks, ablation "
            f"{self.effect().text(0)} nats a token"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return contexts, densities, words and effects as plain values for JSON."""
        values = {name: x for name, x in vars(self).items() if name != "tokenizer"}
        which = ("measured",) if self.direct is None else ("measured", "direct")
        words = {
            name: {
                side: [{"token": i, "word": self.word(i), "value": x} for i, x in
                       self.top_words(name, 20, side == "lowered")]
                for side in ("raised", "lowered")
            }
            for name in which
        }  # fmt: skip
        return plain_values(
            values
            | {"contexts": [vars(context) for context in self.contexts]}
            | {"largest": self.largest, "words": words, "arms": ARMS}
            | {"effect_nats_per_token": self.effect().to_dict()}
            | {"effect_by_masks_nats_per_token": self.effect("masks").to_dict()}
            | {"effect_where_active_nats": self.effect_where_active().to_dict()}
            | {"kl_nats_per_token": self.divergence().to_dict()}
            | {"contract": vars(self.contract)}
        )


@dataclass(frozen=True, repr=False)
class Features(Result, Sequence[Feature]):
    """Several features of one SAE, measured on the same texts.

    Attributes:
        features: the features, in the order in which they were asked for.
    """

    features: tuple[Feature, ...]

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: Any) -> Any:
        """Return a feature by its place, or several as ``Features``."""
        return Features(self.features[index]) if isinstance(index, slice) else self.features[index]

    def to_html(self, folder: str | Path) -> Path:
        """Write a page of each feature, and an index that can be sorted and searched.

        Args:
            folder: a folder, new or empty or of such pages.

        Returns:
            The index, ``index.html`` in that folder.

        Raises:
            InputError: for a folder that cannot be written.
        """
        return feature_pages(self, folder)

    def _figures(self) -> str:
        first = self.features[0]
        return f"{len(self)} of {first.d_sae} features of {first.sae} at {first.name}"

    def to_dict(self) -> dict[str, Any]:
        """Return the values of every feature as plain values for JSON."""
        return {"features": [feature.to_dict() for feature in self.features]}


def _split(by: Any) -> str | None:
    """Check by what a loss is split.

    Raises:
        InputError: for another split.
    """
    if by not in (None, "masks"):
        raise InputError(f'by={by!r}: give "masks" or None')
    return by


@singledispatch
def feature_page(feature: Any, path: Any) -> Path:
    """Write a feature as an HTML file; ``show`` registers the function."""
    raise InputError(f"feature is {type(feature).__name__}: give what bd3lm.feature returns")


@singledispatch
def feature_pages(features: Any, folder: Any) -> Path:
    """Write features and their index as HTML files; ``show`` registers the function."""
    raise InputError(f"features are {type(features).__name__}: give what bd3lm.features returns")
