"""How sure predictions at masked positions are, against how often they are right.

The top prediction of a calibrated model that has probability p is right in a share p of cases. With
predictions sorted into bins of their confidence::

    ECE = sum over bins of (share of predictions) x |mean confidence - share that is right|

(Guo et al. 2017). The ECE of a perfectly calibrated model is above 0, since shares scatter: what it
would be with these predictions is beside it, from outcomes drawn with the predictions' own
probabilities.

Give texts that the model did not write. A run is written by the model's own draws, so its
predictions are right as often as they say, up to how the prediction changes until the reveal.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.over_run.masked_texts import TIMES, read_masked_texts
from transformer_lens_bd3lm.analysis.over_run.written import (
    QUARTERS,
    effects_by_quarter,
    read_written,
)
from transformer_lens_bd3lm.checks import check_int
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.runs import Runs
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

_DRAWS = 100  # outcomes that are drawn for the ECE of a calibrated model


@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration(Result):
    """Confidence of predictions at masked positions against how often they are right.

    An entry is the top prediction at one masked position. Confidences and shares are in 0..1.

    Attributes:
        confidence: probability of the top prediction ``[entry]``.
        correct: whether it is the true token ``[entry]``.
        quarter: bin of the share of masks left in its block, an index into ``QUARTERS``
            ``[entry]``.
        text: number of its text ``[entry]``.
        ece: expected calibration error, of all entries.
        ece_by_quarter: the same, by share of masks left ``[quarter]``; NaN without entries.
        calibrated: mean ECE of a perfectly calibrated model with the same confidences, of all
            entries and by share of masks left ``[1 + quarter]``.
        gap: confidence less share correct, mean over texts with 95% intervals, by share of masks
            left ``[quarter]``; above 0 is overconfident.
        bins: number of bins of equal width.
        source: ``"texts"`` or ``"run"``.
        contract: what was measured.
    """

    confidence: Float[Tensor, " entry"] = field(repr=False)
    correct: Bool[Tensor, " entry"] = field(repr=False)
    quarter: Int[Tensor, " entry"] = field(repr=False)
    text: Int[Tensor, " entry"] = field(repr=False)
    ece: float
    ece_by_quarter: Float[Tensor, " quarter"] = field(repr=False)
    calibrated: Float[Tensor, " quarter_and_all"] = field(repr=False)
    gap: Effects = field(repr=False)
    bins: int
    source: str
    contract: Contract = field(repr=False)

    def reliability(self) -> Float[Tensor, "bin 3"]:
        """Return the count, mean confidence and share correct of each bin; NaN in empty bins."""
        count, confidence, correct = _sums(self.confidence, self.correct.double(), self.bins)
        return torch.stack([count, confidence / count, correct / count], dim=-1)

    def to_dict(self) -> dict[str, Any]:
        """Return errors, gaps and the bins as plain values for JSON."""
        values = {
            "source": self.source,
            "predictions": len(self.confidence),
            "ece": self.ece,
            "ece_by_quarter": self.ece_by_quarter,
            "calibrated": self.calibrated,
            "quarters": QUARTERS,
            "gap": self.gap.to_dict(),
            "reliability": self.reliability(),
            "contract": dict(vars(self.contract)),
        }
        return plain_values(values)

    def _figures(self) -> str:
        return (
            f"ECE {self.ece:.4f}, a calibrated model's {float(self.calibrated[0]):.4f}, "
            f"{count(len(self.confidence), 'prediction')} on {self.source}"
        )


def calibration(
    source: Any,
    texts: Any = None,
    *,
    block_size: int | str | None = None,
    times: Any = TIMES,
    bins: int = 15,
    seed: int = 0,
    progress: bool | None = None,
) -> Calibration:
    """Compare how sure predictions at masked positions are with how often they are right.

    Args:
        source: a BD3LM bridge; or a finished ``Run``, ``Runs`` or list of runs. A run was drawn
            from the model's own predictions, so prefer a bridge with texts.
        texts: with a bridge, texts of any lengths: strings, or ids of each text. With runs, the
            number of each row's text ``[row]``, as in :func:`commitment`.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        times: times at which texts are masked, each the probability that a token is masked.
        bins: number of bins of confidence, of equal width.
        seed: random seed of masks, outcomes and intervals.
        progress: show a progress bar; by default on a terminal.

    Raises:
        InputError: for texts, times or bins that do not fit, and the autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        NotExactError: for a run that cannot be reproduced.
    """
    check_int("bins", bins, 1, 10**6)
    check_int("seed", seed, 0, 2**63 - 1)
    parts: list[tuple[Tensor, ...]] = []
    if isinstance(source, Run | Runs | list):
        if block_size is not None:
            raise InputError(f"block_size={block_size!r}: a run has its own, leave it out")
        written = read_written(source, texts)
        with progress_bar("calibration", written.steps, progress) as update:
            for x, _ in written.along(update):
                best = x.log_probs.max(-1)
                right = best.indices == x.final
                parts.append((best.values.exp(), right, x.quarter, written.texts[x.row]))
        return _score(parts, "run", bins, seed)
    given = read_masked_texts(source, texts, block_size, times, seed)
    with progress_bar("calibration", len(given.batches()), progress) as update:
        for masks, log_probs, _ in given.passes(update):
            best = log_probs.max(-1)
            right = best.indices == masks.token
            parts.append((best.values.exp(), right, masks.quarter, masks.text))
    return _score(parts, "texts", bins, seed)


def _score(parts: list[tuple[Tensor, ...]], source: str, bins: int, seed: int) -> Calibration:
    """Join the parts, and compute errors and gaps."""
    confidence, correct, quarter, text = map(torch.cat, zip(*parts, strict=True))
    return score(confidence, correct, quarter, text, source, bins, seed)


def score(
    confidence: Float[Tensor, " entry"],
    correct: Bool[Tensor, " entry"],
    quarter: Int[Tensor, " entry"],
    text: Int[Tensor, " entry"],
    source: str,
    bins: int,
    seed: int,
) -> Calibration:
    """Compute errors and gaps from single predictions.

    Raises:
        InputError: for no prediction.
    """
    if not len(confidence):
        raise InputError("nothing is masked at these times: give larger times, or more texts")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(_DRAWS, len(confidence), generator=generator, dtype=torch.float64)
    outcomes = torch.cat([correct[None], drawn < confidence]).double()
    groups = [torch.ones_like(correct), *(quarter == i for i in range(len(QUARTERS)))]
    errors = torch.stack(
        [
            torch.stack([_ece(confidence[group], each[group], bins) for each in outcomes])
            for group in groups
        ]
    )
    given = source == "texts"
    drawn_by = "given texts" if given else "a run, which was drawn from the predictions themselves"
    masks = "each token masked with probability t, at each of the times"
    return Calibration(
        confidence=confidence,
        correct=correct,
        quarter=quarter,
        text=text,
        ece=float(errors[0, 0]),
        ece_by_quarter=errors[1:, 0],
        calibrated=errors[:, 1:].mean(-1),
        gap=effects_by_quarter(confidence - correct.double(), quarter, text, seed=seed),
        bins=bins,
        source=source,
        contract=Contract(
            target="probability of the top prediction against the share of them that is the true "
            f"token, of {drawn_by}",
            edited="nothing",
            fixed="texts and masks" if given else "tokens, noise and reveal order of the run",
            masks=masks if given else "those that the run met",
        ),
    )


def _sums(
    confidence: Float[Tensor, " entry"], correct: Float[Tensor, " entry"], bins: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the count and the sums of confidence and of right predictions in each bin."""
    where = (confidence * bins).long().clamp(max=bins - 1)
    count, sure, right = (confidence.new_zeros(bins) for _ in range(3))
    count.index_add_(0, where, torch.ones_like(confidence))
    sure.index_add_(0, where, confidence)
    right.index_add_(0, where, correct)
    return count, sure, right


def _ece(
    confidence: Float[Tensor, " entry"], correct: Float[Tensor, " entry"], bins: int
) -> Float[Tensor, ""]:
    """Compute the expected calibration error; NaN without predictions."""
    _, sure, right = _sums(confidence, correct, bins)
    if not len(confidence):
        return confidence.new_tensor(torch.nan)
    return (sure - right).abs().sum() / len(confidence)
