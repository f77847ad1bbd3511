"""Commitment, and the lens over a run, as tables and figures."""

from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.over_run.commitment import CONTROLS, Commitment
from transformer_lens_bd3lm.analysis.over_run.run_lens import RunLens
from transformer_lens_bd3lm.analysis.over_run.written import QUARTERS
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    LIGHT_TO_DARK,
    ORANGE,
    QUIET,
    WIDTH,
    heat_map,
    legend_below,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import Tables, new_table

ORDERS = {
    "drawn": "The reveal order was drawn by noise alone: when a token is revealed does not depend "
    "on the model.",
    "forced": "The reveal order was forced: when a token is revealed does not depend on the model.",
    "model": "The reveal order was chosen by the model's predictions.",
}
NAMES = {
    "confidence": "its own probability",
    "redrawn": "another draw",
    "unigram": "unigram",
    "matched": "same entropy, other text",
}
_SHORT = {
    "confidence": "its own p",
    "redrawn": "another draw",
    "unigram": "unigram",
    "matched": "same entropy",
}
_GREEN = "#009e73"
COLORS = {"confidence": ORANGE, "redrawn": _GREEN, "unigram": QUIET, "matched": "#cc79a7"}


def commitment_tables(result: Commitment) -> Tables:
    """Lay out how early tokens are decided, and the rates by masks left, beside the controls."""
    caption = (
        f"{count(len(result.row), 'position')} in {count(result.texts, 'text')}; 95% intervals "
        "over texts. Share of masked steps: 0 is the first step at which a position is masked, 1 "
        f"its reveal. {ORDERS[result.order]}"
    )
    one = new_table("when a token is decided", ("", "mean"), ("",), caption)
    share, passes = result.share, result.passes
    for name, value in (
        ("top prediction settled, share of masked steps", _mean(share, 0)),
        ("decided: it is the final token from there on", _mean(share, 1)),
        ("  control: another draw at each step", _mean(share, 2)),
        ("  control: unigram", _mean(share, 3)),
        ("earlier than another draw, share of steps", result.earlier.text(0)),
        ("earlier than the unigram", result.earlier.text(1)),
        ("final token was on top before its reveal, rate", _mean(passes, 0)),
        ("  control: another draw", _mean(passes, 1)),
        ("  control: unigram", _mean(passes, 2)),
        ("flips of the top prediction, per position", _mean(result.mean_flips)),
    ):
        one.add_row(name, value)
    return Tables(one, _rates_table(result))


def _rates_table(result: Commitment) -> Table:
    columns = ("masks left", "rate", *(_SHORT[name] for name in CONTROLS), "margin")
    caption = (
        "By share of the block's masks left, before the reveal. Controls: its own p, the top "
        "prediction's probability, the rate to expect of calibrated predictions; another draw from "
        "the same prediction; the unigram's top token; the top token where another text's "
        "prediction has the same entropy. *: differs from the rate, corrected (max-T). Margin: "
        "probability of the top prediction less the second."
    )
    title = "rate at which the top prediction is the final token, beside controls"
    table = new_table(title, columns, ("masks left",), caption)
    for quarter, name in enumerate(QUARTERS):
        if int(result.margin.texts[quarter]) == 0:
            continue
        cells = [_rate(result.correct, quarter)]
        for control in range(len(CONTROLS)):
            star = "*" if bool(result.above.significant[control, quarter]) else ""
            cells.append(_rate(result.controls, control, quarter) + star)
        table.add_row(name, *cells, _rate(result.margin, quarter))
    return table


def _rate(effects: Effects, *cell: int) -> str:
    value = float(effects.mean[cell])
    return "–" if value != value else f"{value:.3f}"


def commitment_figure(result: Commitment) -> Figure:
    """Draw the rate at which the final token is predicted by masks left, and shares of steps."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    write_title(figure, "When is a token decided? " + ORDERS[result.order])
    left, right = figure.subplots(1, 2, width_ratios=(1.35, 1))
    seen = [i for i in range(len(QUARTERS)) if int(result.correct.texts[i])]
    places = range(len(seen))
    for number, name in enumerate(CONTROLS):
        rate = result.controls.mean[number, seen].numpy()
        left.plot(places, rate, "o--", color=COLORS[name], label=NAMES[name], markersize=3.5)
    bounds = (result.correct.low[seen].numpy(), result.correct.high[seen].numpy())
    left.fill_between(places, *bounds, color=BLUE, alpha=0.18, linewidth=0)
    rate = result.correct.mean[seen].numpy()
    left.plot(places, rate, "o-", color=BLUE, label="top prediction", linewidth=1.8)
    left.set_xticks(list(places), [QUARTERS[i].replace("than ", "than\n") for i in seen])
    left.set(xlabel="share of the block's masks left", ylabel="rate of the final token")
    left.set_ylim(bottom=0)
    legend_below(figure, left, 3)
    share, colors = result.share, (BLUE, BLUE, _GREEN, QUIET)
    labels = ("settled", "decided", "decided by\nanother draw", "decided by\nunigram")
    for i, color in enumerate(colors):
        mean, low, high = (float(x[i]) for x in (share.mean, share.low, share.high))
        right.barh(i, mean, color=color, alpha=0.45 if i == 0 else 0.9, height=0.6)
        right.plot([low, high], [i, i], color=INK, linewidth=1.2)
    right.set_yticks(range(len(labels)), labels)
    right.invert_yaxis()
    right.set_xlim(0, 1)
    right.set(xlabel="share of its masked steps (1: the reveal)")
    for axes in (left, right):
        plain(axes)
    return figure


def run_lens_table(result: RunLens) -> Table:
    """Lay out a row a depth: log p of the final token and how often it is on top, by masks left."""
    seen = [i for i in range(len(QUARTERS)) if int(result.readable.texts[0, i])]
    columns = ("after", *(QUARTERS[i] for i in seen))
    caption = (
        f"{count(result.log_p.shape[1], 'prediction')}. Mean over texts of log p in nats (rate at "
        "which it is the likeliest token), by share of the block's masks left."
    )
    table = new_table("log p of the final token by depth", columns, ("after",), caption)
    for depth in range(len(result.log_p)):
        cells = [
            f"{float(result.mean_log_p.mean[depth, i]):.2f} "
            f"({float(result.readable.mean[depth, i]):.2f})"
            for i in seen
        ]
        table.add_row(f"layer {depth - 1}" if depth else "embedding", *cells)
    return table


def run_lens_figure(result: RunLens) -> Figure:
    """Draw log p of the final token, and how often it is on top, by depth and masks left."""
    seen = [i for i in range(len(QUARTERS)) if int(result.readable.texts[0, i])]
    depths = len(result.log_p)
    height = min(max(depths * 0.28, 2.2), 5.0)
    figure = Figure(figsize=(WIDTH, height + 1.8), layout="constrained")
    write_title(figure, "The final token in the prediction of each depth, over the steps of a run")
    grid = figure.add_gridspec(2, 2, height_ratios=(0.1, height))
    maps = (
        (result.mean_log_p.mean, "log p of the final token, nats"),
        (result.readable.mean, "rate at which it is the likeliest token"),
    )
    for column, (values, name) in enumerate(maps):
        axes, scale = (figure.add_subplot(grid[row, column]) for row in (1, 0))
        shown = values[:, seen]
        low = float(shown.min()) if column == 0 else 0.0
        high = 0.0 if column == 0 else max(float(shown.max()), 0.1)
        heat_map(axes, scale, shown, 0, (low, high), LIGHT_TO_DARK, name)
        axes.set_xticks(range(len(seen)), [QUARTERS[i].replace("than ", "than\n") for i in seen])
        labels = ["embedding", *(f"layer {i}" for i in range(depths - 1))]
        axes.set_yticks(range(depths), labels)
        axes.tick_params(labelleft=not column)
        axes.set(xlabel="share of the block's masks left", ylabel="" if column else "read after")
    return figure


def _mean(effects: Effects, *cell: int) -> str:
    """Return a mean and its interval without plus signs, since it is a share or a count."""
    return effects.text(*cell).replace("+", "")
