"""What figures share: colors, titles, plain axes, heat maps, tokens as labels, and files.

Figures are matplotlib's own objects, made without pyplot: nothing needs a display, no state is left
behind, and ``figure.savefig(path)`` or a notebook shows them. In every heat map light is what
stayed the same and dark is what changed, in one hue, so that it reads the same in gray; with
``dark=True`` it is the other way round (see :mod:`.dark`). Colors of lines are those of Okabe and
Ito, which readers with any kind of color blindness can tell apart.
"""

import io
from collections.abc import Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, Formatter, MaxNLocator
from torch import Tensor

INK, QUIET, ORANGE, BLUE = "#222222", "#707070", "#d55e00", "#0072b2"
COLORS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # of several lines
LIGHT_TO_DARK, BOTH_WAYS = "Blues", "PuOr_r"  # color maps, from 0 and around 0
SHORT = 48  # tokens that can be told apart under an axis as wide as a figure
WIDTH = 7.2  # inches of a figure with several panels: set in a page's 6.75, 8 points are 7.5
_FONT = "DejaVu Sans"  # comes with matplotlib
_LONGEST = 9  # characters of a token's label


def write_title(figure: Figure, title: str) -> None:
    """Write the title above a figure, in as many lines as it needs."""
    text = figure.suptitle(title, x=0.01, ha="left", color=INK, fontsize=10)
    text.set_parse_math(False)
    text.set_wrap(True)


def write_caption(figure: Figure, caption: str) -> None:
    """Write the caption below a figure, in as many lines as it needs."""
    text = figure.supxlabel(caption, x=0.01, ha="left", color=QUIET, fontsize=8)
    text.set_parse_math(False)
    text.set_wrap(True)


def legend_below(figure: Figure, axes: Axes, columns: int = 4, further: Sequence[Any] = ()) -> None:
    """Write the legend of a panel's lines below the figure and its caption: it covers no data."""
    handles, labels = axes.get_legend_handles_labels()
    handles, labels = [*handles, *further], [*labels, *(str(line.get_label()) for line in further)]
    box = figure.legend(
        handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8,
        labelcolor=INK,
    )  # fmt: skip
    for text in box.get_texts():
        text.set_parse_math(False)
    lines = -(-len(labels) // columns)
    if caption := figure.get_supxlabel():  # the layout would put it behind the legend
        write_caption(figure, caption + "\n" * (lines + -(-lines // 2)))


def heat_map(
    axes: Axes,
    scale: Axes | None,
    values: Float[Tensor, "row column"],
    first_row: int,
    limits: tuple[float, float],
    cmap: str,
    title: str,
) -> None:
    """Draw values by row and column, and their color scale.

    Args:
        axes: where the map goes.
        scale: where its color scale goes; None where that of another panel holds.
        values: one value a cell; NaN is left blank.
        first_row: number of the first row.
        limits: values of the lightest and the darkest color.
        cmap: matplotlib's name of the colors.
        title: what the values are, with their unit.
    """
    rows, columns = values.shape
    image = axes.imshow(
        values.detach().cpu().numpy(),
        cmap=cmap,
        vmin=limits[0],
        vmax=limits[1],
        aspect="auto",
        interpolation="nearest",
        extent=(-0.5, columns - 0.5, first_row + rows - 0.5, first_row - 0.5),
        label=title,
    )
    plain(axes)
    if scale is None:
        return
    bar = axes.figure.colorbar(image, cax=scale, orientation="horizontal", ticklocation="top")
    bar.outline.set_visible(False)
    bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10])
    bar.update_ticks()
    scale.tick_params(color=QUIET, labelcolor=INK, labelsize=8)
    scale.set_title(title, loc="left", color=INK, fontsize=9, parse_math=False)


def plain(axes: Axes) -> None:
    """Remove the frame, and draw ticks and labels in the style's colors."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(QUIET)
    axes.tick_params(color=QUIET, labelcolor=INK, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=9)


def number_axes(axes: Axes) -> None:
    """Put ticks at whole numbers only, on both axes."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True))


class Words(Formatter):
    """Labels of an axis whose places are tokens: the tokens, or their numbers if they are many.

    Attributes:
        words: the tokens, as they are.
        numbers: whether the labels are numbers.
    """

    def __init__(self, words: Sequence[str], numbers: bool = False):
        self.words, self.numbers = tuple(words), numbers

    def __call__(self, x: Any, pos: Any = None) -> str:
        """Return the label of a place; empty between places and outside of them."""
        place = round(x)
        if place != x or not 0 <= place < len(self.words):
            return ""
        return str(place) if self.numbers else token_label(self.words[place])


def label_tokens(axis: Axis, words: Sequence[str], most: int = SHORT) -> None:
    """Label the places of an axis with tokens, or with numbers if there are more than ``most``."""
    many = len(words) > most
    axis.set_major_formatter(Words(words, many))
    if many:
        axis.set_major_locator(MaxNLocator(integer=True))
        return
    axis.set_major_locator(FixedLocator(range(len(words))))
    if isinstance(axis, XAxis):
        axis.set_tick_params(labelrotation=90)
    for label in axis.get_ticklabels():
        label.set_parse_math(False)


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
