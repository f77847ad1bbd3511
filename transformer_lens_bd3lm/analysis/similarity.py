"""Measures of how similar two passes are at a hook point, and in their predictions.

::

    cosine            r_a . r_b / (|r_a| |r_b|), mean over rows        a residual, [depth, pos]
    CKA               <K_a, K_b> / (|K_a| |K_b|)                       many residuals, [depth]
    attention change  1/2 sum_k |A_a - A_b|, mean over queries         patterns, [layer, head]
    KL                sum_v p_a log(p_a / p_b), nats                   predictions, [batch, pos]

Cosine compares the directions of single residuals; CKA (Kornblith et al. 2019) compares how many
residuals lie relative to each other, whatever the directions. K is their U-centered Gram matrix
(Song et al. 2012) over s samples x_i, zero on the diagonal::

    K_ij = x_i . x_j - r_i / (s - 2) - r_j / (s - 2) + sum_k r_k / ((s - 1) (s - 2))
    r_i  = sum_{j != i} x_i . x_j

so ``<K_a, K_b>`` is the debiased HSIC: about 0 for unrelated samples, where plain centering makes
few samples look alike by chance. K has s (s - 3) / 2 degrees of freedom, so chance alone still
scatters it by about one over their root: 0.22 at 8 samples, 0.02 at 70.

It runs no pass; see ``noised_text``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.denoising.replay import divergence
from transformer_lens_bd3lm.model.subs import masked_log_probs

CHUNK = 256  # masked positions whose predictions are in float64 at once
_FEWEST = 8  # samples of a CKA
_ROUNDING = 4  # units in the last place that a residual may be off


def wide(x: Tensor) -> Float[Tensor, "..."]:
    """Return a tensor in float64 on the CPU, where every measure is computed."""
    return x.detach().cpu().double()


def cosine(
    a: Float[Tensor, "batch pos d_model"], b: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, " pos"]:
    """Compute the cosine between two residuals at each position, mean over rows."""
    return torch.cosine_similarity(wide(a), wide(b), dim=-1, eps=1e-300).mean(0)


def _hsic(
    x: Float[Tensor, "*where sample d_x"], y: Float[Tensor, "*where sample d_y"]
) -> Float[Tensor, "*where"]:
    """Compute ``<K_x, K_y>`` of U-centered Gram matrices from centered samples.

    ``sum_ij (x_i . x_j) (y_i . y_j)`` is ``|x^T y|^2``, or a sum over pairs where those are
    fewer; so the matrices are never built where they are large.
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
    """Compute debiased linear CKA; NaN for few samples, or samples that differ by rounding."""
    if a.shape[-2] < _FEWEST:
        return torch.full(a.shape[:-2], torch.nan, dtype=torch.float64)
    x, y = (wide(each) for each in (a, b))
    x_centered, y_centered = (each - each.mean(-2, keepdim=True) for each in (x, y))
    norms = []
    for raw, centered in ((x, x_centered), (y, y_centered)):
        own = _hsic(centered, centered)
        norms.append(own.masked_fill(own <= _rounding(raw, centered, a.dtype), torch.nan).sqrt())
    return _hsic(x_centered, y_centered) / (norms[0] * norms[1])


def _rounding(
    raw: Float[Tensor, "*where sample d_model"],
    centered: Float[Tensor, "*where sample d_model"],
    dtype: torch.dtype,
) -> Float[Tensor, "*where"]:
    """Bound what samples that differ by rounding alone add to ``|K|^2``.

    Off by d, an entry of K is off by about ``2 |x| |d| + |d|^2``. The sums of ``_hsic`` cancel,
    so in float64 it is the square that rounds.
    """
    x, d = (each.square().sum(-1).mean(-1).sqrt() for each in (centered, raw))
    d = d * _ROUNDING * max(torch.finfo(dtype).eps, torch.finfo(torch.float64).eps ** 0.5)
    return (raw.shape[-2] * (2 * x * d + d.square())).square()


def residual_change(
    a: Float[Tensor, "batch all d_model"], b: Float[Tensor, "batch all d_model"], streams: int
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Compare residuals at one depth: cosine, CKA and CKA by position of each stream."""
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
    """Compare one layer's attention: total variation, and the noisy stream's share at a and b."""
    a, b = wide(a), wide(b)
    noisy = a.shape[-1] // streams
    moved = (a - b).abs().sum(-1) / 2
    return torch.stack([moved, *(x[..., :noisy].sum(-1) for x in (a, b))]).mean(1)


def prediction_change(
    a: Float[Tensor, "query d_vocab"], b: Float[Tensor, "query d_vocab"], mask_id: int
) -> Float[Tensor, " query"]:
    """Compute KL(p_a || p_b), nats, from raw logits at masked positions."""
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return torch.cat(
        [divergence(*(masked_log_probs(wide(x), mask_id) for x in part)) for part in parts]
    )
