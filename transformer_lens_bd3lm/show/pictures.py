"""Pictures of tensors that are no result: attention of either view, and any map of values.

Two functions are enough: attention has streams, blocks and masks that must be labeled, and every
other tensor of two axes, such as those of ``transformer_lens.patching``, is a map with named axes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from transformer_lens_bd3lm.bridge.host import Bridge
from transformer_lens_bd3lm.show import drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_attention(
    bridge: Bridge,
    cache: Any,
    x_t: Any,
    layer: int,
    head: int | None = None,
    *,
    clean: Any = None,
    block_size: int | str | None = None,
    row: int = 0,
    dark: bool = False,
    width: float | None = None,
    interactive: bool = False,
) -> "Figure":
    """Draw the attention of a layer by query and key, with streams, blocks and masks marked.

    No triangle is left out: a query reads its whole block, to both sides. Keys that the block size
    hides from a query are gray.

    Args:
        bridge: the model.
        cache: the cache of the pass, or the layer's pattern ``[batch, head, query, key]`` alone.
            With fewer queries than keys, as in ``run.cache(step)``, the queries are the last
            positions.
        x_t: the text of the pass, as it was read: a string or ids ``[batch, pos]``.
        layer: the layer.
        head: the head; by default each head is a panel.
        clean: the clean text of a dual pass, whose pattern has 2n queries and keys: noisy, clean.
        block_size: the block size of the pass; the bridge's by default.
        row: number of the text in the batch.
        dark: draw it for a dark page.
        width: width of the figure in inches.
        interactive: return a figure of plotly (extra ``interactive``).

    Raises:
        InputError: for a layer, head or row that does not exist, a pattern that does not fit the
            text, or one with attention where this block size has none.
        BlockSizeError: for a block size that the checkpoint cannot have.
    """
    draw = drawn("attention:attention_view")
    return draw(
        bridge, cache, x_t, layer, head, clean=clean, block_size=block_size, row=row, dark=dark,
        width=width, interactive=interactive,
    )  # fmt: skip


def plot_heat_map(
    values: Tensor,
    *,
    unit: str,
    title: str = "",
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    row_axis: str = "layer",
    column_axis: str = "position",
    panels: Sequence[str] | None = None,
    dark: bool = False,
    width: float | None = None,
    interactive: bool = False,
) -> "Figure":
    """Draw a tensor as a heat map: a patching result by layer and position, say.

    Values of both signs are drawn around 0, in two hues; others from 0, in one.

    Args:
        values: ``[row, column]``, or ``[panel, row, column]``; NaN is left blank.
        unit: what the values are, with their unit, as ``"effect on log p, nats"``.
        title: title of the figure.
        rows: a label for each row; numbers by default.
        columns: a label for each column, as ``bridge.to_str_tokens(text)``; numbers by default.
        row_axis: what a row is.
        column_axis: what a column is.
        panels: a name for each panel.
        dark: draw it for a dark page.
        width: width of the figure in inches.
        interactive: return a figure of plotly (extra ``interactive``).

    Raises:
        InputError: for values of other shapes or without a finite one, and for labels of another
            number than rows, columns or panels.
    """
    draw = drawn("maps:heat_map_figure")
    return draw(
        values, unit=unit, title=title, rows=rows, columns=columns, row_axis=row_axis,
        column_axis=column_axis, panels=panels, dark=dark, width=width, interactive=interactive,
    )  # fmt: skip
