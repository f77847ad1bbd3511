"""Attention sinks as a table of heads and costs, and as maps with the costs beside them."""

from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.analysis.sinks import Sinks
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    LIGHT_TO_DARK,
    ORANGE,
    QUIET,
    WIDTH,
    heat_map,
    number_axes,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import Tables, new_table

ARMS = ("sinks removed", "control: random keys", "difference")


def sinks_table(result: Sinks, n: int = 8) -> Tables:
    """Lay out what removal costs, and the ``n`` heads with most sinks."""
    costs = result.costs()
    caption = (
        f"attention that was removed, a head and step: {result.mass[0]:.2f} and "
        f"{result.mass[1]:.2f}; [{costs.level:.0%}] over texts; p corrected for all three"
    )
    title = f"sinks of {result.model}, block size {result.block_size}, eps {result.eps:g}"
    columns = ("", f"nats lost a token [{costs.level:.0%}]", "p")
    first = new_table(title, columns, ("",), caption)
    for arm, name in enumerate(ARMS):
        p = float(costs.p[arm])
        first.add_row(name, costs.text(arm), "–" if p != p else f"{p:.4f}")
    kinds = ", ".join(f"{kind} {share:.0%}" for kind, share in result.by_kind.items())
    note = f"{len(result.places)} sinks: {kinds}" if len(result.places) else "no sinks"
    return Tables(first, _heads(result, n, note))


def _heads(result: Sinks, n: int, caption: str) -> Table:
    """Lay out the heads with most sinks."""
    columns = ("head", "sinks a step", "still sinks a step later")
    table = new_table("heads with sinks", columns, ("head",), caption)
    mean = result.mean_count
    for flat in mean.flatten().argsort(descending=True)[:n].tolist():
        layer, head = divmod(flat, mean.shape[1])
        kept = float(result.kept[layer, head])
        share = "–" if kept != kept else f"{kept:.0%}"
        table.add_row(f"{layer}.{head}", f"{mean[layer, head]:.2f}", share)
    return table


def sinks_figure(result: Sinks) -> Figure:
    """Draw sinks a step and their persistence by head, and what their removal costs."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    write_title(
        figure,
        f"{result.model}, block size {result.block_size}: keys that receive {result.eps:g} more "
        "attention than the others' mean",
    )
    grid = figure.add_gridspec(2, 3, height_ratios=(0.06, 1))
    most = float(result.mean_count.nan_to_num().max()) or 1.0
    maps = (
        (result.mean_count, (0.0, most), "sinks a step"),
        (result.kept, (0.0, 1.0), "share still one a step later"),
    )
    for column, (values, limits, title) in enumerate(maps):
        scale, axes = (figure.add_subplot(grid[row, column]) for row in (0, 1))
        heat_map(axes, scale, values, 0, limits, LIGHT_TO_DARK, title)
        axes.set(xlabel="head", ylabel="" if column else "layer")
        number_axes(axes)
    axes, costs = figure.add_subplot(grid[:, 2]), result.costs()
    axes.axhline(0, color=QUIET, linewidth=0.8)
    for arm, color in enumerate((ORANGE, BLUE, INK)):
        low, mean, high = (float(x[arm]) for x in (costs.low, costs.mean, costs.high))
        if low == low:
            axes.plot([arm, arm], [low, high], color=color, linewidth=1.3)
        axes.plot(arm, mean, "o", color=color)
    axes.set(xlim=(-0.5, 2.5), ylabel="nats lost a token; bar: 95%, texts")
    axes.set_xticks(range(3), ["sinks\nremoved", "random\nkeys", "difference"])
    axes.set_title("cost of removal", fontsize=9, loc="left", color=INK)
    plain(axes)
    return figure
