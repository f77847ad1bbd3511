"""The heat maps of a figure in plotly: each cell shows its place and value under the pointer.

A heat map is described once, by the matplotlib figure that draws it: values, colors, names of rows
and columns, what the values are. This module reads that description and hands it to plotly.

Panels that are no heat maps are left out.
"""

from importlib import import_module
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis, YAxis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter

from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.show.style import (
    SHORT,
    Words,
    token_label,
)

_SHADES = 33  # colors that stand for a color map
_DOTS_AN_INCH = 110


def interactive_figure(figure: Figure) -> Any:
    """Return the heat maps of a figure as a ``plotly.graph_objects.Figure``.

    Raises:
        InputError: if plotly is not installed, or the figure has no heat map.
    """
    panels = [axes for axes in figure.axes if axes.images and axes.get_subplotspec() is not None]
    if not panels:
        raise InputError(
            "interactive=True: this figure has no heat map, and only those have an interactive "
            "form: leave interactive out"
        )
    plotly, subplots = _import("plotly.graph_objects"), _import("plotly.subplots")
    rows, columns = (_ranks(panels, side) for side in ("rowspan", "colspan"))
    grid = subplots.make_subplots(
        rows=max(rows) + 1,
        cols=max(columns) + 1,
        horizontal_spacing=0.22 / max(*columns, 1),
        vertical_spacing=0.16 / max(*rows, 1),
        subplot_titles=[_name(axes) for axes in _in_grid(panels, rows, columns)],
    )
    lettering = to_hex(panels[0].xaxis.label.get_color())
    background = to_hex(figure.get_facecolor())
    for axes, row, column in zip(panels, rows, columns, strict=True):
        grid.add_trace(_heat_map(plotly, axes, panels), row=row + 1, col=column + 1)
        for points in _dots(plotly, axes, lettering):
            grid.add_trace(points, row=row + 1, col=column + 1)
        for axis, update in ((axes.xaxis, grid.update_xaxes), (axes.yaxis, grid.update_yaxes)):
            update(**_axis(axis, axes.images[0]), row=row + 1, col=column + 1)
    _scales(grid, panels, rows, columns)
    width, height = figure.get_size_inches() * _DOTS_AN_INCH
    grid.update_layout(
        title={"text": _plain(figure.get_suptitle()), "font": {"size": 14}},
        font={"color": lettering},
        paper_bgcolor=background,
        plot_bgcolor=to_hex(panels[0].get_facecolor()),
        width=max(width, 520),
        height=max(height, 380),
        showlegend=False,
    )
    grid.update_annotations(font_size=12)
    return grid


def _import(name: str) -> Any:
    """Import a module of plotly.

    Raises:
        InputError: if it is not installed.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            "interactive=True: plotly is not installed: "
            "pip install 'plotly>=6' (the extra [interactive])"
        ) from error


def _ranks(panels: list[Axes], side: str) -> list[int]:
    """Return the row or column of each panel, counted among those that have a heat map."""
    places = [getattr(axes.get_subplotspec(), side).start for axes in panels]
    ranks = sorted(set(places))
    return [ranks.index(place) for place in places]


def _in_grid(panels: list[Axes], rows: list[int], columns: list[int]) -> list[Axes | None]:
    """Return the panels row by row; None where there is none."""
    at = dict(zip(zip(rows, columns, strict=True), panels, strict=True))
    return [at.get((i, j)) for i in range(max(rows) + 1) for j in range(max(columns) + 1)]


def _name(axes: Axes | None) -> str:
    """Return the name of a panel: its label or title, or what its values are."""
    if axes is None:
        return ""
    return _plain(axes.get_label() or axes.get_title("left") or _what(axes))


def _what(axes: Axes) -> str:
    """Return what the values of a panel are."""
    return _plain(axes.images[0].get_label())


def _heat_map(plotly: Any, axes: Axes, panels: list[Axes]) -> Any:
    """Return the trace of a panel's heat map, with a text for each cell."""
    image = axes.images[0]
    values = np.ma.filled(np.ma.asarray(image.get_array(), dtype=float), np.nan)
    rows, columns = _places(axes.yaxis, image), _places(axes.xaxis, image)
    across, down = ([getattr(other, f"get_{x}label")() for other in panels] for x in "xy")
    x, y = (next(filter(None, [own, *all_]), "") for own, all_ in (
        (axes.get_xlabel(), across), (axes.get_ylabel(), down),
    ))  # fmt: skip
    x, y = _plain(x), _plain(y)
    parts = [_name(axes)] if len(panels) > 1 and _name(axes) != _what(axes) else []
    texts = [
        [
            "<br>".join([*parts, f"{y}: {row}", f"{x}: {column}"])
            for column in columns.values()
        ]
        for row in rows.values()
    ]  # fmt: skip
    low, high = image.get_clim()
    shades = np.linspace(0, 1, _SHADES)
    return plotly.Heatmap(
        z=values,
        x=list(columns),
        y=list(rows),
        text=texts,
        hovertemplate=f"%{{text}}<br>{_what(axes)}: %{{z:.4g}}<extra></extra>",
        hoverongaps=False,
        zmin=low,
        zmax=high,
        colorscale=[[float(x), to_hex(image.cmap(x))] for x in shades],
    )


def _places(axis: Axis, image: AxesImage) -> dict[int, str]:
    """Return each place of a heat map's axis with its name: a token, a tick's label or a number."""
    left, right, bottom, top = image.get_extent()
    low, high = (left, right) if isinstance(axis, XAxis) else (top, bottom)
    formatter, places = axis.get_major_formatter(), range(round(low + 0.5), round(high + 0.5))
    if isinstance(formatter, Words):
        shown = [word.strip(" ").replace("\n", "↵") or "␣" for word in formatter.words]
        return {i: f"{i} {_plain(shown[i])}" for i in places}
    named = isinstance(formatter, FuncFormatter)  # what matplotlib makes of labels
    return {i: _plain((named and formatter(i).replace("\n", " ")) or str(i)) for i in places}


def _plain(text: Any) -> str:
    """Return a text in which plotly reads no markup."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")


def _axis(axis: Axis, image: AxesImage) -> dict[str, Any]:
    """Return plotly's settings of an axis: its label, its ticks, the first row on top."""
    formatter, label = axis.get_major_formatter(), axis.get_label_text()
    options: dict[str, Any] = {
        "title": {"text": _plain(label)},
        "showgrid": False,
        "zeroline": False,
    }
    places = _places(axis, image)
    if isinstance(formatter, Words) and len(formatter.words) <= SHORT:
        words = [_plain(token_label(formatter.words[i])) for i in places]
        options |= {"tickvals": list(places), "ticktext": words}
    elif isinstance(formatter, FuncFormatter):
        options |= {"tickvals": list(places), "ticktext": list(places.values())}
    if isinstance(axis, YAxis):
        options["autorange"] = "reversed"
        options["showticklabels"] = axis.get_tick_params().get("labelleft", True)
    return options


def _dots(plotly: Any, axes: Axes, color: str) -> list[Any]:
    """Return the dots of a heat map, which mark cells that differ from 0."""
    dots = [line.get_xydata() for line in axes.lines if line.get_marker() == "."]
    return [
        plotly.Scatter(
            x=np.asarray(places)[:, 0],
            y=np.asarray(places)[:, 1],
            mode="markers",
            marker={"color": color, "size": 4},
            hoverinfo="skip",
        )
        for places in dots
    ]


def _scales(grid: Any, panels: list[Axes], rows: list[int], columns: list[int]) -> None:
    """Put a color scale beside each panel, or one beside all if they share their limits."""
    maps = [trace for trace in grid.data if trace.type == "heatmap"]
    if len({axes.images[0].get_clim() for axes in panels}) == 1:
        for trace in maps[1:]:
            trace.showscale = False
        return
    for trace in maps:
        across = grid.layout[f"xaxis{(trace.xaxis or 'x')[1:]}"].domain
        up = grid.layout[f"yaxis{(trace.yaxis or 'y')[1:]}"].domain
        trace.colorbar = {
            "x": across[1] + 0.01, "y": sum(up) / 2, "len": up[1] - up[0], "thickness": 10,
        }  # fmt: skip
