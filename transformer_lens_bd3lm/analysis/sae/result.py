"""Scores of a sparse autoencoder at one hook point, beside a random dictionary."""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.checks import check_choice
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result, plain_values

ARMS = ("clean", "SAE", "random", "ablated")
"""What the hook point holds: its activation, an SAE's or a random dictionary's reconstruction of
it, or one constant."""
DICTIONARIES = ARMS[1:3]
ROWS = ("all", "masked", "revealed")


@dataclass(frozen=True, kw_only=True, repr=False)
class SaeScores(Result):
    """Explained variance, sparsity and recovered loss of an SAE, beside a random dictionary.

    Rows are counted positions under mask patterns, weighted as under a uniform t, given that their
    block has a mask. Explained variance is ``1 - sum |x - x_hat|^2 / sum |x - mean|^2`` with the
    mean over the same rows. Losses are float64, on the CPU.

    Attributes:
        model: the checkpoint's name.
        name: the hook point.
        sae: what the SAE is, in words.
        d_sae: number of its features, and of the random dictionary's.
        block_size: tokens per block that was asked for.
        kind: ``"exact"``, or ``"estimate"``, from drawn mask patterns.
        ablation: ``"mean"`` or ``"zero"``, the constant of the arm "ablated".
        tokens: number of counted tokens of each text ``[text]``.
        nelbo: NELBO of each text by masks left in its block, from 1 on, in each of ``ARMS`` ``[arm,
            text, masks]``, nats; NaN where no block of the text has so many tokens. Its sum over
            masks is the NELBO.
        nelbo_by_time: NELBO over each range of t ``[arm, text, range]``, nats.
        times: ends of these ranges, ascending.
        nll: exact NLL of each text under the sampler ``[arm, text]``, nats; None for an estimate.
        explained: explained variance of each of ``DICTIONARIES`` at each of ``ROWS`` ``[dictionary,
            3]``; NaN where the rows are all alike.
        explained_by_masks: the same at masked rows, by masks left ``[dictionary, masks]``.
        l0: mean number of active features at each of ``ROWS`` ``[dictionary, 3]``.
        l0_by_masks: the same at masked rows, by masks left ``[dictionary, masks]``.
        dead: share of features that are active at no row ``[dictionary]``.
        trained_at: as in :class:`.Exact`.
        contract: what was measured.
    """

    model: str
    name: str
    sae: str
    d_sae: int
    block_size: int
    kind: Literal["exact", "estimate"]
    ablation: str
    tokens: Int[Tensor, " text"] = field(repr=False)
    nelbo: Float[Tensor, "arm text masks"] = field(repr=False)
    nelbo_by_time: Float[Tensor, "arm text range"] = field(repr=False)
    times: tuple[float, ...]
    nll: Float[Tensor, "arm text"] | None = field(repr=False)
    explained: Float[Tensor, "dictionary 3"] = field(repr=False)
    explained_by_masks: Float[Tensor, "dictionary masks"] = field(repr=False)
    l0: Float[Tensor, "dictionary 3"] = field(repr=False)
    l0_by_masks: Float[Tensor, "dictionary masks"] = field(repr=False)
    dead: Float[Tensor, " dictionary"] = field(repr=False)
    trained_at: tuple[int, ...] = ()
    contract: Contract

    def recovered(self, loss: str = "nelbo", by: str | None = None, level: float = 0.95) -> Effects:
        """Compute the share of the ablation's loss that is recovered, with intervals over texts.

        It is ``(L_ablated - L_spliced) / (L_ablated - L_clean)``, each loss summed over texts, 1
        for an SAE that changes no prediction and 0 for one that does no better than the constant.
        The interval is that of a ratio of means, linearized at the ratio. Where ablation costs
        nothing, it is NaN.

        Args:
            loss: ``"nelbo"``, or ``"nll"``, which is known if exact.
            by: None for all masks; ``"masks"`` by number of masks left; ``"time"`` by range of t.
                Both are of the NELBO.
            level: of the intervals.

        Returns:
            Cells ``[dictionary]``, or ``[dictionary, masks or range]``.

        Raises:
            InputError: for another loss or split, or one that is not known.
        """
        losses = self._losses(loss, by)
        cost = losses[3] - losses[0]
        gain = losses[3] - losses[1:3]
        mean = cost.nanmean(0)
        mean = mean.where(mean > 1e-12 * losses[0].nanmean(0).abs(), torch.nan)
        ratio = (gain.nanmean(1) / mean)[:, None]
        return mean_effects((ratio + (gain - ratio * cost) / mean).transpose(0, 1), level=level)

    def lost(self, loss: str = "nelbo", level: float = 0.95) -> Effects:
        """Compute nats a token that are lost: with the SAE, the random dictionary, the constant.

        Args:
            loss: ``"nelbo"`` or ``"nll"``.
            level: of the intervals over texts.

        Raises:
            InputError: for another loss, or one that is not known.
        """
        losses = self._losses(loss, None)
        return mean_effects(((losses[1:] - losses[0]) / self.tokens).T, level=level)

    def _losses(self, loss: str, by: str | None) -> Float[Tensor, "arm text *cell"]:
        """Return a loss of each arm and text, by masks or time if asked for.

        Raises:
            InputError: for another loss or split, or one that is not known.
        """
        check_choice("loss", loss, ("nelbo", "nll"))
        if by not in (None, "masks", "time"):
            raise InputError(f'by={by!r}: give "masks", "time" or None')
        if loss == "nelbo":
            split = {"masks": self.nelbo, "time": self.nelbo_by_time}
            return self.nelbo.nansum(-1) if by is None else split[by]
        if self.nll is None:
            raise InputError('loss="nll": this is an estimate, of the NELBO alone')
        if by is not None:
            raise InputError(f'by={by!r}: only the NELBO is a sum over masks; leave loss="nelbo"')
        return self.nll

    def _figures(self) -> str:
        (sae, random), explained = self.recovered().mean.tolist(), float(self.explained[0, 0])
        return (
            f"{self.name}: {self.kind} NELBO recovered {sae:.1%}, random {random:.1%}, explained "
            f"variance {explained:.3f}, L0 {float(self.l0[0, 0]):.1f}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return scores, shares recovered and losses of each text as plain values for JSON."""
        kinds = ("nelbo",) if self.nll is None else ("nelbo", "nll")
        values = dict(vars(self)) | {
            "recovered": {loss: self.recovered(loss).to_dict() for loss in kinds},
            "recovered_by_masks": self.recovered(by="masks").to_dict(),
            "recovered_by_time": self.recovered(by="time").to_dict(),
            "lost_nats_per_token": {loss: self.lost(loss).to_dict() for loss in kinds},
            "arms": ARMS,
            "contract": vars(self.contract),
        }
        return plain_values(values)
