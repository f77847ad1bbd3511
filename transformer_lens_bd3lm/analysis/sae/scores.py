"""Scores of a sparse autoencoder: how much of the likelihood is left when it is spliced in.

The same texts run in four arms, under the same mask patterns: as they are, with the hook point
replaced by the SAE's reconstruction, by that of a random dictionary of as many features of which
as many are active, and by a constant, the mean activation or 0. The losses are exact NELBOs and
NLLs, by number of masks left; see ``losses``. Explained variance and L0 are of the rows that those
passes run; see ``rows``.

The clean arm is read by a hook that returns nothing, so that all arms run the same passes, and an
SAE that changes nothing recovers everything to the last bit.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_lens_bd3lm.analysis.masked_predictions import require_masks
from transformer_lens_bd3lm.analysis.sae.dictionaries import RandomDictionary
from transformer_lens_bd3lm.analysis.sae.losses import MaskLosses, mask_losses
from transformer_lens_bd3lm.analysis.sae.result import SaeScores
from transformer_lens_bd3lm.analysis.sae.rows import (
    RowReader,
    Seen,
    Values,
    mean_row,
    moments,
    spread,
)
from transformer_lens_bd3lm.analysis.sae.splice import Splice, check_fits, joined, sae_words
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import read_ids, refuse_path, tokens_of
from transformer_lens_bd3lm.checks import check_choice, check_int, is_real, read_several
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import Contract


@torch.no_grad()
def sae_scores(
    bridge: Bridge,
    sae: Any,
    name: str,
    texts: Any,
    block_size: int | str | None = None,
    *,
    method: str = "exact",
    ablation: str = "mean",
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    scope: str = "active",
    replicates: int = 8,
    seed: int = 0,
    max_states: int = 256,
    rows: int = 2048,
) -> SaeScores:
    """Score a sparse autoencoder at a hook point: variance, sparsity, and the loss it recovers.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        sae: anything with ``encode(x)`` and ``decode(features)``; see :func:`load_sae`.
        name: the hook point.
        texts: a string, strings of any length, or ids ``[batch, pos]``, one text a row; position 0
            is BOS.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        method: ``"exact"`` sums over all mask patterns; ``"stratified"`` estimates the NELBO with
            the same random patterns in each arm, at any block size, as :func:`nelbo` does.
        ablation: what recovers nothing: ``"mean"``, the mean activation of the same rows, or
            ``"zero"``.
        times: ends of the ranges of t, ascending, from 0 to 1.
        scope: ``"active"`` splices into the noisy stream; ``"commit"`` also into the clean one.
        replicates: number of random patterns for each number of masks, of ``"stratified"``.
        seed: random seed of these, and of the random dictionary.
        max_states: largest number of mask patterns of the exact sums, as in :func:`exact`.
        rows: largest number of positions in one pass, as in :func:`exact`.

    Raises:
        InputError: for arguments that do not fit, an SAE of another width, and the autoregressive
            baseline.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
        CheckpointError: for a name whose checkpoint cannot be loaded.
    """
    bridge = read_bridge(bridge)
    require_masks(bridge)
    check_fits(bridge, sae, name)
    check_choice("method", method, ("exact", "stratified"))
    check_choice("ablation", ablation, ("mean", "zero"))
    check_choice("scope", scope, ("active", "commit"))
    check_int("replicates", replicates, 1)
    check_int("seed", seed, 0, 2**63 - 1)
    times = _read_times(times)
    runs = _Runs(
        bridge=bridge,
        name=name,
        batches=_batches(_read_texts(bridge, texts), rows),
        size=block_size_of(bridge, block_size),
        options={
            "block_size": block_size, "scope": scope, "method": method, "replicates": replicates,
            "seed": seed, "max_states": max_states, "rows": rows,
        },
    )  # fmt: skip
    clean, found = runs.arm(_reading(sae, name))
    mean = mean_row(found.totals)
    spliced, by_sae = runs.arm(_splicing(sae, name))
    l0 = float(_l0(found.totals | by_sae.totals, [_ALL])[0])
    random = RandomDictionary.like(mean, len(by_sae.ever_active), l0, seed)
    controlled, by_random = runs.arm(_splicing(random, name))
    ablated, _ = runs.arm(_constant(sae, name, mean if ablation == "mean" else mean * 0))

    losses = (clean, spliced, controlled, ablated)
    totals = [found.totals | reader.totals for reader in (by_sae, by_random)]
    masked = [(slice(m, m + 1), 1) for m in range(runs.most)]
    exactly = method == "exact"
    return SaeScores(
        model=Path(bridge.cfg.model_name).name,
        name=name,
        sae=sae_words(sae),
        d_sae=len(by_sae.ever_active),
        block_size=runs.size,
        kind="exact" if exactly else "estimate",
        ablation=ablation,
        tokens=runs.by_text([torch.full((len(ids),), ids.shape[1] - 1) for _, ids in runs.batches]),
        nelbo=torch.stack([runs.by_text([_padded(x, runs.most) for x in arm]) for arm in losses]),
        nelbo_by_time=torch.stack([runs.by_text([x.by_time(times) for x in a]) for a in losses]),
        times=times,
        nll=torch.stack([runs.by_text([x.nll for x in arm]) for arm in losses])
        if exactly
        else None,
        explained=torch.stack([_explained(t, [_ALL, _MASKED, _REVEALED]) for t in totals]),
        explained_by_masks=torch.stack([_explained(t, masked) for t in totals]),
        l0=torch.stack([_l0(t, [_ALL, _MASKED, _REVEALED]) for t in totals]),
        l0_by_masks=torch.stack([_l0(t, masked) for t in totals]),
        dead=torch.stack([(~x.ever_active).double().mean() for x in (by_sae, by_random)]),
        trained_at=clean[0].trained_at,
        contract=Contract(
            target=f"{'exact' if exactly else 'estimated'} NELBO{' and NLL' * exactly} of the "
            f"texts, nats, as a share of what a {ablation} ablation costs",
            edited=f"{name} of {'the noisy stream' if scope == 'active' else 'both streams'}, "
            "replaced by a reconstruction or a constant",
            fixed="texts, mask patterns, weights",
            masks="all mask patterns of every block"
            if exactly
            else f"{replicates} random patterns for each number of masks, the same in each arm",
        ),
    )


_ALL, _MASKED, _REVEALED = (slice(None), slice(None)), (slice(None), 1), (slice(None), 0)


@dataclass(frozen=True)
class _Runs:
    """The texts of all arms, and how they run.

    Attributes:
        bridge: a BD3LM bridge.
        name: the hook point.
        batches: numbers of texts of one length, and their ids.
        size: tokens per block that was asked for.
        options: further arguments of :func:`mask_losses`.
    """

    bridge: Bridge
    name: str
    batches: list[tuple[list[int], Tensor]]
    size: int
    options: dict[str, Any]

    @property
    def most(self) -> int:
        """Largest number of tokens in a block."""
        return min(self.size, max(ids.shape[1] for _, ids in self.batches))

    def arm(self, seen: Seen) -> tuple[list[MaskLosses], RowReader]:
        """Run all texts with what ``seen`` returns at the hook point; return losses and rows."""
        reader = RowReader(self.name, self.bridge.cfg.mask_token_id, seen, self.most)
        losses = []
        for numbers, ids in self.batches:
            hooks = reader.hooks(min(self.size, ids.shape[1]), ids.shape[1])
            losses.append(mask_losses(self.bridge, ids, hooks=hooks, **self.options))
            reader.close(len(numbers))
        return losses, reader

    def by_text(self, values: list[Any]) -> Tensor:
        """Join values of the batches, in the order in which the texts were given."""
        order = torch.tensor([number for numbers, _ in self.batches for number in numbers])
        return torch.cat(values)[order.argsort()]


def _reading(sae: Any, name: str) -> Seen:
    """Return a function that reads the activation's moments, and leaves it as it is."""
    return lambda activation, hook: (None, moments(joined(sae, name, activation)))


def _splicing(sae: Any, name: str) -> Seen:
    """Return a function that splices an SAE in, and reads its error and its active features."""

    def seen(activation: Tensor, hook: Any) -> tuple[Tensor, Values]:
        values: Values = {}

        def read(features: Tensor) -> None:
            values["active"] = features.detach()

        edited = Splice(sae, name, edit=read)(activation, hook)
        error = (edited.double() - activation.double()).square()
        return edited, values | {"error": error.flatten(2).sum(-1, keepdim=True)}

    return seen


def _constant(sae: Any, name: str, value: Tensor) -> Seen:
    """Return a function that replaces every row by one constant."""

    def seen(activation: Tensor, hook: Any) -> tuple[Tensor, Values]:
        shape = joined(sae, name, activation).shape
        return value.to(activation).expand(shape).reshape(activation.shape), {}

    return seen


def _explained(totals: Values, cells: list[Any]) -> Tensor:
    """Return the explained variance of the rows in each cell."""
    return torch.stack([1 - totals["error"][cell].sum() / spread(totals, cell) for cell in cells])


def _l0(totals: Values, cells: list[Any]) -> Tensor:
    """Return the mean number of active features of the rows in each cell."""
    return torch.stack([totals["active"][c].sum() / totals["weight"][c].sum() for c in cells])


def _padded(losses: MaskLosses, most: int) -> Tensor:
    """Return the losses of each text by masks left; NaN where no block has so many tokens."""
    by_masks = losses.by_masks.sum(1)
    by_masks = F.pad(by_masks, (0, most - by_masks.shape[-1]))
    return by_masks.masked_fill(torch.arange(most) >= int(losses.maskable.max()), torch.nan)


def _read_texts(bridge: Bridge, texts: Any) -> list[Tensor]:
    """Return the ids of each text.

    Raises:
        InputError: for anything but strings, or ids of one length.
    """
    if isinstance(texts, str):
        texts = [texts]
    if isinstance(texts, list | tuple):
        for text in texts:
            if isinstance(text, str):
                refuse_path(text, "texts")
        return [ids.to(bridge.cfg.device) for ids in tokens_of(bridge, texts, prepend_bos=True)]
    return list(read_ids(bridge, texts, "texts"))


def _batches(texts: list[Tensor], rows: int) -> list[tuple[list[int], Tensor]]:
    """Return batches of texts of one length, of at most ``rows`` positions unless one has more."""
    check_int("rows", rows, 1)
    by_length: dict[int, list[int]] = {}
    for number, ids in enumerate(texts):
        by_length.setdefault(len(ids), []).append(number)
    batches = []
    for length, numbers in by_length.items():
        at_once = max(rows // length, 1)
        for first in range(0, len(numbers), at_once):
            part = numbers[first : first + at_once]
            batches.append((part, torch.stack([texts[number] for number in part])))
    return batches


def _read_times(times: Any) -> tuple[float, ...]:
    """Check the ends of the ranges of t.

    Raises:
        InputError: for anything but two or more ascending numbers from 0 to 1.
    """
    rule = "give two or more ascending numbers from 0 to 1"
    several = read_several("times", times, rule)
    fits = len(several) > 1 and all(is_real(t) and 0 <= t <= 1 for t in several)
    if not fits or any(a >= b for a, b in pairwise(several)):
        raise InputError(f"times={times!r}: {rule}")
    return tuple(map(float, several))
