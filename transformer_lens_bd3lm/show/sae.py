"""Scores and activity of a sparse autoencoder, as tables and figures beside a random dictionary."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Group
from rich.table import Table
from torch import Tensor

from transformer_lens_bd3lm.analysis.effects import Effects
from transformer_lens_bd3lm.analysis.sae import FeatureActivity, SaeScores
from transformer_lens_bd3lm.analysis.sae.activity import MOVES
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
from transformer_lens_bd3lm.show.tables import new_table, off_distribution

NAMES = ("SAE", "random dictionary")
_COLORS, _DASHES = (BLUE, QUIET), ("-", "--")


def scores_table(result: SaeScores) -> Group:
    """Lay out variance, sparsity and recovered loss, in all and by masks left."""
    texts = count(len(result.tokens), "text")
    caption = (
        f"{texts}, {result.kind}; recovered: of what a {result.ablation} ablation costs; rows as "
        "under a uniform t" + off_distribution(result.trained_at)
    )
    first = new_table(_title(result), ("", *NAMES), ("",), caption)
    for row, kind in enumerate(("all rows", "masked rows", "revealed rows")):
        first.add_row(f"explained variance, {kind}", *_numbers(result.explained[:, row], 3))
    for row, kind in enumerate(("all rows", "masked rows", "revealed rows")):
        first.add_row(f"active features, {kind}", *_numbers(result.l0[:, row], 1))
    first.add_row(f"dead of {result.d_sae} features", *(f"{float(x):.1%}" for x in result.dead))
    for loss in ("nelbo", "nll"):
        if loss == "nelbo" or result.nll is not None:
            shares, lost = result.recovered(loss), result.lost(loss)
            first.add_row(f"{loss.upper()} recovered", *_shares(shares))
            first.add_row(f"{loss.upper()} lost, nats a token", *(lost.text(i) for i in (0, 1)))
    second = _split(result, "masks", [str(m + 1) for m in range(result.nelbo.shape[-1])])
    spans = [f"{a:g} to {b:g}" for a, b in zip(result.times, result.times[1:], strict=False)]
    return Group(first, second, _split(result, "time", spans))


def _split(result: SaeScores, by: str, labels: list[str]) -> Table:
    """Lay out the share of the NELBO that is recovered, by masks left or by t."""
    shares, head = result.recovered(by=by), {"masks": "masks left", "time": "t"}[by]
    masks = by == "masks"
    columns = (head, *NAMES, *(("explained variance", "active") if masks else ()))
    table = new_table(f"NELBO recovered by {head}", columns, (), "")
    rows = _thinned(len(labels))
    for cell in rows:
        more = (
            (
                _numbers(result.explained_by_masks[:1, cell], 3)[0],
                _numbers(result.l0_by_masks[:1, cell], 1)[0],
            )
            if masks
            else ()
        )
        table.add_row(labels[cell], *_shares(shares, cell), *more)
    return table


def scores_figure(result: SaeScores) -> Figure:
    """Draw the share of the NELBO recovered by masks left and by t, and explained variance."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    masks = range(1, result.nelbo.shape[-1] + 1)
    _curves(left, result.recovered(by="masks"), list(masks))
    left.set(xlabel="masks left in the block", ylabel="NELBO recovered")
    centers = [(a + b) / 2 for a, b in zip(result.times, result.times[1:], strict=False)]
    _curves(middle, result.recovered(by="time"), centers)
    middle.set(xlabel="t (1: all masked)", xlim=(0, 1), ylabel="NELBO recovered")
    for number, color in enumerate(_COLORS):
        right.plot(
            masks, result.explained_by_masks[number].numpy(), _DASHES[number], marker="o",
            color=color, markersize=3.5,
        )  # fmt: skip
    right.axhline(0, color=QUIET, linewidth=0.8)
    right.set(xlabel="masks left in the block", ylabel="explained variance, masks")
    for axes in (left, middle):
        axes.axhline(1, color=QUIET, linewidth=0.8)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, middle, right):
        plain(axes)
    for number, label in enumerate(NAMES):
        mean = float(result.recovered().mean[number])
        left.plot([], [], _DASHES[number], marker="o", markersize=3.5, color=_COLORS[number],
                  label=f"{label}: {mean:.1%} in all")  # fmt: skip
    legend_below(figure, left)
    write_title(figure, f"{_title(result)}; bar: 95% over {count(len(result.tokens), 'text')}")
    return figure


def activity_table(result: FeatureActivity, n: int = 10) -> Group:
    """Lay out overlaps between steps, and the ``n`` features that masks have most above tokens."""
    title = f"{result.name} of {result.model}, block size {result.block_size}: {result.sae}"
    first = new_table(
        f"{title}: features kept at the next step",
        ("position", *NAMES, "difference", "p"), ("position",),
        f"Jaccard overlap of active sets [{result.overlap.level:.0%}] over "
        f"{count(int(result.overlap.texts.max()), 'text')}; p corrected for all cells",
    )  # fmt: skip
    for move, name in enumerate(MOVES):
        cells = (result.overlap.text(i, move) for i in range(3))
        p = float(result.overlap.p[2, move])
        first.add_row(name, *cells, "–" if p != p else f"{p:.4f}")
    second = new_table(
        "features of masked positions", ("feature", "active at masks", "at written tokens"), (), ""
    )
    rate = result.mean_rate
    for feature in result.top_features(n).tolist():
        second.add_row(str(feature), *(f"{float(rate[i, feature]):.1%}" for i in (0, 1)))
    return Group(first, second)


def activity_figure(result: FeatureActivity) -> Figure:
    """Draw active features and overlap with the next step by masks left, and rates by feature."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    masks = range(1, result.rows.shape[-1] + 1)
    kinds = (("masked", BLUE), ("written", ORANGE))
    for kind, (label, color) in enumerate(kinds):
        left.plot(
            masks,
            result.l0[0, kind].numpy(),
            "o-",
            color=color,
            markersize=3,
            label=f"{label} (left)",
        )
    left.set(xlabel="masks left in the block", ylabel="active features", ylim=(0, None))
    for move, color in enumerate((BLUE, INK, ORANGE)):
        for number in (0, 1):
            middle.plot(
                masks, result.overlap_by_masks[number, move].numpy(), _DASHES[number],
                color=color, linewidth=1.3, label=None if number else MOVES[move],
            )  # fmt: skip
    middle.plot([], [], "--", color=QUIET, label="random dictionary")
    middle.set(xlabel="masks left in the block", ylabel="overlap with the next step", ylim=(0, 1))
    rate = result.mean_rate
    right.plot([0, 1], [0, 1], color=QUIET, linewidth=0.8)
    right.plot(rate[1].numpy(), rate[0].numpy(), "o", color=BLUE, markersize=3, alpha=0.5)
    right.set(xlabel="active at written tokens", ylabel="active at masks")
    for axis in (right.xaxis, right.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, middle):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (left, middle, right):
        plain(axes)
    legend_below(figure, middle, 3, further=left.get_lines())
    write_title(
        figure,
        f"{result.name} of {result.model}, block size {result.block_size}: {result.sae}, "
        f"{result.d_sae} features (right: a dot each)",
    )
    return figure


def _title(result: SaeScores) -> str:
    """Return what was scored."""
    return f"{result.sae} at {result.name} of {result.model}, block size {result.block_size}"


def _numbers(values: Tensor, digits: int) -> list[str]:
    """Return numbers as text, a dash where there is none."""
    return ["–" if x != x else f"{x:.{digits}f}" for x in values.tolist()]


def _shares(shares: Effects, *cell: int) -> list[str]:
    """Return the shares of both dictionaries, with their intervals, in percent."""
    words = []
    for number in (0, 1):
        mean, low, high = (
            float(x[(number, *cell)]) for x in (shares.mean, shares.low, shares.high)
        )
        ends = "" if low != low else f" [{low:.1%}, {high:.1%}]"
        words.append("–" if mean != mean else f"{mean:.1%}{ends}")
    return words


def _thinned(rows: int, most: int = 16) -> list[int]:
    """Return at most ``most`` rows, evenly spaced, the first and the last among them."""
    if rows <= most:
        return list(range(rows))
    return sorted({round(i * (rows - 1) / (most - 1)) for i in range(most)})


def _curves(axes: Axes, shares: Effects, x: list[float] | list[int]) -> None:
    """Draw the shares of both dictionaries; intervals that are far wider than they are cut."""
    means = shares.mean[:2][shares.mean[:2].isfinite()].tolist() or [0.0]
    low, high = min(*means, 1.0), max(*means, 1.0)
    axes.set_ylim(low - 0.35 * (high - low) - 0.02, high + 0.35 * (high - low) + 0.02)
    for number, color in enumerate(_COLORS):
        mean = shares.mean[number].tolist()
        axes.plot(x, mean, _DASHES[number], marker="o", color=color, markersize=3.5)
        for at, low, high in zip(
            x, shares.low[number].tolist(), shares.high[number].tolist(), strict=True
        ):
            if low == low:
                axes.plot([at, at], [low, high], color=color, linewidth=1.2)
