"""Cosine and loss of skipped layers, as a table and along the masks that are left."""

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.depth_redundancy import DepthRedundancy
from transformer_lens_bd3lm.show.effects import line_effects
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    WIDTH,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table


def depth_table(result: DepthRedundancy) -> Table:
    """Lay out a row a layer: cosine of input and output, and the loss when it is skipped."""
    loss = result.nats_per_token()
    caption = (
        f"skipped at {result.positions} positions; nats a token of the text, in its order; "
        f"[{loss.level:.0%}] over texts; p corrected for all layers"
    )
    columns = ("layer", "cosine", f"nats lost a token [{loss.level:.0%}]", "p")
    table = new_table(f"depth of {result.model}", columns, ("layer",), caption)
    for layer, cosine in enumerate(result.mean_cosine.tolist()):
        p = float(loss.p[layer])
        table.add_row(str(layer), f"{cosine:.3f}", loss.text(layer), "–" if p != p else f"{p:.4f}")
    return table


def depth_figure(result: DepthRedundancy) -> Figure:
    """Draw the loss a layer with its interval, and loss and cosine by masks left."""
    numbers, loss, cosine = result.by_masks_left()
    layers = result.loss.shape[-1]
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    write_title(
        figure, f"{result.model}, block size {result.block_size}: skipping one layer at a time"
    )
    left, middle, right = figure.subplots(1, 3)
    line_effects(left, range(layers), result.nats_per_token(), "loss", BLUE)
    left.set(xlabel="layer", ylabel="nats lost a token")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("loss; band: 95%, texts", fontsize=9, loc="left", color=INK)
    shades = colormaps["viridis"](torch.linspace(0, 0.85, layers).numpy())
    parts = ((middle, loss.mean, "nats lost a masked position"), (right, cosine, "cosine"))
    for axes, values, name in parts:
        for layer in range(layers):
            line = values[:, layer].tolist()
            axes.plot(
                numbers, line, color=shades[layer], linewidth=1.4, label=f"layer {layer}",
                marker="o" if len(numbers) < 3 else None, markersize=4,
            )  # fmt: skip
        axes.set(xlabel="masks left", ylabel=name)
        axes.set_xlim(max(numbers) + 0.5, min(numbers) - 0.5)
        axes.set_xticks(numbers[:: -(-len(numbers) // 8)])
    middle.set_title("loss, by masks left", fontsize=9, loc="left", color=INK)
    right.set_title("input against output", fontsize=9, loc="left", color=INK)
    right.set_ylim(min(float(torch.nan_to_num(cosine, 1.0).min()) - 0.02, 0.9), 1.005)
    legend_below(figure, right, 6)
    for axes in (left, middle, right):
        plain(axes)
    return figure
