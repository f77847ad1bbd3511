"""Mean effects with intervals, as a table, along a line and as a map; other drawings use these."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.effects import FEWEST, Effects
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    BLUE,
    BOTH_WAYS,
    INK,
    QUIET,
    heat_map,
    number_axes,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table


def effects_table(result: Effects, n: int = 20) -> Table:
    """Lay out a row a cell, the ``n`` with the smallest p-values: mean, interval, p, texts."""
    interval = f"[{result.level:.0%}]"
    caption = f"{interval}: over texts like these."
    if result.mean.numel() != 1:
        caption = (
            f"{result.mean.numel()} cells; p is corrected for all of them (max-T). {interval}: of "
            "one cell, over texts like these."
        )
    table = new_table(
        "mean effects", ("cell", f"mean {interval}", "p", "texts"), ("cell",), caption
    )
    order = torch.stack([result.p.flatten(), -result.mean.abs().flatten()]).nan_to_num(9)
    best = sorted(range(order.shape[1]), key=lambda cell: tuple(order[:, cell].tolist()))
    for flat in best[:n]:
        cell = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), result.mean.shape))
        name = ", ".join(map(str, cell)) or "all"
        p, texts = float(result.p[cell]), int(result.texts[cell])
        table.add_row(name, result.text(*cell), "–" if p != p else f"{p:.4f}", str(texts))
    return table


def effects_figure(result: Effects) -> Figure:
    """Draw effects of one axis as a line with intervals, and of two axes as a map.

    Raises:
        InputError: for effects of more than two axes.
    """
    if result.mean.dim() > 2:
        raise InputError(
            f"effects of {result.mean.dim()} axes have no figure: give the values of two of them"
        )
    figure = Figure(figsize=(6.4, 3.4), layout="constrained")
    texts = int(result.texts.max())
    write_title(figure, f"Mean effects over {count(texts, 'text')}, {result.level:.0%} intervals")
    if result.mean.dim() == 2:
        grid = figure.add_gridspec(2, 1, height_ratios=(0.05, 1))
        axes, scale = (figure.add_subplot(grid[row]) for row in (1, 0))
        map_effects(axes, scale, result, "mean effect, in the unit of the values; dots: p < "
                    f"{1 - result.level:.2g}, corrected")  # fmt: skip
        axes.set(xlabel="cell, second axis", ylabel="cell, first axis")
        return figure
    axes = figure.add_subplot()
    line_effects(axes, range(result.mean.numel()), result, "mean", BLUE)
    axes.set(xlabel="cell", ylabel="mean effect, in the unit of the values")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    return figure


def part_of(result: Effects, index: tuple[Any, ...]) -> Effects:
    """Return the effects of some cells, by an index of tensors of cells."""
    names = ("mean", "low", "high", "p", "texts")
    return replace(result, **{name: getattr(result, name)[index] for name in names})


def about_intervals(result: Effects) -> str:
    """Say what an interval is, or why there is none, and which points of a figure are filled."""
    if bool((result.low.isfinite() | result.high.isfinite()).any()):
        return f"[{result.level:.0%}] over texts like these; filled: p < {1 - result.level:.2g}."
    return f"No interval: it needs {FEWEST} texts or more."


def line_effects(axes: Axes, x: Sequence[Any], result: Effects, label: str, color: str) -> None:
    """Draw effects of one axis as a line, their intervals as a band, and those that differ from 0.

    Args:
        axes: where it goes.
        x: where each cell stands.
        result: effects of one axis, or of one cell.
        label: name of the line in a legend.
        color: of line and band.
    """
    mean, low, high = (values.flatten() for values in (result.mean, result.low, result.high))
    sure = result.significant.flatten()
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.fill_between(x, low.numpy(), high.numpy(), color=color, alpha=0.18, linewidth=0)
    axes.plot(x, mean.numpy(), color=color, linewidth=1.3, label=label)
    for filled in (False, True):
        at = [i for i in range(len(x)) if bool(sure[i]) == filled]
        face = color if filled else "white"
        points = [x[i] for i in at], [float(mean[i]) for i in at]
        axes.plot(*points, "o", color=color, markerfacecolor=face, markersize=4)


def map_effects(axes: Axes, scale: Axes, result: Effects, title: str, first_row: int = 0) -> None:
    """Draw effects of two axes as a map, white at 0, with a dot at each that differs from 0.

    Args:
        axes: where the map goes.
        scale: where its color scale goes.
        result: effects of two axes.
        title: of the map.
        first_row: number of the first row.
    """
    most = float(result.mean.abs().nan_to_num().max()) or 1.0
    heat_map(axes, scale, result.mean, first_row, (-most, most), BOTH_WAYS, title)
    rows, columns = result.significant.nonzero().T.tolist()
    axes.plot(columns, [row + first_row for row in rows], ".", color=INK, markersize=3)
    number_axes(axes)
