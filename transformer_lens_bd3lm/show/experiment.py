"""An experiment as a table, and as a figure: arms with intervals, curves, or maps of cells."""

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.experiment import Experiment
from transformer_lens_bd3lm.errors import InputError
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.effects import line_effects, map_effects, part_of
from transformer_lens_bd3lm.show.style import (
    BLUE,
    COLORS,
    INK,
    QUIET,
    WIDTH,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table


def experiment_table(result: Experiment, n: int = 20) -> Table:
    """Lay out each metric and arm: its mean, its difference from the base, p and texts.

    Of a metric with cells, the ``n`` with the smallest p-values.
    """
    texts, seeds = next(iter(result.values.values())).shape[:2]
    table = new_table(
        f"arms against {result.base}, on the same noise",
        ("metric", "arm", "mean", "difference [95%]", "p", "texts"),
        ("metric", "arm"),
        f"{count(texts, 'text')}, {count(seeds, 'seed')} each. Intervals are over texts; p is "
        "corrected for all arms and cells of a metric (max-T).",
    )
    for metric in result.values:
        unit = f" ({result.units[metric]})" if result.units[metric] else ""
        effects, means = result.effects_of(metric), result.means_of(metric).mean
        if means.dim() == 1:
            table.add_row(metric + unit, result.base, f"{means[_at(result, result.base)]:.3f}")
        cells = effects.p.nan_to_num(9).flatten().argsort(stable=True).tolist()
        cells = cells[:n] if means.dim() > 1 else sorted(cells)
        for flat in cells:
            place = []
            for size in reversed(effects.p.shape):
                flat, index = divmod(flat, size)
                place.insert(0, index)
            arm, cell = result.compared[place[0]], ", ".join(map(str, place[1:]))
            mean = float(means[(_at(result, arm), *place[1:])])
            p = float(effects.p[tuple(place)])
            table.add_row(
                metric + unit if means.dim() > 1 else "",
                f"{arm} ({cell})" if cell else arm,
                f"{mean:.3f}",
                effects.text(*place),
                "–" if p != p else f"{p:.4f}",
                str(int(effects.texts[tuple(place)])),
            )
    return table


def _at(result: Experiment, arm: str) -> int:
    return result.arms.index(arm)


def experiment_figure(result: Experiment, metric: str | None = None) -> Figure:
    """Draw every metric without cells, an arm a row; or one metric with one or two axes of cells.

    Args:
        result: the experiment.
        metric: the metric that is drawn; by default all those without cells, or else the first.

    Raises:
        InputError: for cells of more than two axes.
    """
    single = [name for name, x in result.values.items() if x.dim() == 3]
    names = [metric] if metric is not None else (single or [result.metric])
    effects = [result.effects_of(name) for name in names]
    axes = effects[0].mean.dim()
    if axes == 1:
        return _dots(result, names)
    if axes == 2:
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        panel = figure.add_subplot()
        cells = range(effects[0].mean.shape[1])
        for number, arm in enumerate(result.compared):
            part = part_of(effects[0], (number,))
            line_effects(panel, cells, part, arm, COLORS[number % len(COLORS)])
        panel.set(xlabel="cell", ylabel=f"{names[0]}, minus {result.base}")
        write_title(figure, f"{names[0]}: difference from {result.base}, 95% over texts")
        legend_below(figure, panel)
        plain(panel)
        return figure
    if axes > 3:
        raise InputError(f"{names[0]} has cells of {axes - 1} axes: a figure shows at most two")
    arms = len(result.compared)
    figure = Figure(figsize=(max(WIDTH, 2.2 * arms), 3.6), layout="constrained")
    grid = figure.add_gridspec(2, arms, height_ratios=(0.05, 1))
    for number, arm in enumerate(result.compared):
        scale, panel = (figure.add_subplot(grid[row, number]) for row in (0, 1))
        part = part_of(effects[0], (number,))
        map_effects(panel, scale, part, f"{arm} minus {result.base}")
    write_title(figure, names[0])
    return figure


def _dots(result: Experiment, names: list[str]) -> Figure:
    """Draw a panel a metric: each arm's difference from the base, with its interval."""
    arms = result.compared
    height = 1.5 + 0.28 * len(arms)
    figure = Figure(
        figsize=(min(max(2.5 * len(names), 4.6) + 0.8, WIDTH), height + 0.15), layout="constrained"
    )
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        effects = result.effects_of(name)
        panel.axvline(0, color=QUIET, linewidth=0.8)
        for row, _ in enumerate(arms):
            ends = [float(effects.low[row]), float(effects.high[row])]
            panel.plot(ends, [row, row], color=BLUE, linewidth=1.6)
            face = BLUE if bool(effects.significant[row]) else "white"
            panel.plot(
                [float(effects.mean[row])],
                [row],
                "o",
                color=BLUE,
                markerfacecolor=face,
                markersize=5,
            )
        panel.set_title(name, fontsize=9, color=INK, loc="left")
        panel.set_xlabel(result.units[name] or "difference")
        panel.set_ylim(len(arms) - 0.5, -0.5)
        panel.xaxis.set_major_locator(MaxNLocator(3))
        panel.set_yticks(range(len(arms)), arms)
        plain(panel)
    title = f"Difference from {result.base}, 95% over texts; filled: p < 0.05, corrected"
    write_title(figure, title)
    return figure
