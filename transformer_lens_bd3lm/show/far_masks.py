"""One prediction against further masks, as a table and as a panel for each place of the masks."""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.table import Table

from transformer_lens_bd3lm.analysis.far_masks import FarMasks
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.effects import line_effects, part_of
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    WIDTH,
    legend_below,
    plain,
    write_caption,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table, off_distribution

_COLORS = (BLUE, "#009e73", ORANGE)
_TITLES = {
    "behind": "masks behind the text:\nhide nothing",
    "hides near": "masks over the\nnearest tokens",
    "hides far": "masks over the\nfarthest tokens",
}


def _shown(result: FarMasks) -> list[int]:
    """Return the nearest, the middle and the farthest distance, by index."""
    last = len(result.distances) - 1
    return sorted({0, (last + 1) // 2, last})


def _caption(result: FarMasks) -> str:
    """Say what the figures are over."""
    return (
        f"Mean over {count(len(result.log_p), 'text')}, [95%] over texts like these. Distance: "
        "positions from the target to the end of the text." + off_distribution(result.trained_at)
    )


def far_masks_table(result: FarMasks) -> Table:
    """Lay out a row a place and number of masks, a column a distance: change of log p, nats."""
    distances = _shown(result)
    heads = [f"distance {result.distances[i]}" for i in distances]
    true = result.true_change
    if true is not None:
        heads = [name for head in heads for name in (head, "true")]
    columns = ("masks", "number", *heads)
    table = new_table(f"{result.title}: change, nats", columns, ("masks",), _caption(result))
    for place, name in enumerate(result.places):
        for number, masks in enumerate(result.masks):
            if not masks or bool(result.effects.mean[place, :, number].isnan().all()):
                continue
            cells = []
            for i in distances:
                cells.append(result.effects.text(place, i, number))
                if true is not None:
                    cells.append(f"{float(true[place, i, number]):+.3f}")
            table.add_row(name, str(masks), *cells)
    return table


def far_masks_figure(result: FarMasks) -> Figure:
    """Draw the change of log p along the number of masks: a panel a place, a line a distance."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, len(result.places), squeeze=False)[0]
    true = result.true_change
    for place, (name, axes) in enumerate(zip(result.places, panels, strict=True)):
        x = range(int(result.effects.mean[place, 0].isfinite().sum()))
        for color, i in zip(_COLORS, _shown(result), strict=False):
            line = part_of(result.effects, (place, i, slice(len(x))))
            line_effects(axes, x, line, f"distance {result.distances[i]}", color)
            if true is not None:
                axes.plot(x, true[place, i, : len(x)].numpy(), "--", color=color, linewidth=1.1)
        axes.set_xticks(list(x), [str(number) for number in result.masks[: len(x)]])
        axes.set_xlabel("further masks")
        axes.set_title(_TITLES[name], loc="left", color=INK, fontsize=9)
        plain(axes)
    low, high = zip(*(axes.get_ylim() for axes in panels[1:]), strict=True)
    for axes in panels[1:]:
        axes.set_ylim(min(low), max(high))
    panels[0].set_ylabel("change of log p of the masked token, nats")
    true_line = Line2D([], [], linestyle="--", color=QUIET, label="true change")
    write_title(figure, result.title)
    write_caption(figure, _caption(result))
    legend_below(figure, panels[0], further=[] if true is None else [true_line])
    return figure
