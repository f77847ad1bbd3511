"""Calibration and probes as tables and figures."""

from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from transformer_lens_bd3lm.analysis.over_run.calibration import Calibration
from transformer_lens_bd3lm.analysis.over_run.probe import FEW_TEXTS, ProbeScores
from transformer_lens_bd3lm.analysis.over_run.written import QUARTERS
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    ORANGE,
    QUIET,
    WIDTH,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import new_table


def calibration_table(result: Calibration) -> Table:
    """Lay out ECE, what a calibrated model would have, and the signed gap, by masks left."""
    columns = ("masks left", "predictions", "ECE", "calibrated", "confidence less correct")
    caption = (
        f"{count(int(result.gap.texts.max()), 'text')}; {result.bins} bins. Calibrated: the ECE "
        "that these predictions would have if they were right as often as they say. Above 0: "
        "overconfident; 95% intervals over texts."
    )
    if result.source == "run":
        caption += " The run was drawn from these predictions: near-perfect by construction."
    table = new_table("calibration at masked positions", columns, ("masks left",), caption)
    for i, name in enumerate(QUARTERS):
        number = int((result.quarter == i).sum())
        if number:
            errors = (float(result.ece_by_quarter[i]), float(result.calibrated[1 + i]))
            table.add_row(name, str(number), *(f"{x:.4f}" for x in errors), result.gap.text(i))
    all_errors = (result.ece, float(result.calibrated[0]))
    table.add_row("all", str(len(result.confidence)), *(f"{x:.4f}" for x in all_errors), "")
    return table


def calibration_figure(result: Calibration) -> Figure:
    """Draw the reliability diagram, and the signed gap by masks left."""
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    title = (
        f"{len(result.confidence):,} predictions at masked positions: ECE {result.ece:.3f}; a "
        f"calibrated model would have {float(result.calibrated[0]):.3f}"
    )
    write_title(figure, title)
    left, right = figure.subplots(1, 2)
    bins = result.reliability()
    left.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8, label="calibrated")
    most = float(bins[:, 0].max())
    for number, sure, right_share in bins.tolist():
        if number:
            size = 3 + 9 * (number / most) ** 0.5
            left.plot(sure, right_share, "o", color=BLUE, markersize=size, alpha=0.85)
    left.plot([], [], "o", color=BLUE, label="a bin; size: predictions")
    left.set(xlabel="confidence of the top prediction", ylabel="share that is right")
    legend_below(figure, left)
    seen = [i for i in range(len(QUARTERS)) if int(result.gap.texts[i])]
    mean, low, high = (x[seen].numpy() for x in (result.gap.mean, result.gap.low, result.gap.high))
    right.axhline(0, color=QUIET, linewidth=0.8)
    right.vlines(range(len(seen)), low, high, color=ORANGE)
    right.plot(range(len(seen)), mean, "o", color=ORANGE)
    right.set_xticks(range(len(seen)), [QUARTERS[i].replace("than ", "than\n") for i in seen])
    right.set(xlabel="share of the block's masks left", ylabel="confidence less share right")
    right.margins(x=0.15)
    for axes in (left, right):
        plain(axes)
    return figure


def probe_table(result: ProbeScores) -> Table:
    """Lay out a row a hook point: R^2 by column, and of shuffled labels."""
    caption = (
        f"R^2 on held-out texts of {result.texts}, position regressed out; plain: it is not. "
        f"Mean of {len(result.splits)} splits of the texts; splits: least and most of all. "
        f"Shuffled: least and most of {len(result.shuffled)} shuffles. A label that is the same in "
        "a whole column has no R^2."
    )
    if result.few_texts:
        caption += (
            f" Under {FEW_TEXTS} texts one of them can decide a score: compare the splits, or give "
            "more texts."
        )
    every, *columns = result.columns
    columns = ("hook point", every, "splits", *columns, "plain", "shuffled")
    table = new_table(f"linear probe of {result.label}", columns, ("hook point",), caption)
    for i, name in enumerate(result.names):
        cells = [_r2(float(x)) for x in result.r2[i]]
        cells.insert(1, _range(result.low[i, 0], result.high[i, 0]))
        chance = result.shuffled[:, i, 0]
        cells += [_r2(float(result.plain[i, 0])), _range(chance.min(), chance.max())]
        table.add_row(_short(name), *cells)
    return table


def probe_figure(result: ProbeScores) -> Figure:
    """Draw R^2 by layer, a line for each column, with the range of shuffled labels."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    places = range(len(result.names))
    shades = ("#9ecae1", "#6baed6", "#3182bd", "#08519c")
    for i, name in enumerate(result.columns):
        if bool(result.r2[:, i].isfinite().any()):
            color, width = (BLUE, 2.2) if i == 0 else (shades[(i - 1) % len(shades)], 1.1)
            style = "o-" if i == 0 else "o--"
            r2 = result.r2[:, i].numpy()
            axes.plot(places, r2, style, color=color, linewidth=width, markersize=3.5, label=name)
    bounds = (result.low[:, 0].numpy(), result.high[:, 0].numpy())
    axes.fill_between(
        places, *bounds, color=BLUE, alpha=0.15, linewidth=0, label="all, range over splits"
    )
    axes.plot(places, result.plain[:, 0].numpy(), ":", color=INK, label="all, without the control")
    chance = result.shuffled[:, :, 0]
    bounds = (chance.amin(0).numpy(), chance.amax(0).numpy())
    axes.fill_between(places, *bounds, color=ORANGE, alpha=0.3, linewidth=0)
    axes.plot(places, chance.mean(0).numpy(), color=ORANGE, label="shuffled labels")
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.set_xticks(list(places), [_short(name) for name in result.names], rotation=30, ha="right")
    axes.set(ylabel="R² on held-out texts", ylim=(max(min(axes.get_ylim()[0], -0.1), -0.5), 1.02))
    write_title(figure, f"Linear probe of {result.label}, position regressed out")
    legend_below(figure, axes, 3)
    plain(axes)
    return figure


def _r2(value: float) -> str:
    return "–" if value != value else f"{value:.2f}"


def _range(low: Tensor, high: Tensor) -> str:
    return "–" if bool(low.isnan()) else f"{float(low):.2f} to {float(high):.2f}"


def _short(name: str) -> str:
    """Return the name of a residual as the depth that it is."""
    if name == "blocks.0.hook_resid_pre":
        return "embedding"
    if name.endswith(".hook_resid_post"):
        return f"layer {name.split('.')[1]}"
    return name.removeprefix("blocks.")
