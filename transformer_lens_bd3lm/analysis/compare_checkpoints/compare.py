"""What is different between two checkpoints of one shape, and where.

Two models that were trained alike but for one thing, or one before and after: this lays them side
by side in three views, each in a module of its own::

    weights        |w_b - w_a| / |w_a|             component by component       weights.py
    predictions    KL(p_a || p_b), log p, NELBO    at the same masks            predictions.py
    activations    cosine, CKA, attention          hook point by hook point     activations.py

Everything but the weights is the same for both: texts, masks, draws, one block size, dtype and
device. So a model beside itself is at exactly zero, and whatever is not zero is the weights'.

What cannot be laid side by side is refused before anything is run: other shapes, other vocabularies
or token maps, processed weights, weights that are not finite.

It does not say how the difference came to be, nor which checkpoint is better than a bound can say.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transformer_lens_bd3lm.analysis.comparable import SHAPE, check_bridge, unlike
from transformer_lens_bd3lm.analysis.compare_checkpoints.activations import (
    ActivationComparison,
    Gathered,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.predictions import (
    BoundComparison,
    PredictionComparison,
    compare_predictions,
)
from transformer_lens_bd3lm.analysis.compare_checkpoints.texts import Rows, read_rows
from transformer_lens_bd3lm.analysis.compare_checkpoints.weights import (
    WeightComparison,
    check_finite,
    compare_weights,
)
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.errors import InputError, NotExactError
from transformer_lens_bd3lm.likelihoods.nelbo import check_choices, nelbo
from transformer_lens_bd3lm.likelihoods.statistics import Nats
from transformer_lens_bd3lm.model.inputs import read_block_size
from transformer_lens_bd3lm.result import Result

# What two checkpoints must have in common, so that every value has its counterpart.
ALIKE = (*SHAPE, "cond_dim", "causal", "time_conditioning")
STATES = 256  # of a block that is summed exactly


@dataclass(frozen=True)
class CheckpointComparison(Result):
    """Two checkpoints side by side; every change is from a to b.

    Attributes:
        a: the one.
        b: the other.
        dtype: what both computed in.
        weights: component by component.
        block_size: the dial of both, tokens a block; None without blocks, or without a text.
        predictions: at the masked positions; None without a text.
        activations: hook point by hook point; None without a text.
        bound: of the texts' likelihood; None without a text, or where it cannot be had.
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

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values for JSON; one that is not finite is None."""
        whole = self.weights.whole
        told: dict[str, Any] = {"a": self.a, "b": self.b, "dtype": self.dtype}
        told["weights"] = {
            "relative": finite(whole.relative),
            "cosine": finite(whole.cosine),
            "largest": whole.largest,
            "parameters": whole.size,
            "tensors": self.weights.tensors,
            "identical_tensors": self.weights.identical,
            "components": [each.to_dict() for each in self.weights.components],
        }
        told["block_size"] = self.block_size
        told["predictions"] = None if self.predictions is None else of_predictions(self.predictions)
        told["bound"] = None if self.bound is None else of_bound(self.bound)
        told["activations"] = None
        if self.activations is not None:
            told["activations"] = {
                "first": self.activations.first,
                "points": [each.to_dict() for each in self.activations.points],
                "attention_change": self.activations.attention.tolist(),
            }
        return told | {"left_out": list(self.left_out)}


def finite(x: float) -> float | None:
    """A figure for JSON."""
    return x if math.isfinite(x) else None


def of_predictions(found: PredictionComparison) -> dict[str, Any]:
    """Predictions as plain values."""
    return {
        "positions": len(found.token),
        "mean_kl": list(found.mean_kl),
        "agreement": found.agreement,
        "log_p_change": found.mean_log_p_change,
        "log_p_change_interval_95": found.interval(),
        "by_position": [vars(found.place(i)) for i in range(len(found.token))],
    }


def of_bound(found: BoundComparison) -> dict[str, Any]:
    """The bound as plain values."""
    return {
        "method": found.method,
        "kind": found.a.kind,
        "nats_per_token": [found.a.nats_per_token, found.b.nats_per_token],
        "difference": found.difference,
        "standard_error": found.standard_error,
        "interval_95": found.interval(),
    }


# At the door


def read_model(model: Any, how: dict[str, Any]) -> Any:
    """A bridge, booted from its name if need be.

    Raises:
        InputError: if it is no BD3LM bridge that computes what its weights say.
    """
    bridge = read_bridge(model, **how if isinstance(model, str | Path) else {})
    check_bridge(bridge)
    if bridge._weights_processed:
        raise InputError(
            "a bridge with processed weights (enable_compatibility_mode) has other weights and "
            "activations than its checkpoint, and others again with other options: give bridges as "
            "booted"
        )
    return bridge


def names_of(*bridges: Any) -> tuple[str, ...]:
    """What they are called: folders by their last part, if that tells them apart."""
    full = [str(bridge.cfg.model_name) for bridge in bridges]
    short = [Path(name).name if Path(name).is_dir() else name for name in full]
    return tuple(short if len(set(short)) == len(short) else full)


def check_pair(a: Any, b: Any) -> None:
    """Refuse two models of which some value has no counterpart.

    Raises:
        InputError: naming what differs.
    """
    differ = unlike(a.original_model.config, b.original_model.config, ALIKE)
    differ += unlike(a.cfg, b.cfg, ("mask_token_id",))
    if differ:
        raise InputError(
            f"a and b are not of one shape ({'; '.join(differ)}): give two checkpoints of one "
            "architecture and vocabulary"
        )
    rotary = [each.original_model.backbone.rotary_emb.inv_freq.cpu() for each in (a, b)]
    if not torch.equal(*rotary):
        raise InputError("a and b have other rotary frequencies: their positions mean other things")
    where = [(each.embed.weight.dtype, each.embed.weight.device) for each in (a, b)]
    if where[0] != where[1]:
        told = " and ".join(f"{dtype} on {device}" for dtype, device in where)
        raise InputError(
            f"a and b are in {told}: what differs would be rounding, too; boot both alike"
        )
    if a.tokenizer is None or b.tokenizer is None:
        return
    words = [each.tokenizer.get_vocab() for each in (a, b)]
    if words[0] != words[1]:
        word = min(words[0].items() ^ words[1].items())[0]
        ids = [each.get(word, "nothing") for each in words]
        raise InputError(
            f"a and b have other token maps ({word!r} is {ids[0]} and {ids[1]}): one id would mean "
            "two things; give two checkpoints of one tokenizer"
        )
    if a.tokenizer.bos_token_id != b.tokenizer.bos_token_id:
        raise InputError("a and b begin a text with other tokens (BOS): give ones that begin alike")


def read_dial(a: Any, b: Any, block_size: Any) -> int | None:
    """The one block size of both; None without blocks.

    Raises:
        InputError: if none is given and theirs differ.
        BlockSizeError: if it is none.
    """
    config = a.original_model.config
    if not config.cross_attn and block_size is None:
        return None
    if block_size is None and a.cfg.block_size != b.cfg.block_size:
        raise InputError(
            f"the dial of a is at {a.cfg.block_size} and that of b at {b.cfg.block_size}: both "
            "must read alike; give block_size, the one that you want to compare them at"
        )
    size = a.cfg.block_size if block_size is None else block_size
    return read_block_size(size, config.model_length, config.cross_attn)


# What is run


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
    """What is different between two checkpoints of one shape: weights, predictions, activations.

    Args:
        a: a bridge as booted; or a folder, a Hub id, a ``.ckpt`` file, or ``REPO::FILENAME`` for a
            ``.ckpt`` in a repository, to boot.
        b: the other, likewise.
        text: what both read: a string, a ``Path``, several of them, or ids ``[batch, pos]``; with
            none, weights alone are compared.
        block_size: one setting of the dial for both; theirs by default, if it is one. Their own
            dials stay where they are.
        x_t: for ids: the same under masks of your choice; by default each position but BOS is
            masked with probability 1/2, alike for both.
        seed: of those masks, and of the bound's draws.
        rows: windows of the text that are read at most, the first.
        split: a regular expression that plain files are cut before, into texts.
        method: of the bound, as in :func:`nelbo`; exact by default where a block has few states,
            else Monte Carlo.
        replicates: of the bound, where it is estimated.
        timesteps: sigma of the forward, for checkpoints that see it.
        weights: of training checkpoints that are booted here, ``"ema"`` or ``"raw"``.
        device: to boot on.
        dtype: to boot in, float32 by default.

    Raises:
        InputError: if the two cannot be laid side by side, or the text cannot be read.
        CheckpointError: if a checkpoint cannot be loaded as it is.
        NotExactError: if activations overflow in the bridges' dtype.
    """
    booted = {"weights": weights, "device": device, "dtype": dtype}
    how = {key: x for key, x in booted.items() if x is not None}
    named = [isinstance(model, str | Path) for model in (a, b)]
    if not any(named) and (weights != "ema" or len(how) > 1):
        raise InputError("weights, device and dtype are for checkpoints that are booted here")
    models = (read_model(a, how), read_model(b, how))
    names = names_of(*models)
    check_pair(*models)
    for bridge, name in zip(models, names, strict=True):
        check_finite(bridge, name)
    told: dict[str, Any] = {"left_out": ("predictions and activations, since there is no text",)}
    if text is None and (x_t is not None or block_size is not None):
        raise InputError("x_t and block_size are for a text, and there is none: give one")
    if text is not None:
        size = read_dial(*models, block_size)
        if models[0].original_model.config.causal:
            raise InputError(
                "the autoregressive baseline (causal=True) predicts no masks: leave the text out "
                "to compare weights"
            )
        read = read_rows(models[0], text, x_t, seed, rows, split)
        method = bound_method(size, method)
        check_choices(method, "permuted", None, replicates, seed)
        told = {"block_size": size} | side_by_side(models, read, size, timesteps)
        told |= bounds(models, read, size, method, replicates, seed, told["left_out"])
    dtypes = str(models[0].embed.weight.dtype).removeprefix("torch.")
    return CheckpointComparison(*names, dtypes, compare_weights(*models), **told)


def side_by_side(
    models: tuple[Any, Any], read: Rows, size: int | None, timesteps: Any
) -> dict[str, Any]:
    """Predictions and activations: a batch through one, then through the other."""
    gathered = Gathered(models[0])
    found: list[dict[str, Tensor]] = []
    for batch in read.batches:
        if not bool(batch.masked.any()):
            continue
        texts = [batch.on(bridge) for bridge in models]
        logits = [
            text.pass_at(size, timesteps, [], see, gathered.stream_names)
            for text, see in zip(texts, (gathered.keep, gathered.compare), strict=True)
        ]
        each = compare_predictions(*logits, texts[0])
        found.append(each | {"row": batch.rows[each["row"]]})
    joined = {name: torch.cat([each[name] for each in found], dim=-1) for name in found[0]}
    order = joined["row"].argsort(stable=True)
    joined = {name: x[..., order] for name, x in joined.items()}
    ids = torch.cat([joined["token"], joined["top"].flatten()]).unique().tolist()
    tokenizer = models[0].tokenizer
    words = {i: str(i) if tokenizer is None else tokenizer.decode([i]) for i in ids}
    left_out = []
    if read.left_out:
        left_out.append(f"{read.left_out:,} more windows of the text: raise rows to read them")
    positions = sum(batch.ids.numel() for batch in read.batches if bool(batch.masked.any()))
    return {
        "predictions": PredictionComparison(**joined, texts=read.texts, words=words),
        "activations": gathered.found(positions),
        "left_out": tuple(left_out),
    }


def bound_method(size: int | None, method: str | None) -> str:
    """The method asked for; exact where a block has few states, else Monte Carlo."""
    if method is not None:
        return method
    return "exact" if size is not None and 2**size <= STATES else "monte_carlo"


def bounds(
    models: tuple[Any, Any],
    read: Rows,
    size: int | None,
    method: str,
    replicates: int,
    seed: int,
    left_out: tuple[str, ...],
) -> dict[str, Any]:
    """The bound of both on the same texts, from the same draws; or why there is none."""
    try:
        a, b = (
            nats_of(list(bound_of(bridge, read, size, method, replicates, seed)), read)
            for bridge in models
        )
    except NotExactError as error:
        return {"left_out": (*left_out, f"the bound, since {error}")}
    return {"bound": BoundComparison(method, a, b)}


def bound_of(
    bridge: Any, read: Rows, size: int | None, method: str, replicates: int, seed: int
) -> Iterator[tuple[Tensor, Nats]]:
    """Batch by batch: the rows, and their bound."""
    for number, batch in enumerate(read.batches):
        draws = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        found = nelbo(
            bridge, batch.ids, size, method, replicates=replicates, seed=draws, max_states=STATES
        )
        yield batch.rows, found


def nats_of(found: list[tuple[Tensor, Nats]], read: Rows) -> Nats:
    """The rows' figures added to their texts."""
    rows = torch.cat([rows for rows, _ in found])
    owner, size = read.texts[rows], 1 + int(read.texts.max())
    values = torch.cat([nats.replicates for _, nats in found], dim=1)
    tokens = torch.cat([nats.token_counts for _, nats in found])
    return Nats(
        kind=found[0][1].kind,
        replicates=torch.zeros(len(values), size, dtype=values.dtype).index_add_(1, owner, values),
        token_counts=torch.zeros(size, dtype=tokens.dtype).index_add_(0, owner, tokens),
    )
