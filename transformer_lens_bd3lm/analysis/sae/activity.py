"""Which features of a sparse autoencoder are active over the steps of a run.

At each step of a finished run the active block's positions are masked or were written at an earlier
step. A feature is active where it is not 0. The overlap of the active sets A and B of one position
at two successive steps of a block is Jaccard's::

    |A and B| / |A or B|        1 the same features, 0 none in common; no value where both are empty

A random dictionary of as many features, of which as many are active, says how much two similar
activations share anyway. Steps of one text depend on each other: intervals are over texts.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.sae.dictionaries import RandomDictionary
from transformer_lens_bd3lm.analysis.sae.splice import check_fits, joined, sae_words
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.along import along, run_or_texts
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract, Result, plain_values

KINDS = ("masked", "written")
MOVES = ("masked, then masked", "masked, then written", "written, then written")


@dataclass(frozen=True, kw_only=True, repr=False)
class FeatureActivity(Result):
    """Active features over the steps of a run, beside a random dictionary; float64, CPU.

    Cells by masks left count masks of the row's block before the step, from 1 on; NaN where the run
    has no such rows.

    Attributes:
        model: the checkpoint's name.
        name: the hook point.
        sae: what the SAE is, in words.
        d_sae: number of its features, and of the random dictionary's.
        block_size: tokens per block.
        rows: number of positions at steps, masked and written, by masks left ``[2, masks]``.
        rate: share of these at which each feature of the SAE is active ``[2, masks, d_sae]``.
        l0: mean number of active features, of the SAE and of the random dictionary
            ``[dictionary, 2, masks]``.
        overlap_by_masks: mean overlap of a position's active sets at a step and at the next one,
            for each of ``MOVES``, by masks left before the first ``[dictionary, 3, masks]``.
        overlap: the same over all steps, mean over texts: SAE, random dictionary, and difference
            ``[3, 3]``, with intervals.
        contract: what was measured.
    """

    model: str
    name: str
    sae: str
    d_sae: int
    block_size: int
    rows: Int[Tensor, "kind masks"] = field(repr=False)
    rate: Float[Tensor, "kind masks d_sae"] = field(repr=False)
    l0: Float[Tensor, "dictionary kind masks"] = field(repr=False)
    overlap_by_masks: Float[Tensor, "dictionary move masks"] = field(repr=False)
    overlap: Effects = field(repr=False)
    contract: Contract = field(repr=False)

    @property
    def mean_rate(self) -> Float[Tensor, "kind d_sae"]:
        """Share of all masked, and of all written rows at which each feature is active."""
        active = (self.rate.nan_to_num() * self.rows[..., None]).sum(1)
        return active / self.rows.sum(1)[:, None]

    def top_features(self, n: int = 10, kind: str = "masked") -> Int[Tensor, " feature"]:
        """Return the features that are active most above the other kind of positions.

        Args:
            n: number of features.
            kind: ``"masked"`` or ``"written"``.

        Raises:
            InputError: for another kind, or a number below 1.
        """
        if kind not in KINDS:
            raise InputError(f'kind={kind!r}: give "masked" or "written"')
        check_int("n", n, 1)
        own = KINDS.index(kind)
        above = (self.mean_rate[own] - self.mean_rate[1 - own]).nan_to_num(-1.0)
        return above.argsort(descending=True, stable=True)[:n]

    def _figures(self) -> str:
        sae, random = (float(x[0]) for x in self.overlap.mean[:2])
        return f"{self.name}: overlap of successive steps at masks {sae:.2f}, random {random:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Return rates, numbers and overlaps as plain values for JSON."""
        values = dict(vars(self)) | {"contract": vars(self.contract), "moves": MOVES}
        return plain_values(values | {"overlap": self.overlap.to_dict()})


@torch.no_grad()
def feature_activity(
    source: Any,
    sae: Any,
    name: str,
    texts: Any = None,
    *,
    block_size: Any = None,
    row_texts: Any = None,
    seed: int = 0,
) -> FeatureActivity:
    """Measure which features are active over a run, at masked and at written positions.

    Nothing needs to have been recorded: the run is computed again, a step at a time, with its
    tokens pinned and under its own hooks.

    Args:
        source: a finished run; or a bridge, or a checkpoint's name, beside ``texts``.
        sae: anything with ``encode(x)`` and ``decode(features)``; see :func:`load_sae`.
        name: the hook point.
        texts: texts of one length, which are revealed in a random order; None beside a run.
        block_size: tokens per block, beside texts; the bridge's by default.
        row_texts: number of each row's text, if rows share texts, as in :func:`mean_effects`.
        seed: random seed of that order, and of the random dictionary.

    Raises:
        InputError: for arguments that do not fit, or an SAE of another width.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: where the bridge is no longer what the run was made with, or the run's own
            hooks return other values.
    """
    check_int("seed", seed, 0, 2**63 - 1)
    run = run_or_texts(source, texts, block_size, seed)
    check_fits(run.bridge, sae, name)
    own = _Tally(run, sae, name)
    random = RandomDictionary.like(own.mean, own.active.shape[-1], own.l0_of_all, seed)
    control = _Tally(run, random, name)
    by_text = torch.stack([own.overlap_by_text, control.overlap_by_text], dim=1)
    cells = torch.cat([by_text, by_text[:, :1] - by_text[:, 1:]], dim=1)
    return FeatureActivity(
        model=Path(run.bridge.cfg.model_name).name,
        name=name,
        sae=sae_words(sae),
        d_sae=own.active.shape[-1],
        block_size=run.block_size,
        rows=own.rows.long(),
        rate=own.active / own.rows[..., None],
        l0=torch.stack([x.active.sum(-1) / x.rows for x in (own, control)]),
        overlap_by_masks=torch.stack([x.overlap.sum(0) / x.pairs.sum(0) for x in (own, control)]),
        overlap=mean_effects(cells, row_texts),
        contract=Contract(
            target="active features of a position at a step; their overlap with the next step's",
            edited="nothing; the run's own hooks act as in the run",
            fixed="tokens, noise and reveal order of the run",
            masks="those that the run met",
        ),
    )


class _Tally:
    """Sums over the steps of a run, under one dictionary.

    Attributes:
        rows: number of rows ``[kind, masks]``.
        active: how often each feature is active ``[kind, masks, d_sae]``.
        overlap: sum of overlaps ``[batch, move, masks]``.
        pairs: number of them ``[batch, move, masks]``.
        mean: mean activation over all rows ``[d]``.
    """

    def __init__(self, run: Run, sae: Any, name: str):
        """Compute the run again, and add up its steps."""
        batch, most = len(run.ends), run.block_size
        self.rows = torch.zeros(2, most, dtype=torch.float64)
        self.overlap, self.pairs = torch.zeros(2, batch, 3, most, dtype=torch.float64)
        active: Tensor | None = None
        total: Tensor | None = None
        before: tuple[int, Tensor, Tensor] | None = None
        hidden = torch.zeros(0)
        for step, x in _activations(run, name):
            features = sae.encode(joined(sae, name, x))
            on = (features != 0).cpu()
            if on.ndim != 3:
                raise InputError(
                    f"{name} holds several vectors a position for this SAE: give an SAE of all "
                    "heads together, or another hook point"
                )
            x = x.flatten(2).double().cpu()
            if before is not None and before[0] != step.block:
                before = None
            if before is None:
                hidden = step.masked
            left = step.masks_left
            if active is None or total is None:
                active = torch.zeros(2, most, on.shape[-1], dtype=torch.float64)
                total = torch.zeros(x.shape[-1], dtype=torch.float64)
            for kind, here in enumerate((step.masked, hidden & ~step.masked & (left > 0)[:, None])):
                row, _ = here.nonzero().unbind(-1)
                self.rows[kind].index_add_(0, left[row] - 1, torch.ones(len(row)).double())
                active[kind].index_add_(0, left[row] - 1, on[here].double())
                total += x[here].sum(0)
            if before is not None:
                self._compare(before[1], before[2], step.masked, on, hidden)
            before = step.block, step.masked, on
        if active is None or total is None:
            raise InputError("the run has no steps: it wrote nothing")
        self.active, self.mean = active, total / self.rows.sum()

    def _compare(
        self,
        was: Bool[Tensor, "batch block"],
        then: Bool[Tensor, "batch block d_sae"],
        masked: Bool[Tensor, "batch block"],
        now: Bool[Tensor, "batch block d_sae"],
        hidden: Bool[Tensor, "batch block"],
    ) -> None:
        """Add the overlaps of two successive steps of a block."""
        both, either = (then & now).sum(-1).double(), (then | now).sum(-1)
        left = was.sum(-1)
        running = hidden & (masked.sum(-1) > 0)[:, None] & (either > 0)
        for move, here in enumerate((was & masked, was & ~masked, ~was & ~masked)):
            row, at = (here & running).nonzero().unbind(-1)
            index = (row, torch.full_like(row, move), left[row] - 1)
            self.overlap.index_put_(index, both[row, at] / either[row, at], accumulate=True)
            self.pairs.index_put_(index, torch.ones(len(row)).double(), accumulate=True)

    @property
    def overlap_by_text(self) -> Float[Tensor, "batch move"]:
        """Mean overlap of each text; NaN where it has none."""
        return self.overlap.sum(-1) / self.pairs.sum(-1)

    @property
    def l0_of_all(self) -> float:
        """Mean number of active features over all rows."""
        return float(self.active.sum() / self.rows.sum())


def _activations(run: Run, name: str) -> Iterator[tuple[Any, Tensor]]:
    """Yield each step of a run, and the hook point's activation at the active block's rows."""
    for step, _, activations in along(run, [name]):
        yield step, activations[name]
