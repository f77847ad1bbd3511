"""What two checkpoints predict at the masked positions of the same noised texts.

With ``p_a`` and ``p_b`` the SUBS predictions there, and x the true token::

    KL(p_a || p_b) = sum_v p_a log(p_a / p_b)        nats a token, and the other way round
    log p_b(x) - log p_a(x)                          nats; above 0: b expects the text more
    agreement                                        share of positions with one most likely token

Both have the same masks, so a hard position is hard for both, and the difference is surer than
either side. Intervals are over texts like these (``likelihoods.statistics``); a single text has
none.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import NoisedText
from transformer_lens_bd3lm.analysis.similarity import CHUNK, prediction_change, wide
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.likelihoods.statistics import bootstrap_totals, middle_interval
from transformer_lens_bd3lm.model.subs import masked_log_probs
from transformer_lens_bd3lm.result import plain_values


@dataclass(frozen=True)
class Prediction:
    """Predictions of two checkpoints at one masked position.

    Attributes:
        row: number of the row.
        position: position in the row.
        word: the true token.
        kl: KL(p_a || p_b), nats.
        log_p: log p of the true token under a and under b, nats.
        top: the most likely token under a and under b.
    """

    row: int
    position: int
    word: str
    kl: float
    log_p: tuple[float, float]
    top: tuple[str, str]


@dataclass(frozen=True)
class PredictionComparison:
    """Predictions at masked positions, in the order of rows and positions; float64 on the CPU.

    Attributes:
        row: the row of each position ``[query]``.
        position: its number in the row ``[query]``.
        token: id of the true token ``[query]``.
        kl: KL(p_a || p_b) and KL(p_b || p_a), nats ``[2, query]``.
        log_p: log p of the true token under a and under b, nats ``[2, query]``.
        top: the most likely token's id under a and under b ``[2, query]``.
        texts: which text each row is of ``[row]``.
        words: tokens as text, by id.
    """

    row: Int[Tensor, " query"] = field(repr=False)
    position: Int[Tensor, " query"] = field(repr=False)
    token: Int[Tensor, " query"] = field(repr=False)
    kl: Float[Tensor, "2 query"] = field(repr=False)
    log_p: Float[Tensor, "2 query"] = field(repr=False)
    top: Int[Tensor, "2 query"] = field(repr=False)
    texts: Int[Tensor, " row"] = field(repr=False)
    words: dict[int, str] = field(repr=False)

    @property
    def mean_kl(self) -> tuple[float, float]:
        """Mean KL(p_a || p_b) and KL(p_b || p_a), nats a token."""
        a_to_b, b_to_a = self.kl.mean(1).tolist()
        return a_to_b, b_to_a

    @property
    def agreement(self) -> float:
        """Share of positions at which both have the same most likely token."""
        return float((self.top[0] == self.top[1]).double().mean())

    @property
    def log_p_change(self) -> Float[Tensor, " query"]:
        """``log p_b(x) - log p_a(x)`` of the true tokens, nats."""
        return self.log_p[1] - self.log_p[0]

    @property
    def mean_log_p_change(self) -> float:
        """Mean of ``log_p_change``, nats a token."""
        return float(self.log_p_change.mean())

    def interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float] | None:
        """Compute the interval of ``mean_log_p_change`` over texts like these; None for one text.

        Args:
            level: probability that an interval made this way covers the true value.
            resamples: number of bootstrap resamples.
            seed: random seed of the resamples.
        """
        values = torch.stack([self.log_p_change, torch.ones_like(self.log_p_change)])
        size = 1 + int(self.texts.max())
        by_text = torch.zeros(2, size, dtype=torch.float64)
        return paired_interval(
            by_text.index_add_(1, self.texts[self.row], values), level, resamples, seed
        )

    def largest(self, n: int = 10) -> list[Prediction]:
        """Return the positions whose predictions differ most, by KL(p_a || p_b).

        Args:
            n: largest number of positions.
        """
        order = self.kl[0].argsort(descending=True, stable=True)[:n].tolist()
        return [self.at(i) for i in order]

    def at(self, i: int) -> Prediction:
        """Return the predictions at the i-th masked position."""
        kl, log_p, top = float(self.kl[0, i]), self.log_p[:, i].tolist(), self.top[:, i].tolist()
        return Prediction(
            int(self.row[i]), int(self.position[i]), self.words[int(self.token[i])], kl,
            (log_p[0], log_p[1]), (self.words[top[0]], self.words[top[1]]),
        )  # fmt: skip

    def by_position(self) -> Float[Tensor, " pos"]:
        """Return mean KL(p_a || p_b) by position, over rows that mask it; NaN where none does."""
        sums = torch.zeros(2, 1 + int(self.position.max()), dtype=torch.float64)
        sums.index_add_(1, self.position, torch.stack([self.kl[0], torch.ones_like(self.kl[0])]))
        return sums[0] / sums[1]

    def to_dict(self) -> dict[str, Any]:
        """Return means, and the predictions at each masked position, as plain values for JSON."""
        values = {
            "positions": len(self.token),
            "mean_kl": self.mean_kl,
            "agreement": self.agreement,
            "log_p_change": self.mean_log_p_change,
            "log_p_change_interval_95": self.interval(),
            "by_position": [vars(self.at(i)) for i in range(len(self.token))],
        }
        return plain_values(values)


def paired_interval(
    values: Float[Tensor, "2 text"], level: float, resamples: int, seed: int
) -> tuple[float, float] | None:
    """Compute the interval of summed differences over summed tokens; None for one text."""
    if int(values.any(0).sum()) < 2:
        return None
    differences, tokens = bootstrap_totals(values, resamples, seed)
    return middle_interval(differences / tokens, level)


def compare_predictions(
    a: Float[Tensor, "query d_vocab"], b: Float[Tensor, "query d_vocab"], text: NoisedText
) -> dict[str, Tensor]:
    """Compare raw logits at masked positions; keys are attributes of :class:`PredictionComparison`.

    Raises:
        NotExactError: if a logit is not finite.
    """
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise NotExactError(f"logits are not finite in {a.dtype}: boot both in a wider dtype")
    mask_id = text.bridge.cfg.mask_token_id
    true = text.tokens[text.masked].cpu()
    row, position = text.masked.cpu().nonzero().T
    log_p, top = [], []
    for logits in (a, b):
        parts = [masked_log_probs(wide(x), mask_id) for x in logits.split(CHUNK)]
        top.append(torch.cat([x.argmax(-1) for x in parts]))
        true_parts = zip(parts, true.split(CHUNK), strict=True)
        log_p.append(torch.cat([x.gather(-1, y[:, None])[:, 0] for x, y in true_parts]))
    kl = [prediction_change(x, y, mask_id) for x, y in ((a, b), (b, a))]
    return {
        "row": row,
        "position": position,
        "token": true,
        "kl": torch.stack(kl),
        "log_p": torch.stack(log_p),
        "top": torch.stack(top),
    }
