"""What figures share: colors, plain axes, heat maps, tokens as labels, and files.

Figures are matplotlib's own objects, made without pyplot: nothing needs a display, no state is left
behind, and ``figure.savefig(path)`` or a notebook shows them. In every heat map light is what
stayed the same and dark is what changed, in one hue, so that it reads the same in gray.
"""

import io
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from torch import Tensor

INK, QUIET, ORANGE, BLUE = "#222222", "#8a8a8a", "#d55e00", "#0072b2"
COLORS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # of several lines
SHORT = 48  # tokens that can be told apart under an axis
_FONT = "DejaVu Sans"  # comes with matplotlib
_LONGEST = 9  # characters of a token's label


def heat_map(
    axes: Axes,
    scale: Axes,
    values: Float[Tensor, "row column"],
    first_row: int,
    limits: tuple[float, float],
    cmap: str,
    title: str,
) -> None:
    """Draw values by row and column, and their color scale.

    Args:
        axes: where the map goes.
        scale: where its color scale goes.
        values: one value a cell; NaN is left blank.
        first_row: number of the first row.
        limits: values of the lightest and the darkest color.
        cmap: matplotlib's name of the colors.
        title: of the map.
    """
    rows, columns = values.shape
    image = axes.imshow(
        values.numpy(),
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, first_row + rows - 0.5, first_row - 0.5),
    )
    plain(axes)
    bar = axes.figure.colorbar(image, cax=scale, orientation="horizontal", ticklocation="top")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    bar.update_ticks()
    scale.tick_params(color=QUIET, labelcolor=INK, labelsize=8)
    scale.set_title(title, loc="left", color=INK, fontsize=9)


def plain(axes: Axes) -> None:
    """Remove the frame, and draw ticks and labels in the style's colors."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(color=QUIET, labelcolor=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)


@cache
def _glyphs() -> frozenset[int]:
    """Return the code points that the font has."""
    font: Any = get_font(findfont(FontProperties(family=_FONT)))
    return frozenset(font.get_charmap())


def token_label(word: str) -> str:
    """Return a token as a label: without spaces around it, short, in characters of the font."""
    word = word.strip(" ").replace("\n", "↵") or "␣"
    word = word if len(word) <= _LONGEST else word[: _LONGEST - 1] + "…"
    return "".join(character if ord(character) in _glyphs() else "□" for character in word)


def write_figure(figure: Figure, path: Path, title: str) -> None:
    """Save a figure in the format of its file name; ``.html`` is a page with the figure inside.

    Args:
        figure: the figure.
        path: a name that ends in .html, .png, .svg or .pdf.
        title: title of the page.
    """
    if path.suffix.lower() != ".html":
        figure.savefig(path, dpi=160)
        return
    svg_file = io.StringIO()
    figure.savefig(svg_file, format="svg")
    svg = svg_file.getvalue()
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        "<style>body { background: white } svg { max-width: 100%; height: auto }</style>\n"
        f"<body>\n{svg[svg.index('<svg') :]}</body></html>\n",
        encoding="utf-8",
    )
