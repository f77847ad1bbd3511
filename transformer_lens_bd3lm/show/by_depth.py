"""Likelihood, reveal order and probe by dependency depth, as tables and as a figure."""

import math
from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from transformer_lens_bd3lm.analysis.by_depth import DependencyDepths
from transformer_lens_bd3lm.analysis.by_depth.probe import Probe
from transformer_lens_bd3lm.show.style import BLUE, INK, ORANGE, QUIET, WIDTH, plain, write_title
from transformer_lens_bd3lm.show.tables import Tables, new_table

_LINES = (INK, ORANGE, BLUE, QUIET)


def by_depth_tables(result: DependencyDepths) -> Tables:
    """Lay out nats and order by depth, and the probe by layer and time."""
    probed = [] if result.probe is None else [_probe_table(result.probe)]
    return Tables(_depth_table(result), *probed)


def _depth_table(result: DependencyDepths) -> Table:
    """Lay out a row a depth: tokens, nats and order, with intervals over sentences."""
    left_out = result.straddling + result.outside
    caption = (
        f"{result.sentences} sentences; left out: {result.too_long} longer than the context, "
        f"{left_out} tokens that belong to no one word. NELBO: {result.kind}. "
        "[ ]: 95% over sentences like these."
    )
    means = [result.nats]
    columns = ["depth", "tokens", "NELBO\nnats/token", "[95%]"]
    if result.order is not None:
        means.append(result.order)
        columns += ["order", "[95%]"]
        caption += f" Order by {result.order_by}, 0 first, 1 last; first hitting: 0.5."
    table = new_table(result.title, columns, (), caption)
    intervals = [each.interval() for each in means]
    for depth, label in enumerate(result.labels):
        if not int(result.nats.tokens[depth]):
            continue
        cells = [label, f"{int(result.nats.tokens[depth]):,}"]
        for each, by_depth in zip(means, intervals, strict=True):
            mean, interval = float(each.mean[depth]), by_depth[depth]
            cells += ["–" if math.isnan(mean) else f"{mean:.3f}"]
            cells += ["" if interval is None else "[{:.3f}, {:.3f}]".format(*interval)]
        table.add_row(*cells)
    return table


def _probe_table(probe: Probe) -> Table:
    """Lay out a row a layer: R² at each time, beside R² for shuffled depths."""
    train, validation, test = probe.samples[0].tolist()
    caption = (
        f"At time {probe.times[0]:g}: {train:,} tokens to train, {validation:,} to choose the "
        f"penalty, {test:,} to test. Shuffled: mean ± standard deviation of {len(probe.shuffled)}."
    )
    title = "linear probe for depth: R², held out by sentence, (shuffled labels)"
    columns = ("after\nlayer", *(f"t = {time:g}" for time in probe.times))
    table = new_table(title, columns, (), caption)
    spread = probe.shuffled.std(0) if len(probe.shuffled) > 1 else torch.zeros_like(probe.r2)
    mean = probe.shuffled.mean(0)
    for layer in range(probe.r2.shape[1]):
        cells = [
            f"{float(r2[layer]):.2f} ({float(m[layer]):.2f} ± {float(s[layer]):.2f})"
            for r2, m, s in zip(probe.r2, mean, spread, strict=True)
        ]
        table.add_row("embed" if layer == 0 else str(layer - 1), *cells)
    return table


def by_depth_figure(results: DependencyDepths | Sequence[DependencyDepths]) -> Figure:
    """Draw nats and order by depth, a line a checkpoint, and each probe by time and layer."""
    results = [results] if isinstance(results, DependencyDepths) else results
    probed = [each for each in results if each.probe is not None]
    figure = Figure(figsize=(WIDTH, 3.2 + (3.0 if probed else 0)), layout="constrained")
    grid = figure.add_gridspec(2 if probed else 1, 2 * max(len(probed), 1))
    columns = max(len(probed), 1)
    write_title(figure, results[0].title if len(results) == 1 else "By dependency depth")
    for at, name in enumerate(("nats", "order")):
        axes = figure.add_subplot(grid[0, at * columns : (at + 1) * columns])
        for number, each in enumerate(results):
            _draw_by_depth(axes, each, name, _LINES[number % len(_LINES)], number, len(results))
        plain(axes)
    for number, each in enumerate(probed):
        _draw_probe(figure.add_subplot(grid[1, 2 * number : 2 * number + 2]), each)
    return figure


def _draw_by_depth(
    axes: Axes, result: DependencyDepths, name: str, color: str, number: int, of: int
) -> None:
    """Draw a mean by depth, and its interval over sentences."""
    kept = result.nats if name == "nats" else result.order
    if kept is None:
        return
    depths = [depth for depth in range(len(kept.mean)) if int(kept.tokens[depth])]
    shift = 0.12 * (number - (of - 1) / 2)
    for depth, interval in zip(depths, (kept.interval()[i] for i in depths), strict=True):
        if interval is not None:
            axes.plot([depth + shift] * 2, interval, color=color, linewidth=1)
    axes.plot(
        [depth + shift for depth in depths], [float(kept.mean[depth]) for depth in depths],
        "-o", color=color, markersize=4, linewidth=1.2, label=result.model,
    )  # fmt: skip
    axes.set_xticks(range(len(result.labels)), result.labels)
    axes.set(xlabel="dependency depth")
    if name == "nats":
        axes.set(ylabel="NELBO, nats a token")
    else:
        axes.axhline(0.5, color=QUIET, linestyle=":", linewidth=1)
        axes.set(ylabel=f"order by {result.order_by}\n0 first, 1 last; dotted: first hitting")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def _draw_probe(axes: Axes, result: DependencyDepths) -> None:
    """Draw R² by layer, a line a time, over the range of R² with shuffled labels."""
    probe = result.probe
    assert probe is not None
    layers = range(-1, probe.r2.shape[1] - 1)
    low, high = probe.shuffled.amin((0, 1)), probe.shuffled.amax((0, 1))
    axes.fill_between(layers, low, high, color=QUIET, alpha=0.35, label="shuffled labels")
    for number, time in enumerate(probe.times):
        shade = 0.35 + 0.65 * (1 - number / len(probe.times))
        axes.plot(
            layers, probe.r2[number], "-o", color=BLUE, alpha=shade, markersize=3.5,
            linewidth=1.2, label=f"t = {time:g}",
        )  # fmt: skip
    axes.set(xlabel="after layer (-1: embedding)", ylabel="R² of depth, held out")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.5))  # few samples of noise fit worse than that
    axes.set_title(result.model, loc="left", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    plain(axes)
