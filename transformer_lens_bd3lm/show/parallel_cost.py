"""The cost of drawing tokens at once, as a table and along the block size."""

from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.analysis.parallel_cost import ParallelCost
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.effects import about_intervals, line_effects, part_of
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    legend_below,
    plain,
    write_caption,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table, off_distribution

_COLORS = (BLUE, ORANGE, "#009e73", "#cc79a7", INK, "#56b4e9", QUIET)


def _name(at_once: int | str) -> str:
    """Return what a column draws in one step, in words."""
    if at_once == "block":
        return "whole block"
    return f"{at_once} at once" if isinstance(at_once, int) else f"ancestral, {at_once}"


def _caption(result: ParallelCost) -> str:
    """Say what the figures are over, and how they were computed."""
    caption = f"Mean over {count(len(result.nats), 'text')}. {about_intervals(result.effects)}"
    if result.kind == "estimate":
        caption += f" Estimates are unbiased, from {count(result.draws, 'draw')} of each text."
    return caption + off_distribution(result.trained_at)


def parallel_table(result: ParallelCost) -> Table:
    """Lay out a row a block size, and a column for what is drawn at once: nats a token."""
    columns = ("block size", "kind", *map(_name, result.at_once))
    table = new_table(f"{result.title}, nats a token", columns, ("kind",), _caption(result))
    for row, (size, kind) in enumerate(zip(result.block_sizes, result.kinds, strict=True)):
        cells = (result.effects.text(row, column) for column in range(len(result.at_once)))
        table.add_row(str(size), kind, *cells)
    return table


def parallel_figure(result: ParallelCost) -> Figure:
    """Draw the cost along the block size, a line for what is drawn at once, with intervals."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    x = range(len(result.block_sizes))
    for column, at_once in enumerate(result.at_once):
        color = _COLORS[column % len(_COLORS)]
        line = part_of(result.effects, (slice(None), column))
        line_effects(axes, x, line, _name(at_once), color)
    axes.set_xticks(list(x), [str(size) for size in result.block_sizes])
    axes.set(xlabel="block size, tokens", ylabel="cost, nats a token")
    write_title(figure, result.title)
    write_caption(figure, _caption(result))
    legend_below(figure, axes)
    plain(axes)
    return figure
