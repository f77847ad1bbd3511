"""What two checkpoints predict at the masked positions of the same noised texts.

With ``p_a`` and ``p_b`` the SUBS predictions there, and x the true token::

    KL(p_a || p_b) = sum_v p_a log(p_a / p_b)        nats a token, and the other way round
    log p_b(x) - log p_a(x)                          nats; above 0: b expects the text more
    agreement                                        share of positions with one most likely token

Both see one noise, so what a hard position or an unlucky mask does to a, it does to b as well, and
the difference is surer than either of its sides. The bound on the texts' likelihood is compared
likewise: the same draws for both, replicate by replicate.

Its intervals are over texts like these (``units.py``): whole texts are drawn again, since tokens of
one text go together. A single text has none.
"""

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.noised_text import NoisedText
from transformer_lens_bd3lm.analysis.similarity import CHUNK, prediction_change, wide
from transformer_lens_bd3lm.errors import NotExactError
from transformer_lens_bd3lm.likelihoods.statistics import Nats, bootstrap_totals, middle_interval
from transformer_lens_bd3lm.model.subs import masked_log_probs


@dataclass(frozen=True)
class Place:
    """One masked position.

    Attributes:
        row: of the texts.
        position: in the row.
        word: the true token.
        kl: KL(p_a || p_b), nats.
        log_p: of the true token under a and under b, nats.
        top: the most likely token of a and of b.
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
        position: its place there ``[query]``.
        token: what stands there in truth ``[query]``.
        kl: KL(p_a || p_b) and KL(p_b || p_a), nats ``[2, query]``.
        log_p: of the true token under a and under b, nats ``[2, query]``.
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
        there, back = self.kl.mean(1).tolist()
        return there, back

    @property
    def agreement(self) -> float:
        """Share of positions at which both find the same token most likely."""
        return float((self.top[0] == self.top[1]).double().mean())

    @property
    def log_p_change(self) -> Float[Tensor, " query"]:
        """``log p_b(x) - log p_a(x)`` of the true tokens, nats."""
        return self.log_p[1] - self.log_p[0]

    @property
    def mean_log_p_change(self) -> float:
        """Its mean, nats a token."""
        return float(self.log_p_change.mean())

    def interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float] | None:
        """Of ``mean_log_p_change``, paired, over texts like these; None of a single text.

        Args:
            level: how often such intervals should cover the truth.
            resamples: of the bootstrap.
            seed: of its draws.
        """
        values = torch.stack([self.log_p_change, torch.ones_like(self.log_p_change)])
        size = 1 + int(self.texts.max())
        by_text = torch.zeros(2, size, dtype=torch.float64)
        return paired(by_text.index_add_(1, self.texts[self.row], values), level, resamples, seed)

    def largest(self, n: int = 10) -> list[Place]:
        """The positions whose predictions changed most, by KL(p_a || p_b).

        Args:
            n: how many at most.
        """
        order = self.kl[0].argsort(descending=True, stable=True)[:n].tolist()
        return [self.place(i) for i in order]

    def place(self, i: int) -> Place:
        """The i-th masked position."""
        kl, log_p, top = float(self.kl[0, i]), self.log_p[:, i].tolist(), self.top[:, i].tolist()
        return Place(
            int(self.row[i]), int(self.position[i]), self.words[int(self.token[i])], kl,
            (log_p[0], log_p[1]), (self.words[top[0]], self.words[top[1]]),
        )  # fmt: skip

    def by_position(self) -> Float[Tensor, " pos"]:
        """Mean KL(p_a || p_b) at each position over the rows that mask it; NaN where none does."""
        found = torch.zeros(2, 1 + int(self.position.max()), dtype=torch.float64)
        found.index_add_(1, self.position, torch.stack([self.kl[0], torch.ones_like(self.kl[0])]))
        return found[0] / found[1]


@dataclass(frozen=True)
class BoundComparison:
    """The bound on the same texts' likelihood, from the same draws.

    Attributes:
        method: as of :func:`nelbo`.
        a: nats of each text, of replicates.
        b: likewise; replicate i of both is under the same noise.
    """

    method: str
    a: Nats
    b: Nats

    @property
    def difference(self) -> float:
        """The bound of b less that of a, nats a token; above 0: b finds the texts less likely."""
        return float((self.b.nats - self.a.nats).sum()) / self.a.total_tokens

    @property
    def standard_error(self) -> float:
        """Of ``difference`` for these texts, nats a token, from paired replicates; 0 if exact."""
        if self.a.kind == "exact":
            return 0.0
        off = (self.b.replicates - self.a.replicates).sum(-1) / self.a.total_tokens
        return float(off.std()) / math.sqrt(len(off))

    def interval(
        self, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float] | None:
        """Of ``difference``, over texts like these; None of a single text.

        Args:
            level: how often such intervals should cover the truth.
            resamples: of the bootstrap.
            seed: of its draws.
        """
        values = torch.stack([self.b.nats - self.a.nats, self.a.token_counts.double()])
        return paired(values, level, resamples, seed)


def paired(
    values: Float[Tensor, "2 text"], level: float, resamples: int, seed: int
) -> tuple[float, float] | None:
    """Interval of a sum of differences over a sum of tokens; None of fewer than two texts."""
    if int(values.any(0).sum()) < 2:
        return None
    off, tokens = bootstrap_totals(values, resamples, seed)
    return middle_interval(off / tokens, level)


def compare_predictions(
    a: Float[Tensor, "query d_vocab"], b: Float[Tensor, "query d_vocab"], text: NoisedText
) -> dict[str, Tensor]:
    """Figures at masked positions by their name in :class:`PredictionComparison`, from raw logits.

    Raises:
        NotExactError: if some logit is not finite.
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
