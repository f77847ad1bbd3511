"""Attention sinks: keys that receive far more attention than others, and what they are good for.

At a step of a run, in one head, with keys 1..S and the queries of the active block (after Rulli et
al. 2025, arXiv:2510.15731)::

    A_j = mean over the block's queries of the attention to key j        they sum to 1
    j is a sink if  A_j > mean of A over the other keys + eps

Sinks of diffusion models float: they may change place from step to step. What they are good for is
measured by removal: the scores of all sinks are set to -inf, in every head, at every step, and the
text's own tokens lose so many nats. The control removes as many keys that are no sinks, drawn at
random in the same heads (fewer where more than half of the keys are sinks).

Which keys are sinks is decided in the run as it was, not anew after an edit. A small block has few
queries, so that one query alone can make a sink; with the control's keys less attention is removed
than with the sinks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.analysis.noised_text import pattern_names
from transformer_lens_bd3lm.checks import check_int, check_number
from transformer_lens_bd3lm.denoising.along import (
    Along,
    along,
    along_edited,
    log_p_of_written,
    run_or_texts,
)
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.denoising.step import Step
from transformer_lens_bd3lm.model.modules import at_least_float32
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values

KINDS = ("BOS", "past", "block", "mask")
"""What a sink is: BOS, a token of an earlier block, a token of the active block, or a mask."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Sinks(Result):
    """Attention sinks of a run, how they move, and what their removal costs; float64, CPU.

    A head counts at a step where the row has masks.

    Attributes:
        model: the checkpoint's name.
        block_size: tokens per block.
        eps: how far above the mean of the other keys a sink is.
        places: a row for each sink: ``(step, text, layer, head, position)``, ascending ``[sink,
            5]``.
        received: mean attention that each sink receives, 0 to 1 ``[sink]``.
        kinds: number of each sink's kind, in ``KINDS`` ``[sink]``.
        count: sinks at each step ``[step, batch, layer, head]``; NaN where a row has no mask.
        kept: share of a head's sinks at a step that are sinks at the next step of the block, over
            all steps and texts ``[layer, head]``; NaN without sinks. 1 does not move.
        removed: nats a token that the text loses without its sinks ``[batch]``.
        control: the same without as many random other keys ``[batch]``.
        mass: attention that the removed keys had received, a head and step: sinks, then control
            ``[2]``.
        contract: what was measured.
    """

    model: str
    block_size: int
    eps: float
    places: Int[Tensor, "sink 5"] = field(repr=False)
    received: Float[Tensor, " sink"] = field(repr=False)
    kinds: Int[Tensor, " sink"] = field(repr=False)
    count: Float[Tensor, "step batch layer head"] = field(repr=False)
    kept: Float[Tensor, "layer head"] = field(repr=False)
    removed: Float[Tensor, " batch"] = field(repr=False)
    control: Float[Tensor, " batch"] = field(repr=False)
    mass: Float[Tensor, " 2"] = field(repr=False)
    contract: Contract

    @property
    def mean_count(self) -> Float[Tensor, "layer head"]:
        """Mean number of sinks of each head at a step: over steps of a text, then over texts."""
        return self.count.nanmean(0).nanmean(0)

    @property
    def by_kind(self) -> dict[str, float]:
        """Share of the sinks that are of each kind; NaN without sinks."""
        total = len(self.kinds) or float("nan")
        return {kind: int((self.kinds == i).sum()) / total for i, kind in enumerate(KINDS)}

    def costs(self, texts: Any = None, level: float = 0.95) -> Effects:
        """Compute what removal costs, nats a token: of sinks, of the control, and the difference.

        Args:
            texts: number of each row's text, if rows share texts, as in :func:`mean_effects`.
            level: of the intervals over texts.

        Returns:
            Three cells: sinks, control, sinks less control.
        """
        values = torch.stack([self.removed, self.control, self.removed - self.control], dim=1)
        return mean_effects(values, texts, level=level)

    def _figures(self) -> str:
        costs = self.costs()
        return (
            f"{count(len(self.places), 'sink')}, "
            f"removal costs {costs.text(0)} nats a token, control {costs.text(1)}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return counts, movement and costs as plain values for JSON, and every sink's place."""
        values = {
            "model": self.model,
            "block_size": self.block_size,
            "eps": self.eps,
            "sinks": self.places,
            "received": self.received,
            "mean_count": self.mean_count,
            "by_kind": self.by_kind,
            "kept": self.kept,
            "costs_nats_per_token": self.costs().to_dict(),
            "removed_attention": self.mass,
            "contract": vars(self.contract),
        }
        return plain_values(values)


def _is_sink(
    received: Float[Tensor, "batch head key"], eps: float
) -> Bool[Tensor, "batch head key"]:
    """Return which keys receive more than the mean of the other keys by at least ``eps``."""
    keys = received.shape[-1]
    if keys == 1:
        return torch.zeros_like(received, dtype=torch.bool)
    others = (received.sum(-1, keepdim=True) - received) / (keys - 1)
    return received > others + eps


class _Reader:
    """Finds the sinks of each step as its pass runs, and draws the control's keys beside them.

    What it keeps of a step is a list of keys, not patterns: ``(text, head, key)`` by step and
    layer, keys counted from the first in view.
    """

    def __init__(self, bridge: Any, eps: float, seed: int):
        self.eps, self.generator = eps, torch.Generator().manual_seed(seed)
        self.sinks: dict[tuple[int, int], Tensor] = {}
        self.others: dict[tuple[int, int], Tensor] = {}
        self.received: dict[tuple[int, int], Tensor] = {}
        self.count: dict[tuple[int, int], Tensor] = {}
        self.before: dict[int, tuple[Tensor, Step]] = {}
        shape = (bridge.cfg.n_layers, bridge.cfg.n_heads)
        self.kept, self.followed = (torch.zeros(shape, dtype=torch.float64) for _ in range(2))
        self.mass, self.heads = torch.zeros(2, dtype=torch.float64), 0

    def see(self, pattern: Tensor, hook: Any, step: Step, layer: int) -> None:
        """Reduce one layer's pattern ``[batch, head, query, key]`` to its sinks."""
        received = at_least_float32(pattern).double().mean(2).cpu()
        active = step.masked.any(-1)[:, None, None]
        sinks = _is_sink(received, self.eps) & active
        others, at = _drawn_keys(sinks, self.generator), (step.index, layer)
        self.sinks[at], self.others[at] = sinks.nonzero(), others.nonzero()
        self.received[at] = received[sinks]
        self.count[at] = sinks.sum(-1).double().masked_fill(~active[..., 0], torch.nan)
        self.mass += torch.stack([(received * keys).sum() for keys in (sinks, others)])
        self.heads += int(active.sum()) * sinks.shape[1]
        earlier, before = self.before.get(layer, (sinks, step))
        if before.block == step.block and before.index < step.index:
            self.followed[layer] += (earlier & active).sum((0, 2))
            self.kept[layer] += (earlier & sinks).sum((0, 2))
        self.before[layer] = sinks, step


def _drawn_keys(
    sinks: Bool[Tensor, "batch head key"], generator: torch.Generator
) -> Bool[Tensor, "batch head key"]:
    """Draw as many other keys as there are sinks in each head; one key at least is left."""
    wanted = sinks.sum(-1, keepdim=True).clamp(max=sinks.shape[-1] - 1)
    chance = torch.rand(sinks.shape, generator=generator, dtype=torch.float64)
    rank = chance.masked_fill(sinks, 2.0).argsort(-1).argsort(-1)
    return (rank < wanted) & ~sinks


def _remove(at: Int[Tensor, "key 3"], scores: Tensor) -> Tensor:
    """Return a layer's scores with those of some keys at -inf, for every query."""
    text, head, key = at.to(scores.device).unbind(-1)
    edited = scores.clone()
    edited[text, head, :, key] = -torch.inf
    return edited


def _nats_per_token(run: Run, keys: dict[tuple[int, int], Tensor]) -> Float[Tensor, " batch"]:
    """Return -log p of each text in its order with keys removed, nats a token."""

    def hook_of(layer: int) -> Any:
        def remove(scores: Tensor, hook: Any, step: Step) -> Tensor:
            return _remove(keys[step.index, layer], scores)

        return remove

    layers = range(run.bridge.cfg.n_layers)
    hooks = [(f"blocks.{layer}.attn.hook_attn_scores", hook_of(layer)) for layer in layers]
    return -_log_p(run, along_edited(run, hooks))


def _log_p(run: Run, steps: Iterator[Along]) -> Float[Tensor, " batch"]:
    """Return log p of each text in its order, nats a token."""
    total = torch.zeros(len(run.ends), dtype=torch.float64)
    for step, log_probs, _ in steps:
        total += log_p_of_written(run, step, log_probs).where(step.revealed, 0.0).sum(1)
    return total / (run.commit_step_all >= 0).sum(-1)


@torch.no_grad()
def sinks(
    source: Any,
    texts: Any = None,
    *,
    eps: int | float = 0.1,
    block_size: Any = None,
    seed: int = 0,
) -> Sinks:
    """Find the attention sinks of a run, how they move over steps, and what their removal costs.

    Nothing needs to have been recorded. The run is replayed three times with its tokens pinned: as
    it was, without its sinks, and without as many random other keys.

    Args:
        source: a finished run; or a bridge, or a checkpoint's name, beside ``texts``.
        texts: texts of one length, which are revealed in a random order; None beside a run.
        eps: how much more attention than the mean of the other keys a sink receives, 0 to 1.
        block_size: tokens per block, beside texts; the bridge's by default.
        seed: random seed of that order, and of the control's keys.

    Raises:
        InputError: for anything else, a run from a file that does not hold its functions, or the
            autoregressive baseline.
        NotExactError: where the bridge is no longer what the run was made with, or the run's own
            hooks return other values.
    """
    check_number("eps", eps, 0.0, 1.0, "give a share of attention, 0 to 1")
    check_int("seed", seed, 0)
    run = run_or_texts(source, texts, block_size, seed)
    names = pattern_names(run.bridge)
    reader = _Reader(run.bridge, float(eps), seed)
    hooks = [(name, partial(reader.see, layer=layer)) for layer, name in enumerate(names)]
    base = -_log_p(run, along(run, hooks=hooks))
    removed, control = (_nats_per_token(run, keys) - base for keys in (reader.sinks, reader.others))
    places, received, kinds = _listed(run, reader)
    layers = range(len(names))
    count = [
        torch.stack([reader.count[step.index, i] for i in layers], dim=1) for step in run.steps
    ]
    return Sinks(
        model=Path(run.bridge.cfg.model_name).name,
        block_size=run.block_size,
        eps=float(eps),
        places=places,
        received=received,
        kinds=kinds,
        count=torch.stack(count),
        kept=reader.kept / reader.followed,
        removed=removed,
        control=control,
        mass=reader.mass / reader.heads,
        contract=Contract(
            target="-log p of the run's own tokens in their order, nats a token",
            edited="scores of the keys at -inf in every head: all sinks, or as many random others",
            fixed="tokens and order of the run, stored keys and values of finished blocks",
            masks="those that each step of the run met",
        ),
    )


def _listed(run: Run, reader: _Reader) -> tuple[Tensor, Tensor, Tensor]:
    """Return place, attention received and kind of every sink, in the order of places."""
    rows, received, kinds = [], [], []
    for number, step in enumerate(run.steps):
        (start, _), ids = step.window, step.tokens.cpu()
        first = run.canvas.first_visible(start)
        for layer in range(run.bridge.cfg.n_layers):
            text, head, key = reader.sinks[step.index, layer].unbind(-1)
            position, same = key + first, torch.full_like(text, number)
            kind = torch.where(position < start, 1, 2)
            kind = kind.masked_fill(ids[text, position] == step.mask_id, 3)
            rows.append(torch.stack([same, text, torch.full_like(text, layer), head, position], -1))
            received.append(reader.received[step.index, layer])
            kinds.append(kind.masked_fill(position == 0, 0))
    places = torch.cat(rows)
    order = sorted(range(len(places)), key=lambda i: places[i].tolist())
    return places[order], torch.cat(received)[order], torch.cat(kinds)[order]
