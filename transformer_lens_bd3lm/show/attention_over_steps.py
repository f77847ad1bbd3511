"""Shares of attention as a table of heads, and as stacked areas over the masks that are left."""

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.analysis.attention_over_steps import AttentionOverSteps
from transformer_lens_bd3lm.checks import check_int
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
from transformer_lens_bd3lm.show.tables import new_table

COLORS = (QUIET, BLUE, "#9fc9e8", ORANGE, "#f0c9a8")  # in the order of the groups


def attention_table(result: AttentionOverSteps, n: int = 12) -> Table:
    """Lay out the ``n`` heads that are farthest above uniform attention in some group of keys."""
    columns = ("head", *result.groups, "drift")
    caption = (
        "share of a masked query's attention; drift: total variation from one step to the next"
    )
    table = new_table(f"attention of masked queries: {result.view}", columns, ("head",), caption)
    mean, uniform = result.mean, result.mean_uniform
    table.add_row("uniform", *(f"{x:.2f}" for x in uniform.tolist()), "–", style="dim")
    above = (mean - uniform).amax(-1)
    for flat in above.flatten().nan_to_num(-1).argsort(descending=True)[:n].tolist():
        layer, head = divmod(flat, mean.shape[1])
        drift = float(result.mean_drift[layer, head])
        shares = (f"{x:.2f}" for x in mean[layer, head].tolist())
        table.add_row(f"{layer}.{head}", *shares, "–" if drift != drift else f"{drift:.2f}")
    return table


def attention_figure(result: AttentionOverSteps, layer: int | None = None) -> Figure:
    """Draw a panel a layer (means over heads), or a panel a head of one layer, and the drift.

    Args:
        result: what is drawn.
        layer: the layer whose heads are drawn; all layers by default.

    Raises:
        InputError: for a layer that the model does not have.
    """
    layers, heads = result.mean.shape[:2]
    numbers, by_masks = result.by_masks_left()
    if layer is None:
        parts = by_masks.mean(2)
        names = [f"layer {i}" for i in range(layers)]
    else:
        check_int("layer", layer, 0, layers - 1)
        parts, names = by_masks[:, layer], [f"head {layer}.{i}" for i in range(heads)]
    one_pass = result.view != "run"
    across = min(len(names), 3)
    down = -(-len(names) // across)
    figure = Figure(figsize=(WIDTH, 1.75 * down + (1.2 if one_pass else 2.9)), layout="constrained")
    of = "heads averaged" if layer is None else f"layer {layer}"
    view = f", {result.view} view" if one_pass else ""
    write_title(figure, f"{result.model}{view}: where masked queries look ({of})")
    heights = [1.0] * down + ([] if one_pass else [0.12, 1.1])
    grid = figure.add_gridspec(len(heights), across, height_ratios=heights)
    for i, name in enumerate(names):
        axes = figure.add_subplot(grid[divmod(i, across)])
        _stack(axes, numbers, parts[:, i], result)
        axes.set_title(name, fontsize=9, loc="left", color=INK)
        if i % across == 0:
            axes.set_ylabel("share", fontsize=8)
        if i >= len(names) - across:
            axes.set_xlabel("masked queries" if one_pass else "masks left", fontsize=8)
        if i == 0:
            handles, labels = axes.get_legend_handles_labels()
            if one_pass:
                shares = zip(labels, result.mean_uniform.tolist(), strict=True)
                labels = [f"{name} (uniform: {share:.2f})" for name, share in shares]
            figure.legend(
                handles, labels, loc="outside lower center", ncols=3 if one_pass else 5,
                frameon=False, fontsize=8, labelcolor=INK,
            )  # fmt: skip
    if not one_pass:
        scale, axes = figure.add_subplot(grid[down, :]), figure.add_subplot(grid[down + 1, :])
        top = float(result.mean_drift.nan_to_num().max()) or 1.0
        title = "drift: total variation of a head's attention from one step to the next"
        heat_map(axes, scale, result.mean_drift, 0, (0.0, top), LIGHT_TO_DARK, title)
        axes.set(xlabel="head", ylabel="layer")
        number_axes(axes)
    return figure


def _stack(
    axes: Axes, numbers: list[int], shares: torch.Tensor, result: AttentionOverSteps
) -> None:
    """Draw the shares of the groups on top of each other, from many masks left to few."""
    bottom = torch.zeros(len(numbers), dtype=shares.dtype)
    for group, name in enumerate(result.groups):
        top = shares[:, group].nan_to_num()
        axes.bar(
            range(len(numbers)), top.tolist(), bottom=bottom.tolist(), width=1.0,
            color=COLORS[group], label=name, linewidth=0,
        )  # fmt: skip
        bottom = bottom + top
    plain(axes)
    axes.set(ylim=(0, 1), xlim=(len(numbers) - 0.5, -0.5))
    step = max(len(numbers) // 4, 1)
    ticks = list(range(0, len(numbers), step))
    axes.set_xticks(ticks, [str(numbers[i]) for i in ticks])
    axes.tick_params(labelsize=8)
