"""``feature`` and ``features``: read some features of a sparse autoencoder over texts, and ablate.

One pass over the noisy blocks of the texts reads the activations of all features asked for; then
each is ablated in the blocks in which it is active (``ablation``), and its contexts are read
(``contexts``).

It names no feature: what one means is for the reader of its contexts to say.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import read_text_numbers
from transformer_lens_bd3lm.analysis.features.ablation import Ablation, ablate, writes_residual
from transformer_lens_bd3lm.analysis.features.contexts import (
    Context,
    Peak,
    context_of,
    ranges_of,
    read_clean,
    top_peaks,
)
from transformer_lens_bd3lm.analysis.features.noised import NoisedBlocks, by_place, read_noised
from transformer_lens_bd3lm.analysis.features.over_run import rates_over_run
from transformer_lens_bd3lm.analysis.features.result import Feature, Features
from transformer_lens_bd3lm.analysis.sae.splice import Splice, check_fits, joined, sae_words
from transformer_lens_bd3lm.bridge.block_size import block_size_of
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.bridge.texts import bos_of
from transformer_lens_bd3lm.checks import check_choice, check_int, read_several
from transformer_lens_bd3lm.denoising.denoise import denoise
from transformer_lens_bd3lm.denoising.replay import require_run
from transformer_lens_bd3lm.denoising.run import Run
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract

BINS = 24
RUN_ROWS, RUN_TOKENS = 16, 32  # of the runs that are written where none is given


def feature(
    bridge: Bridge, sae: Any, name: str, number: int, texts: Any, **options: Any
) -> Feature:
    """Measure one feature of an SAE: contexts, activity, tokens, and the effect of its ablation.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        sae: anything with ``encode(x)`` and ``decode(features)``; see :func:`load_sae`.
        name: the hook point.
        number: number of the feature.
        texts: strings or rows of ids, as in :func:`features`.
        options: further arguments of :func:`features`.

    Raises:
        InputError, HookNameError, NotExactError, CheckpointError: as :func:`features`.
    """
    return features(bridge, sae, name, texts, [number], **options)[0]


@torch.no_grad()
def features(
    bridge: Bridge,
    sae: Any,
    name: str,
    texts: Any,
    numbers: Any = None,
    *,
    n: int = 20,
    block_size: int | str | None = None,
    contexts: int = 6,
    run: Any = None,
    row_texts: Any = None,
    method: str = "exact",
    replicates: int = 8,
    seed: int = 0,
    max_states: int = 256,
    rows: int = 2048,
    progress: bool | None = None,
) -> Features:
    """Measure several features of an SAE over the same texts; each is a page.

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        sae: anything with ``encode(x)`` and ``decode(features)``; see :func:`load_sae`.
        name: the hook point.
        texts: a string, or strings or rows of ids of any length up to the context; position 0 is
            BOS. Intervals are over texts: give 5 or more.
        numbers: numbers of the features; None for the ``n`` with the largest mean activation at
            masks.
        n: number of features, beside None.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        contexts: number of contexts in each range of masks left, at masks and at written tokens.
        run: a finished run, over whose steps the activity is read. None writes 16 texts of up to 32
            tokens from BOS, with ``seed``.
        row_texts: number of each row's text, if rows of ``run`` share texts.
        method: ``"exact"`` has all mask patterns of every block; ``"stratified"`` draws patterns,
            at any block size, as in :func:`sae_scores`.
        replicates: number of random patterns for each number of masks, of ``"stratified"``.
        seed: random seed of these, of the control's direction, and of the runs.
        max_states: largest number of mask patterns a block, as in :func:`exact`.
        rows: largest number of positions in one pass, as in :func:`exact`.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: for arguments that do not fit, an SAE of another width, hooks on the bridge, and
            the autoregressive baseline.
        HookNameError: for a hook name that the bridge does not have.
        NotExactError: with time conditioning, in training mode with dropout, or where predictions
            are NaN.
        CheckpointError: for a name whose checkpoint cannot be loaded.
    """
    bridge = read_bridge(bridge)
    check_fits(bridge, sae, name)
    check_choice("method", method, ("exact", "stratified"))
    for argument, value in (("n", n), ("contexts", contexts), ("replicates", replicates)):
        check_int(argument, value, 1)
    check_int("rows", rows, 1)
    check_int("seed", seed, 0, 2**63 - 1)
    wanted = None if numbers is None else _read_numbers(numbers)
    size = block_size_of(bridge, block_size)
    noised = read_noised(bridge, texts, size, method, replicates, seed, max_states, rows)
    run = _read_run(bridge, run, size, seed)
    if row_texts is not None:
        row_texts = read_text_numbers("row_texts", row_texts, len(run.ends))
    reader = _Reader(bridge, sae, name, noised)
    chosen = reader.largest(n) if wanted is None else torch.tensor(wanted)
    read = reader.read(chosen)
    run_rates = rates_over_run(run, sae, name, chosen.to(bridge.cfg.device))
    made = []
    with progress_bar("features", len(chosen), progress) as update:
        for place, number in enumerate(chosen.tolist()):
            values = [x[..., place] for x in read.values]
            splice = Splice(sae, name, error="kept", set_to={number: 0.0})
            ablation = ablate(
                noised, values, splice, (seed + number) % 2**63, reader.texts, reader.most
            )
            made.append(
                _feature(
                    reader,
                    read,
                    ablation,
                    number,
                    place,
                    contexts,
                    run_rates[..., place],
                    row_texts,
                    method,
                    replicates,
                    size,
                )  # fmt: skip
            )
            update(advance=1)
    return Features(tuple(made))


@dataclass(frozen=True)
class _Read:
    """What a pass over all blocks read, by length of the texts.

    Attributes:
        values: activations of the features ``[block, place, feature]``; NaN where there is no row.
        log_p: log p of the true tokens of masked places ``[block, place]``, nats.
        earlier: activations of the features in the texts as they are ``[batch, pos, feature]``.
        d_sae: number of features of the SAE.
    """

    values: list[Tensor]
    log_p: list[Tensor]
    earlier: list[Tensor]
    d_sae: int


@dataclass(frozen=True)
class _Reader:
    """The blocks of the texts, and the SAE that reads them."""

    bridge: Bridge
    sae: Any
    name: str
    noised: list[NoisedBlocks]

    @property
    def texts(self) -> int:
        """Number of texts."""
        return sum(len(blocks.numbers) for blocks in self.noised)

    @property
    def most(self) -> int:
        """Largest number of masks in a block."""
        return max(int(blocks.left.max()) for blocks in self.noised)

    def largest(self, n: int) -> Int[Tensor, " feature"]:
        """Return the features with the largest mean activation at masks, largest first."""
        total: Tensor = torch.zeros(())
        for blocks in self.noised:
            for part, features, _ in self._passes(blocks):
                masked = blocks.masked[part]
                weight = (blocks.share[part] / masked.sum(-1))[:, None].expand_as(masked)
                total = total + weight[masked] @ features[masked].nan_to_num()
        return total.argsort(descending=True, stable=True)[:n]

    def read(self, numbers: Int[Tensor, " feature"]) -> _Read:
        """Read the activations of some features, and the predictions.

        Raises:
            InputError: for a feature that the SAE does not have.
        """
        read, d_sae = _Read([], [], [], 0), 0
        for blocks in self.noised:
            values, log_p = [], []
            for _, features, log_probs in self._passes(blocks):
                d_sae = features.shape[-1]
                if int(numbers.max()) >= d_sae:
                    raise InputError(
                        f"feature {int(numbers.max())}: this SAE has features 0..{d_sae - 1}"
                    )
                values.append(features[..., numbers])
                log_p.append(log_probs)
            read.values.append(torch.cat(values))
            read.log_p.append(torch.cat(log_p))
            rows = list(range(len(blocks.numbers)))
            read.earlier.append(read_clean(blocks, self.sae, self.name, numbers, rows))
        return _Read(read.values, read.log_p, read.earlier, d_sae)

    def _passes(self, blocks: NoisedBlocks) -> Any:
        """Yield blocks of a pass, their features ``[block, place, d_sae]``, and log p."""
        seen: list[Tensor] = []

        def see(x: Tensor, hook: Any) -> None:
            features = self.sae.encode(joined(self.sae, self.name, x))
            if features.ndim != 3:
                raise InputError(
                    f"{self.name} holds several vectors a position for this SAE: give an SAE of "
                    "all heads together, or another hook point"
                )
            seen.append(features[0])

        for part in blocks.parts(torch.ones(len(blocks.text), dtype=torch.bool)):
            noisy = blocks.noisy(part)
            log_probs = blocks.log_probs(noisy, [(self.name, see)])
            true = blocks.passes.true(noisy)[noisy.masked_rows, None].cpu()
            log_p = by_place(noisy, log_probs.gather(-1, true)[:, 0])
            yield part, by_place(noisy, seen.pop()), log_p


def _feature(
    reader: _Reader,
    read: _Read,
    ablation: Ablation,
    number: int,
    place: int,
    contexts: int,
    run_rate: Tensor,
    row_texts: Any,
    method: str,
    replicates: int,
    size: int,
) -> Feature:
    """Put one feature together."""
    noised, bridge = reader.noised, reader.bridge
    values = [x[..., place] for x in read.values]
    density, rate, histogram, edges = _activity(noised, values, reader.texts, reader.most)
    tokens = torch.cat([blocks.passes.counted.sum(-1) for blocks in noised])
    order = torch.cat([blocks.numbers for blocks in noised]).argsort()
    weight = ablation.own_weight.sum()
    exactly = method == "exact"
    direct = writes_residual(reader.name)
    ranges = ranges_of(reader.most)
    return Feature(
        model=Path(bridge.cfg.model_name).name,
        name=reader.name,
        sae=sae_words(reader.sae),
        number=number,
        d_sae=read.d_sae,
        block_size=size,
        kind="exact" if exactly else "estimate",
        tokens=tokens[order],
        ranges=ranges,
        contexts=tuple(_contexts(reader, read, ablation, values, place, ranges, contexts)),
        density=density,
        rate=rate,
        histogram=histogram,
        edges=edges,
        nelbo=_nelbo(noised, read.log_p, reader.texts, reader.most),
        nelbo_change=ablation.nelbo,
        kl=ablation.kl,
        own_change=ablation.own,
        own_weight=ablation.own_weight,
        measured=ablation.measured / weight,
        direct=ablation.direct / weight if direct else None,
        run_rate=run_rate,
        run_texts=row_texts,
        tokenizer=bridge.tokenizer,
        trained_at=noised[0].passes.trained_at,
        contract=Contract(
            target=f"{'exact' if exactly else 'estimated'} change of the texts' NELBO, nats a "
            "token, and KL(as it is || edited) of the predictions with the same weights",
            edited=f"{reader.name} of the noisy stream: feature {number} set to 0, the SAE's error "
            "kept; or as large a change of the same rows in a random direction",
            fixed="texts, mask patterns, weights",
            masks="all mask patterns of every block"
            if exactly
            else f"{replicates} random patterns for each number of masks, the same in each arm",
        ),
    )


def _contexts(
    reader: _Reader,
    read: _Read,
    ablation: Ablation,
    values: list[Tensor],
    place: int,
    ranges: tuple[tuple[int, int], ...],
    n: int,
) -> list[Context]:
    """Return the contexts of a feature, at masks first, by range of masks left."""
    peaks: list[Peak] = [
        peak
        for masked in (True, False)
        for masks in ranges
        for peak in top_peaks(reader.noised, values, masks, masked, n)
    ]
    return [
        context_of(
            peak,
            reader.noised[peak.group],
            values[peak.group],
            read.log_p[peak.group],
            ablation.log_p[peak.group],
            read.earlier[peak.group][..., place],
        )  # fmt: skip
        for peak in peaks
    ]


def _activity(
    noised: list[NoisedBlocks], values: list[Tensor], texts: int, most: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return density, rate by masks left, and the histogram of activations with its edges."""
    counted = [x[b.counted & x.isfinite()] for b, x in zip(noised, values, strict=True)]
    on = torch.cat([x[x != 0] for x in counted])
    low, high = (float(on.min()), float(on.max())) if len(on) else (0.0, 1.0)
    low = min(low, 0.0)
    edges = torch.linspace(low, high if high > low else low + 1.0, BINS + 1, dtype=torch.float64)
    active, rows = torch.zeros(2, texts, 2, most, dtype=torch.float64)
    mass, all_rows = torch.zeros(2, texts, 2, dtype=torch.float64)
    histogram = torch.zeros(2, BINS, dtype=torch.float64)
    for blocks, x in zip(noised, values, strict=True):
        present = blocks.counted & x.isfinite()
        block, place = present.nonzero().unbind(-1)
        value, kind = x[block, place], (~blocks.masked[block, place]).long()
        text, left = blocks.text_number[block], blocks.left[block]
        share = blocks.share[block]
        weight = share / blocks.counted.sum(-1)[block]
        is_on = (value != 0).double()
        cell = (text, kind, left - 1)
        rows.index_put_(cell, share, accumulate=True)
        active.index_put_(cell, share * is_on, accumulate=True)
        all_rows.index_put_((text, kind), weight, accumulate=True)
        mass.index_put_((text, kind), weight * is_on, accumulate=True)
        bin_of = (torch.bucketize(value, edges, right=True) - 1).clamp(0, BINS - 1)
        histogram.index_put_((kind, bin_of), weight * is_on, accumulate=True)
    return mass / all_rows, active / rows, histogram / all_rows.sum(0)[:, None], edges


def _nelbo(
    noised: list[NoisedBlocks], log_p: list[Tensor], texts: int, most: int
) -> Float[Tensor, "text masks"]:
    """Return the NELBO of each text by masks left, nats."""
    total = torch.zeros(texts, most, dtype=torch.float64)
    for blocks, values in zip(noised, log_p, strict=True):
        loss = -values.nan_to_num().masked_fill(~blocks.masked, 0.0).sum(-1)
        cell = (blocks.text_number, blocks.left - 1)
        total.index_put_(cell, loss * blocks.share / blocks.left, accumulate=True)
    return total


def _read_numbers(numbers: Any) -> list[int]:
    """Check the numbers of features.

    Raises:
        InputError: for anything but different ints from 0 on.
    """
    rule = "give different numbers of features, as [3, 17]"
    several = read_several("numbers", numbers, rule)
    for number in several:
        check_int("a number of numbers", number, 0)
    if not several or len(set(several)) < len(several):
        raise InputError(f"numbers={numbers!r}: {rule}")
    return [int(number) for number in several]


def _read_run(bridge: Bridge, run: Any, size: int, seed: int) -> Run:
    """Return the run whose steps are read: the one given, or one that is written.

    Raises:
        InputError: for anything but a run of this bridge.
    """
    if run is None:
        bos = bos_of(bridge)
        new = min(RUN_TOKENS, bridge.original_model.config.model_length - 1)
        return denoise(
            bridge, [[bos]] * RUN_ROWS, max_new_tokens=new, block_size=min(size, new + 1),
            seed=seed, progress=False,
        )  # fmt: skip
    require_run(run)
    if run.bridge is not bridge:
        raise InputError("run is another bridge's: give a run of the bridge whose SAE is read")
    return run
