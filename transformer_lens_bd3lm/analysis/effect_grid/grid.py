"""Temporal effect grid: what a clean activation restores, by layer, step and position.

Two texts, clean and corrupted, go through the same steps. At one step the corrupted run gets the
clean run's activation at one place, and everything after it in that pass is computed again (causal
tracing, over the steps of block diffusion)::

    effect(layer, step, position) = log p(target | corrupted, patched) - log p(target | corrupted)

Tokens are pinned, so a patch at a step changes that step's prediction and no other: its direct
effect. Positions of earlier blocks are read at every step as they are stored: a patch there shows
what that step reads of them.

With mode "exact" there are no steps: log p is that of the target as a continuation, summed over all
reveal orders, and a patch acts under every mask pattern.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from transformer_lens_bd3lm.analysis.effect_grid.exact_patches import (
    check_continuation,
    exact_effects,
)
from transformer_lens_bd3lm.analysis.effect_grid.pairs import (
    Pair,
    check_site,
    read_groups,
    read_pairs,
)
from transformer_lens_bd3lm.analysis.effect_grid.patching import Patches, site_names
from transformer_lens_bd3lm.analysis.effects import Effects, mean_effects
from transformer_lens_bd3lm.bridge.block import require_eval
from transformer_lens_bd3lm.bridge.boot import read_bridge
from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.checks import check_choice, check_int
from transformer_lens_bd3lm.progress import progress_bar
from transformer_lens_bd3lm.result import Contract, Result, count, plain_values


@dataclass(frozen=True, kw_only=True, repr=False)
class EffectGrid(Result):
    """Effect of a clean activation on log p of a target, by layer, step and position; float64, CPU.

    Attributes:
        effects: means over texts, intervals and corrected p-values, in nats ``[layer, step,
            position]``. For the residual stream the first axis is depth: 0 after the embedding,
            i + 1 after layer i.
        by_text: the effects of each text ``[text, layer, step, position]``, nats, means over seeds;
            NaN at a step or role that a text does not have.
        clean_log_p: log p of the target in the clean run ``[text, step]``, nats.
        corrupted_log_p: the same in the corrupted run.
        masks_left: number of masks of the block at each step; those of the target with "exact".
        mode: ``"pinned"``, or ``"exact"``: one step, which stands for all reveal orders.
        site: what was patched: ``"residual"``, ``"attn_out"`` or ``"mlp_out"``.
        positions: label of each position, or of each group.
        target: the target as text, or its ids.
        model: name of the model.
        block_size: tokens per block.
        contract: what was measured, edited and held fixed.
    """

    effects: Effects
    by_text: Float[Tensor, "text layer step position"] = field(repr=False)
    clean_log_p: Float[Tensor, "text step"] = field(repr=False)
    corrupted_log_p: Float[Tensor, "text step"] = field(repr=False)
    masks_left: list[int]
    mode: str
    site: str
    positions: list[str] = field(repr=False)
    target: str
    model: str
    block_size: int
    contract: Contract

    @property
    def gap(self) -> Float[Tensor, " step"]:
        """Clean minus corrupted log p of the target at each step, mean over texts, nats."""
        return (self.clean_log_p - self.corrupted_log_p).nanmean(0)

    @property
    def restored(self) -> Float[Tensor, "layer step position"]:
        """Mean effect as a share of the mean gap: 1 restores the clean run's prediction.

        Both means are over the texts that have a value in the cell.
        """
        gaps = (self.clean_log_p - self.corrupted_log_p)[:, None, :, None].expand_as(self.by_text)
        return self.effects.mean / gaps.masked_fill(self.by_text.isnan(), torch.nan).nanmean(0)

    def best(self, n: int = 1) -> list[tuple[int, int, int]]:
        """Return the ``n`` cells (layer, step, position) with the largest mean effects."""
        order = self.effects.mean.nan_to_num(-torch.inf).flatten().argsort(descending=True)[:n]
        cells = torch.unravel_index(order, self.effects.mean.shape)
        return [(int(i), int(j), int(k)) for i, j, k in zip(*cells, strict=True)]

    def _figures(self) -> str:
        layer, step, position = self.best()[0]
        return (
            f"{self.site}, {count(len(self.by_text), 'text')}: largest "
            f"{self.effects.text(layer, step, position)} nats at layer {layer}, "
            f"{self.masks_left[step]} masks left, {self.positions[position]!r}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all values as plain values for JSON; ``restored`` and ``gap`` included."""
        values = {
            "model": self.model,
            "block_size": self.block_size,
            "mode": self.mode,
            "site": self.site,
            "target": self.target,
            "masks_left": self.masks_left,
            "positions": self.positions,
            "effects_nats": self.effects.to_dict(),
            "effects_nats_by_text": self.by_text,
            "clean_log_p_nats": self.clean_log_p,
            "corrupted_log_p_nats": self.corrupted_log_p,
            "gap_nats": self.gap,
            "restored": self.restored,
            "contract": vars(self.contract),
        }
        return plain_values(values)


@torch.no_grad()
def effect_grid(
    bridge: Bridge,
    clean: Any,
    corrupted: Any,
    target: Any,
    *,
    block_size: int | str | None = None,
    mode: str = "pinned",
    site: str = "residual",
    position: int | None = None,
    groups: Any = None,
    steps: int = 8,
    seeds: int = 1,
    seed: int = 0,
    max_states: int = 256,
    rows: int = 2048,
    progress: bool | None = None,
) -> EffectGrid:
    """Compute what a clean activation restores at each layer, step and position (causal tracing).

    The clean text is denoised once in a random order in which the target comes last; both runs then
    go through the same states (TimeROME 2606.12841, causal tracing 2606.03924).

    Args:
        bridge: a BD3LM bridge, or a checkpoint's name, which is booted.
        clean: a text, or several, as strings or ids, whose target the model is to predict. Masks in
            it are filled in; a text without masks goes on with the target.
        corrupted: the same texts with other tokens: as many tokens, and masks at the same
            positions.
        target: the target as a string or the id of a token, for all texts or one for each. Several
            tokens are predicted in parallel, and have to lie in one block.
        block_size: tokens per block, or ``"full"``; the bridge's by default.
        mode: ``"pinned"``: the direct effect at each step of one order; for total effects on text
            that is drawn anew, see :func:`.replay` with ``"coupled"``. ``"exact"``: the effect on
            the exact log p of the target as a continuation, over all reveal orders, where blocks
            are small; the target may lie in several blocks, and the last one ends with it.
        site: what is patched: ``"residual"``, the stream after each layer; ``"attn_out"`` or
            ``"mlp_out"``, what a layer's attention or MLP adds to it.
        position: where the target begins; by default at the first mask, or behind the text.
        groups: ``{name: positions}`` to patch together, for all texts or a list with one for each;
            or ``"roles"``: tokens that differ between the two texts and occur in the target, others
            that differ, those that do not, and the target's masks. By default each position, of
            texts whose positions line up.
        steps: largest number of steps, evenly over those of the target's block.
        seeds: number of reveal orders of each text, averaged.
        seed: random seed of the first order and of its tokens.
        max_states: with "exact", largest number of mask patterns a block; more are refused.
        rows: largest number of positions in one pass, unless one text has more.
        progress: show a bar; by default on a terminal.

    Raises:
        InputError: for texts that do not fit each other (a position that is masked in one and not
            in the other among them), targets outside the masks or across blocks, groups that do not
            fit, and the autoregressive baseline.
        BlockSizeError: for a value that is not a block size of this checkpoint.
        CheckpointError: for a name whose checkpoint cannot be loaded.
        NotExactError: in training mode with dropout; with "exact" under time conditioning.
    """
    bridge = read_bridge(bridge)
    require_eval(bridge)
    check_site(site)
    check_choice("mode", mode, ("pinned", "exact"))
    check_int("steps", steps, 1)
    check_int("seeds", seeds, 1)
    check_int("seed", seed, 0, 2**63 - 1 - seeds)
    check_int("rows", rows, 1)
    pairs = read_pairs(bridge, clean, corrupted, target, block_size, position, mode)
    names, positions = read_groups(groups, pairs)
    masks_left = _masks_left(pairs, steps)
    if mode == "exact":
        masks_left, seeds = [len(pairs[0].at)], 1
        for number, pair in enumerate(pairs):
            check_continuation(pair, number)
    sites, width = site_names(bridge, site), len(positions[0])
    shape = (len(pairs), seeds, len(masks_left))
    values = torch.full((*shape, len(sites), width), torch.nan, dtype=torch.float64)
    log_p = torch.full((*shape, 2), torch.nan, dtype=torch.float64)
    with progress_bar("patching", len(pairs) * seeds * len(masks_left), progress) as update:
        for text, (pair, each) in enumerate(zip(pairs, positions, strict=True)):
            if mode == "exact":
                parts = exact_effects(bridge, pair, sites, each, rows, max_states)
                values[text, 0, 0], log_p[text, 0, 0] = (
                    parts[0],
                    torch.tensor(parts[1:], dtype=values.dtype),
                )
                update(advance=1)
                continue
            patches = Patches(bridge, pair, sites, rows)
            for number in range(seeds):
                for state in pair.states(bridge, seed + number):
                    if state.masks_left in masks_left:
                        cell = text, number, masks_left.index(state.masks_left)
                        values[cell], *both = patches.effects(state, each)
                        log_p[cell] = torch.tensor(both, dtype=torch.float64)
                        update(advance=1)
    by_text = values.nanmean(1).transpose(1, 2)
    for text, each in enumerate(positions):
        by_text[text, ..., [not group for group in each]] = torch.nan
    clean_log_p, corrupted_log_p = log_p.nanmean(1).unbind(-1)
    return EffectGrid(
        effects=mean_effects(by_text),
        by_text=by_text,
        clean_log_p=clean_log_p,
        corrupted_log_p=corrupted_log_p,
        masks_left=masks_left,
        mode=mode,
        site=site,
        positions=names or _labels(bridge, pairs),
        target=_words(bridge, pairs[0].target) if len(pairs) == 1 else "the target",
        model=Path(bridge.cfg.model_name).name,
        block_size=pairs[0].clean.block_size,
        contract=_contract(mode, site, seeds),
    )


def _contract(mode: str, site: str, seeds: int) -> Contract:
    """Return what was measured, edited and held fixed."""
    if mode == "exact":
        return Contract(
            target="change of the exact log p of the target as a continuation, nats",
            edited=f"{site} at one position or group, in every pass and in what is stored",
            fixed="the tokens of text and target",
            masks="every mask pattern of the target's blocks, over all reveal orders",
        )
    return Contract(
        target="change of log p of the target at its masks, nats",
        edited=f"{site} at one position or group, at one step: the clean run's in its place",
        fixed="tokens and reveal order (pinned): a step's patch acts on that step alone",
        masks=f"the target's block in {seeds} random order(s) a text, the target last",
    )


def _masks_left(pairs: list[Pair], steps: int) -> list[int]:
    """Return the numbers of masks left that are shown, evenly over those of all texts."""
    every: set[int] = set()
    for pair in pairs:
        start = int(pair.at[0]) // pair.clean.block_size * pair.clean.block_size
        others = int(pair.clean.masks()[0, start:].sum()) - len(pair.at)
        every |= {len(pair.at) + k for k in range(others + 1)}
    counts = sorted(every, reverse=True)
    if len(counts) <= steps:
        return counts
    places = torch.linspace(0, len(counts) - 1, steps) if steps > 1 else torch.zeros(1)
    return [counts[i] for i in places.round().long().unique().tolist()]


def _labels(bridge: Bridge, pairs: list[Pair]) -> list[str]:
    """Return a label for each position: its token where all texts have one, else its number."""
    pair = pairs[0]
    if len(pairs) > 1:
        return [str(i) for i in range(pair.length)]
    labels = []
    clean, corrupted = pair.clean.tokens[0], pair.corrupted[0]
    for i, (a, b) in enumerate(zip(clean, corrupted, strict=True)):
        if i in pair.at.tolist():
            labels.append("target")
        else:
            label = _words(bridge, a[None])
            labels.append(label if a == b else f"{label}/{_words(bridge, b[None])}")
    return labels


def _words(bridge: Bridge, ids: Tensor) -> str:
    """Return tokens as text; their ids without a tokenizer."""
    if bridge.tokenizer is None:
        return " ".join(map(str, ids.tolist()))
    return bridge.tokenizer.decode(ids.tolist())
