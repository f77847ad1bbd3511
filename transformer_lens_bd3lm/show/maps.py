"""Any tensor of two axes as a heat map."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.show.style import (
    BOTH_WAYS,
    INK,
    LIGHT_TO_DARK,
    WIDTH,
    heat_map,
    label_tokens,
    write_title,
)


def heat_map_figure(
    values: Tensor,
    *,
    unit: str,
    title: str = "",
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    row_axis: str = "layer",
    column_axis: str = "position",
    panels: Sequence[str] | None = None,
) -> Figure:
    """Draw a map, or a map a panel; see :func:`.pictures.plot_heat_map`."""
    if not isinstance(values, Tensor) or values.dim() not in (2, 3) or not values.numel():
        shape = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"values of {shape}: give a tensor [row, column] or [panel, row, column]; choose a "
            "head or a step first, or take a mean"
        )
    if values.is_complex():
        raise InputError("values are complex: draw values.abs() or values.angle()")
    stack = values.detach().cpu().to_dense().to(torch.float64)
    stack = stack if stack.dim() == 3 else stack[None]
    finite = stack[stack.isfinite()]
    if not len(finite):
        raise InputError("values: none is finite, so there is nothing to draw")
    number, height, width = stack.shape
    for name, labels, wanted in (
        ("panels", panels, number), ("rows", rows, height), ("columns", columns, width),
    ):  # fmt: skip
        if labels is not None and len(labels) != wanted:
            raise InputError(f"{name}: {len(labels)} labels for {wanted}; give one for each")
    high = min(max(0.19 * height, 0.9), 5.0)
    size = (min(max(0.2 * width + 1.2, 4.6), WIDTH), number * (high + 0.3) + 1.9)
    figure = Figure(figsize=size, layout="constrained")
    if title:
        write_title(figure, title)
    grid = figure.add_gridspec(number + 1, 1, height_ratios=(0.1, *[high] * number))
    scale = figure.add_subplot(grid[0])
    most = float(finite.abs().max()) or 1.0
    both = bool((finite < 0).any())
    limits, colors = ((-most, most), BOTH_WAYS) if both else ((0.0, most), LIGHT_TO_DARK)
    for i, part in enumerate(stack):
        axes = figure.add_subplot(grid[i + 1])
        heat_map(axes, None if i else scale, part, 0, limits, colors, unit)
        axes.set(ylabel=row_axis, xlabel=column_axis if i == number - 1 else "")
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_parse_math(False)
        if panels is not None:
            axes.set_title(str(panels[i]), loc="left", fontsize=9, color=INK, parse_math=False)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if rows is not None:
            label_tokens(axes.yaxis, list(map(str, rows)))
        if columns is not None:
            label_tokens(axes.xaxis, list(map(str, columns)))
        axes.tick_params(labelbottom=i == number - 1)
    return figure
