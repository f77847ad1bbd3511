"""Head scores as a table of the best heads, and as maps of layer by head."""

from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.analysis.heads import HeadScores
from transformer_lens_bd3lm.show.style import (
    LIGHT_TO_DARK,
    ORANGE,
    WIDTH,
    heat_map,
    number_axes,
    write_caption,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table


def head_table(result: HeadScores, n: int = 10) -> Table:
    """Lay out a row a head, the best ``n``: its score, an interval over texts, and its content."""
    columns = ("head", "score", "95% over texts", "over\nuniform", "over same\nplaces")
    table = new_table(result.title, columns, ("head",), _caption(result))
    several = int((result.queries > 0).sum()) > 1
    for layer, head in result.top(n):
        low, high = result.interval(layer, head) if several else (0.0, 0.0)
        content = float(result.content[layer, head])
        table.add_row(
            f"{layer}.{head}",
            f"{float(result.scores[layer, head]):.3f}",
            f"{low:.3f} to {high:.3f}" if several else "–",
            f"{float(result.excess[layer, head]):+.3f}",
            f"{content:+.3f}" if content == content else "–",
        )
    return table


def head_figure(result: HeadScores) -> Figure:
    """Draw the scores by layer and head; beside them, where known, the scores over same places."""
    maps = [(result.scores, "share of attention; line: uniform")]
    if bool(result.content.isfinite().all()):
        maps.append((result.content, "less what the same places get elsewhere"))
    layers, heads = result.scores.shape
    across, height = min(max(heads * 0.3, 3.2), 4.5), min(max(layers * 0.3, 2.0), 5.0)
    figure = Figure(
        figsize=(min(across * len(maps) + 0.8, WIDTH), height + 1.7), layout="constrained"
    )
    write_title(figure, result.title)
    write_caption(figure, _caption(result))
    grid = figure.add_gridspec(2, len(maps), height_ratios=(0.12, height))
    for column, (values, name) in enumerate(maps):
        axes, scale = (figure.add_subplot(grid[row, column]) for row in (1, 0))
        low, high = float(values.min()), float(values.max())
        limits = (min(low, 0.0), max(high, result.base_rate, 0.1))
        heat_map(axes, scale, values, 0, limits, LIGHT_TO_DARK, name)
        axes.set(xlabel="head", ylabel="" if column else "layer")
        number_axes(axes)
        if not column:
            scale.axvline(result.base_rate, color=ORANGE, linewidth=2)
    return figure


def _caption(result: HeadScores) -> str:
    """Say what the scores are of, and what to hold them against."""
    total, texts = int(result.queries.sum()), int((result.queries > 0).sum())
    caption = (
        f"{total} masked queries in {texts} text{'s' if texts > 1 else ''}; uniform attention "
        f"would score {result.base_rate:.3f}"
    )
    if result.off_distribution:
        caption += f"; off-distribution: {result.off_distribution} read masks in earlier blocks"
    return caption
