"""Temporal effect grid as a table of the best cells, and as maps of layer by position for steps."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.effect_grid import EffectGrid
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.effects import line_effects, part_of
from transformer_lens_bd3lm.show.style import (
    BOTH_WAYS,
    COLORS,
    INK,
    QUIET,
    WIDTH,
    heat_map,
    label_tokens,
    legend_below,
    plain,
    token_label,
    write_caption,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table

SITES = {
    "residual": "residual stream",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
}


def effect_grid_table(result: EffectGrid, n: int = 12) -> Table:
    """Lay out a row a cell, the ``n`` with the largest absolute effects."""
    effects = result.effects
    columns = (_layer(result), "masks left", "position", "nats [95%]", "restored", "p")
    table = new_table(_title(result), columns, ("position",), _caption(result))
    sizes = effects.mean.abs().nan_to_num(-1).flatten()
    for flat in sizes.argsort(descending=True, stable=True)[:n]:
        layer, step, position = (int(i) for i in torch.unravel_index(flat, effects.mean.shape))
        p = float(effects.p[layer, step, position])
        restored = float(result.restored[layer, step, position])
        table.add_row(
            str(layer),
            str(result.masks_left[step]),
            f"{position} {token_label(result.positions[position])}",
            effects.text(layer, step, position),
            f"{restored:.0%}" if _has_gap(result, step) else "–",
            "–" if p != p else f"{p:.4f}",
        )
    return table


def effect_grid_figure(result: EffectGrid, most: int = 4) -> Figure:
    """Draw the restored share by layer and position, one map a step; dots: p <= 0.05.

    Several texts with few positions or groups are drawn as lines with intervals instead, in nats.

    Args:
        result: the grid.
        most: largest number of steps that are drawn, evenly over all.

    Raises:
        InputError: for fewer than one step.
    """
    if most < 1:
        raise InputError(f"most={most}: give 1 or more")
    steps = _steps(result, most)
    if len(result.by_text) > 1 and len(result.positions) <= len(COLORS):
        return _lines(result, steps)
    layers, _, width = result.effects.mean.shape
    high = 0.16 * layers + 0.25
    size = (min(max(0.2 * width, 4.4) + 1.2, WIDTH), high * len(steps) + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    _write_around(figure, result)
    grid = figure.add_gridspec(len(steps) + 1, 1, height_ratios=(0.1, *[high] * len(steps)))
    scale = figure.add_subplot(grid[0])
    for row, step in enumerate(steps):
        axes = figure.add_subplot(grid[row + 1])
        name = "share of the clean prediction that is restored; colors end at ±1"
        values = result.restored[:, step].nan_to_num(0.0)
        if not _has_gap(result, step):
            values = torch.full_like(values, torch.nan)
            axes.text(0.5, 0.5, "no gap to restore a share of", transform=axes.transAxes,
                      ha="center", va="center", fontsize=9, color=QUIET)  # fmt: skip
        heat_map(axes, None if row else scale, values, 0,
                 (-1.0, 1.0), BOTH_WAYS, name)  # fmt: skip
        sure = (result.effects.significant[:, step]).nonzero().T
        axes.plot(*sure.flip(0).tolist(), ".", color=INK, markersize=3)
        axes.set_ylabel(_layer(result), color=INK, fontsize=9)
        masks = "all\norders" if result.mode == "exact" else _masks(result.masks_left[step])
        masks += f"\ngap {float(result.gap[step]):.2f} nats"
        axes.text(1.01, 0.5, masks, transform=axes.transAxes, fontsize=8, va="center", color=INK)
        axes.set_label(masks.replace("\n", " "))
        axes.set_yticks(range(0, layers, 1 if layers < 9 else 2))
        last = row == len(steps) - 1
        label_tokens(axes.xaxis, result.positions, 40)
        axes.tick_params(labelbottom=last)
        plain(axes)
    return figure


def _lines(result: EffectGrid, steps: Sequence[int]) -> Figure:
    """Draw mean effects by depth with intervals: a panel a step, a line a position or group."""
    columns = min(len(steps), 2)
    rows = -(-len(steps) // columns)
    width = WIDTH if columns == 2 else 5.0
    figure = Figure(figsize=(width, 2.2 * rows + 1.6), layout="constrained")
    _write_around(figure, result)
    grid = figure.add_gridspec(rows, columns)
    first = None
    for number, step in enumerate(steps):
        row, column = divmod(number, columns)
        axes = figure.add_subplot(grid[row, column], sharex=first, sharey=first)
        first = first or axes
        for position, name in enumerate(result.positions):
            part = part_of(result.effects, (slice(None), step, position))
            line_effects(axes, range(len(part.mean)), part, name, COLORS[position])
        masks = "all orders" if result.mode == "exact" else _masks(result.masks_left[step])
        axes.set_title(masks.replace("\n", " "), loc="left", fontsize=9, color=INK)
        if not column:
            axes.set_ylabel("effect, nats", color=INK, fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if number + columns >= len(steps):
            axes.set_xlabel(_layer(result), color=INK, fontsize=9)
        plain(axes)
    legend_below(figure, figure.axes[0], 3)
    return figure


def _has_gap(result: EffectGrid, step: int) -> bool:
    """Whether a step's gap is at least a tenth of the largest: shares of less are noise."""
    return float(result.gap[step].abs()) >= 0.1 * float(result.gap.abs().max())


def _steps(result: EffectGrid, most: int) -> Sequence[int]:
    """Return the numbers of at most so many steps, evenly over all."""
    steps = len(result.masks_left)
    if steps <= most:
        return range(steps)
    places = torch.linspace(0, steps - 1, most) if most > 1 else torch.zeros(1)
    return places.round().long().tolist()


def _write_around(figure: Figure, result: EffectGrid) -> None:
    """Write the title above a figure and the caption below it."""
    write_title(figure, _title(result))
    write_caption(figure, _caption(result))


def _masks(left: int) -> str:
    """Return a number of masks as two short lines."""
    return f"{count(left, 'mask')}\nleft"


def _layer(result: EffectGrid) -> str:
    """Return the name of the first axis."""
    return "depth" if result.site == "residual" else "layer"


def _title(result: EffectGrid) -> str:
    """Say what was patched and read."""
    target = " ".join(result.target.split())
    what = "its target" if target == "the target" else repr(target)
    return (
        f"Clean {SITES[result.site]} restored: effect on log p of {what}, {result.model}, "
        f"block size {result.block_size}"
    )


def _caption(result: EffectGrid) -> str:
    """Say how large the gap is, and what the dots are."""
    gaps = result.gap[result.gap.isfinite()]
    texts = len(result.by_text)
    sure = "; filled dots: p ≤ 0.05, max-T over all cells" if texts > 1 else ""
    both = "; X/Y: clean token/corrupted token" if texts == 1 else ""
    return (
        f"{count(texts, 'pair')} of texts; gap, clean minus corrupted log p: "
        f"{float(gaps.min()):.2f} to {float(gaps.max()):.2f} nats over steps{sure}{both}"
    )
