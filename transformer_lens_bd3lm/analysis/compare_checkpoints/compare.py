"""What differs between two checkpoints of one shape, and where.

Two models that were trained alike but for one thing, or one before and after, are compared in three
views, each in a module of its own::

    weights        |w_b - w_a| / |w_a|             component by component       weights
    predictions    KL(p_a || p_b), log p, NELBO    at the same masks            predictions, bounds
    activations    cosine, CKA, attention          hook point by hook point     activations

Everything but the weights is the same for both: texts, masks, draws, block size, dtype and device.
So a model compared with itself is at exactly zero.

It does not say how a difference came to be, nor which checkpoint is better beyond their bounds.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transformer_lens_bd3lm.analysis.compare_checkpoints.activations import (
    ActivationComparison,
    PairedActivations,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.arguments import (
    check_pair,
    names_of,
    read_model,
    shared_block_size,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.bounds import (
    BoundComparison,
    bound_method,
    compare_bounds,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.predictions import (
    PredictionComparison,
    compare_predictions,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.texts import NoisedRows, read_rows
from transformer_lens_bd3lm.analysis.compare_checkpoints.weights import (
    WeightComparison,
    check_finite,
    compare_weights,
)
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.nelbo import check_choices
from transformer_lens_bd3lm.result import Result, count


@dataclass(frozen=True, repr=False)
class CheckpointComparison(Result):
    """Differences between two checkpoints of one shape; every change is from a to b.

    Attributes:
        a: name of one checkpoint.
        b: name of the other.
        dtype: dtype that both computed in.
        weights: changes of the weights, by component.
        block_size: tokens per block, for both; None without blocks, or without a text.
        predictions: predictions at the masked positions; None without a text.
        activations: changes of activations, by hook point; None without a text.
        bound: NELBO of the texts; None without a text, or where it cannot be computed.
        left_out: what was not compared, and why.
    """

    a: str
    b: str
    dtype: str
    weights: WeightComparison = field(repr=False)
    block_size: int | None = None
    predictions: PredictionComparison | None = field(default=None, repr=False)
    activations: ActivationComparison | None = field(default=None, repr=False)
    bound: BoundComparison | None = field(default=None, repr=False)
    left_out: tuple[str, ...] = ()

    def _figures(self) -> str:
        parts = [f"weights change by {self.weights.whole.relative:.3%}"]
        if self.predictions is not None:
            kl, _ = self.predictions.mean_kl
            places = count(len(self.predictions.token), "masked position")
            parts.append(f"mean KL {kl:.4f} nats at {places}")
        if self.bound is not None:
            parts.append(f"NELBO {self.bound.difference:+.4f} nats/token")
        return f"{', '.join(parts)}: {Path(self.a).name} → {Path(self.b).name}"

    def to_dict(self) -> dict[str, Any]:
        """Return all comparisons as plain values for JSON; None for those that were left out."""
        parts = ("predictions", "bound", "activations")
        compared = {name: getattr(self, name) for name in parts}
        values: dict[str, Any] = {
            "a": self.a,
            "b": self.b,
            "dtype": self.dtype,
            "block_size": self.block_size,
            "weights": self.weights.to_dict(),
            "left_out": list(self.left_out),
        }
        return values | {
            name: None if part is None else part.to_dict() for name, part in compared.items()
        }


@torch.no_grad()
def compare_checkpoints(
    a: Any,
    b: Any,
    text: Any = None,
    *,
    block_size: Any = None,
    x_t: Any = None,
    seed: int = 0,
    rows: Any = 8,
    split: str | None = None,
    method: str | None = None,
    replicates: int = 8,
    timesteps: Any = None,
    weights: str = "ema",
    device: Any = None,
    dtype: torch.dtype | None = None,
) -> CheckpointComparison:
    """Compare two checkpoints of one shape: weights, and with a text predictions and activations.

    Args:
        a: a bridge as booted; or a folder, a Hub id, a ``.ckpt`` file, or ``REPO::FILENAME`` for a
            ``.ckpt`` in a repository, to boot.
        b: the other, in one of these forms.
        text: texts that both read: a string, a ``Path``, several of them, or ids ``[batch, pos]``;
            without it, only weights are compared.
        block_size: tokens per block for both, or ``"full"``; that of the bridges by default, if it
            is the same. The bridges' own block sizes are left as they are.
        x_t: the ids with masks ``[batch, pos]``, where ids are given; by default each position but
            BOS is masked with probability 1/2.
        seed: random seed of those masks, and of the mask draws of the bound.
        rows: largest number of windows of the text that are read, from its start.
        split: a regular expression; plain files are cut into texts before each match.
        method: method of the bound, as in :func:`nelbo`; by default exact where a block has few
            mask patterns, else Monte Carlo.
        replicates: number of estimates of the bound.
        timesteps: sigma of the passes, for checkpoints with time conditioning.
        weights: ``"ema"`` or ``"raw"``, for training checkpoints that are booted here.
        device: device to boot on.
        dtype: dtype to boot in, float32 by default.

    Raises:
        InputError: if the two are not of one shape and vocabulary, or the text cannot be read.
        BlockSizeError: for a block size that does not fit.
        CheckpointError: if a checkpoint cannot be loaded as it is.
        NotExactError: in training mode with dropout, or if activations overflow in the dtype.
    """
    booted = {"weights": weights, "device": device, "dtype": dtype}
    options = {key: x for key, x in booted.items() if x is not None}
    named = [isinstance(model, str | Path) for model in (a, b)]
    if not any(named) and (weights != "ema" or len(options) > 1):
        raise InputError(
            "weights, device and dtype are for checkpoints that are booted here: leave them out "
            "for bridges"
        )
    models = (read_model(a, options), read_model(b, options))
    names = names_of(*models)
    check_pair(*models)
    for bridge, name in zip(models, names, strict=True):
        check_finite(bridge, name)
    parts: dict[str, Any] = {"left_out": ("predictions and activations, since there is no text",)}
    if text is None and (x_t is not None or block_size is not None):
        raise InputError("x_t and block_size are for a text, and there is none: give one")
    if text is not None:
        size = shared_block_size(*models, block_size)
        if models[0].original_model.config.causal:
            raise InputError(
                "text: the autoregressive baseline (causal=True) predicts no masks, so leave the "
                "text out to compare weights"
            )
        noised = read_rows(models[0], text, x_t, seed, rows, split)
        method = bound_method(size, method)
        check_choices(method, "permuted", None, replicates, seed)
        parts = {"block_size": size} | _run_side_by_side(models, noised, size, timesteps)
        try:
            parts["bound"] = compare_bounds(models, noised, size, method, replicates, seed)
        except NotExactError as error:
            parts["left_out"] += (f"the bound, since {error}",)
    dtype_name = str(models[0].embed.weight.dtype).removeprefix("torch.")
    return CheckpointComparison(names[0], names[1], dtype_name, compare_weights(*models), **parts)


def _run_side_by_side(
    models: tuple[Any, Any], rows: NoisedRows, size: int | None, timesteps: Any
) -> dict[str, Any]:
    """Compare predictions and activations: each batch runs through one, then through the other."""
    gathered = PairedActivations(models[0])
    compared: list[dict[str, Tensor]] = []
    for batch in rows.batches:
        if not bool(batch.masked.any()):
            continue
        texts = [batch.on(bridge) for bridge in models]
        logits = [
            text.pass_at(size, timesteps, [], see, gathered.stream_names)
            for text, see in zip(texts, (gathered.keep, gathered.compare), strict=True)
        ]
        each = compare_predictions(logits[0], logits[1], texts[0])
        compared.append(each | {"row": batch.rows[each["row"]]})
    joined = {name: torch.cat([each[name] for each in compared], dim=-1) for name in compared[0]}
    order = joined["row"].argsort(stable=True)
    joined = {name: x[..., order] for name, x in joined.items()}
    ids = torch.cat([joined["token"], joined["top"].flatten()]).unique().tolist()
    tokenizer = models[0].tokenizer
    words = {i: str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids}
    left_out = []
    if rows.left_out:
        left_out.append(f"{rows.left_out:,} more windows of the text: raise rows to read them")
    positions = sum(batch.ids.numel() for batch in rows.batches if bool(batch.masked.any()))
    return {
        "predictions": PredictionComparison(**joined, texts=rows.texts, words=words),
        "activations": gathered.comparison(positions),
        "left_out": tuple(left_out),
    }
