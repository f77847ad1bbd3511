"""A figure on a dark background: every color keeps its hue, and light and dark change places.

Figures are drawn in one set of colors, for a light page. One rule makes the dark ones, so that no
figure knows of it::

    lightness' = 0.10 + 0.84 (1 - lightness)          hue and saturation as they are

White becomes the dark background and ink the light text, and a heat map that ends in dark blue ends
in light blue: what stands out from the page still does.
"""

import colorsys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.cm import ScalarMappable
from matplotlib.collections import Collection
from matplotlib.colors import Colormap, ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

_NO_COLOR = ("none", "inherit")


def darken(figure: Figure) -> Figure:
    """Recolor a figure that was drawn for a light page, and return it."""
    figure.draw_without_rendering()  # makes the ticks that it has
    changes = [(change, value) for artist in figure.findobj() for change, value in _colors(artist)]
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            old = axis.get_tick_params()  # of ticks that are made later
            new = {name: _mirrored(old[name]) for name in ("color", "labelcolor") if name in old}
            axis.set_tick_params(which="both", **new)
    for change, value in changes:
        change(value)
    return figure


def _mirrored(color: Any) -> Any:
    """Return a color with its lightness mirrored."""
    if isinstance(color, str) and color in _NO_COLOR:
        return color
    red, green, blue, alpha = to_rgba(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    return (*colorsys.hls_to_rgb(hue, 0.10 + 0.84 * (1 - lightness), saturation), alpha)


def _mirrored_map(cmap: Colormap) -> Colormap:
    """Return a color map with the lightness of each of its colors mirrored."""
    colors = [_mirrored(color) for color in cmap(np.linspace(0, 1, 256))]
    return ListedColormap(colors, name=f"{cmap.name}_dark")


def _colors(artist: Artist) -> Iterator[tuple[Callable[[Any], Any], Any]]:
    """Yield how each color of an artist is set, and what it is on a dark page."""
    if isinstance(artist, AxesImage):
        yield artist.set_cmap, _mirrored_map(artist.cmap)
    elif isinstance(artist, Text):
        yield artist.set_color, _mirrored(artist.get_color())
    elif isinstance(artist, Line2D):
        yield artist.set_color, _mirrored(artist.get_color())
        yield artist.set_markerfacecolor, _mirrored(artist.get_markerfacecolor())
        yield artist.set_markeredgecolor, _mirrored(artist.get_markeredgecolor())
    elif isinstance(artist, Patch):
        yield artist.set_facecolor, _mirrored(artist.get_facecolor())
        if to_rgba(artist.get_edgecolor())[3]:  # else an artist's own alpha would show the edge
            yield artist.set_edgecolor, _mirrored(artist.get_edgecolor())
    elif isinstance(artist, Collection) and not _is_mapped(artist):
        yield artist.set_facecolor, [_mirrored(color) for color in artist.get_facecolor()]
        yield artist.set_edgecolor, [_mirrored(color) for color in artist.get_edgecolor()]


def _is_mapped(artist: Any) -> bool:
    """Whether an artist takes its colors from a color map, as the inside of a color scale does."""
    return isinstance(artist, ScalarMappable) and artist.get_array() is not None
