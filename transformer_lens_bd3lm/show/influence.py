"""Influence between masked positions, as a table of pairs and beside attention as maps."""

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.influence import Influence
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    LIGHT_TO_DARK,
    WIDTH,
    heat_map,
    label_tokens,
    token_label,
    write_caption,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table

_LABELED, _SHOWN = 20, 40  # positions under a map, and words in the title


def _caption(result: Influence) -> str:
    """Say how influence was computed, and how attention goes with it."""
    own = float(result.correlation.nanmean())
    control = float(result.permuted.nanmean())
    how = {"exact": "exact", "top": "over the likeliest words: at least", "estimate": "estimated"}
    rest = f" (left out: {float(result.rest.max()):.2g} at most)" if result.kind == "top" else ""
    return (
        f"{count(len(result.x_t), 'text')}, {how[result.kind]}{rest}. Rank correlation with "
        f"attention {own:+.2f}; permuted {control:+.2f}, p = {result.p:.3f}."
    )


def influence_table(result: Influence, n: int = 10) -> Table:
    """Lay out the ``n`` pairs of masked positions with the largest influence."""
    columns = ("text", "revealed", "changed", "influence, nats", "attention")
    table = new_table(result.title, columns, (), _caption(result))
    best = result.influence.nan_to_num(-1.0).flatten().argsort(descending=True)
    length = result.x_t.shape[1]
    for flat in best[: min(n, int(result.pairs.sum()))].tolist():
        row, i, j = flat // length**2, flat // length % length, flat % length
        values = (float(x[row, i, j]) for x in (result.influence, result.attention))
        table.add_row(str(row), str(i), str(j), *(f"{value:.4f}" for value in values))
    return table


def influence_figure(result: Influence, row: int = 0) -> Figure:
    """Draw influence and attention between the masked positions of a text side by side.

    Args:
        result: the result.
        row: number of the text.
    """
    at = result.pairs[row].any(-1).nonzero()[:, 0]
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(0.05, 1))
    maps = (
        (result.influence, "influence of i on j, nats"),
        (result.attention, "attention of j to i, mean of heads"),
    )
    shown = [
        f"{position}" if word == "" else f"{token_label(word)} {position}"
        for position, word in enumerate(result.words[row])
    ]
    for column, (values, title) in enumerate(maps):
        axes, scale = (figure.add_subplot(grid[line, column]) for line in (1, 0))
        values = values[row][at[:, None], at]
        most = float(values.nan_to_num().max()) or 1.0
        heat_map(axes, scale, values, 0, (0.0, most), LIGHT_TO_DARK, title)
        names = [shown[i] for i in at.tolist()]
        for axis in (axes.xaxis, axes.yaxis):
            label_tokens(axis, names, len(names))
            axis.set_major_locator(FixedLocator(range(0, len(names), -(-len(names) // _LABELED))))
        axes.set(xlabel="j: prediction that changes", ylabel="" if column else "i: revealed")
    words = [token_label(word) for word in result.words[row] if word]
    text = " ".join([*words[:_SHOWN], "…"] if len(words) > _SHOWN else words)
    write_title(figure, f"{result.title}\n{text}")
    write_caption(figure, _caption(result))
    return figure
