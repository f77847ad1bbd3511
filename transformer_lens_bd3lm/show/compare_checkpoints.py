"""Two checkpoints side by side, as tables and as a figure."""

import math
from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.table import Table
from rich.text import Text

from transformer_lens_bd3lm.analysis.compare_checkpoints import CheckpointComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints.activations import ActivationComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints.predictions import PredictionComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints.weights import WeightComparison
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    BLUE,
    INK,
    LIGHT_TO_DARK,
    ORANGE,
    WIDTH,
    heat_map,
    number_axes,
    plain,
    write_title,
)
from transformer_lens_bd3lm.show.tables import Tables, new_table, percent


def checkpoints_tables(comparison: CheckpointComparison, n: int = 10) -> Tables:
    """Lay out what changed most in weights, predictions and activations.

    Args:
        comparison: two checkpoints.
        n: largest number of rows of each table.
    """
    return Tables(*_tables(comparison, n))


def _tables(comparison: CheckpointComparison, n: int) -> Iterator[Table | Text]:
    """Yield the names, a table for each part that was compared, and what was left out."""
    yield Text.assemble(("a", "bold"), f"  {comparison.a}\n", ("b", "bold"), f"  {comparison.b}")
    yield _weights_table(comparison.weights, n)
    if comparison.predictions is not None:
        yield _predictions_table(comparison, comparison.predictions, n)
    if comparison.activations is not None:
        yield _activations_table(comparison.activations, n)
    for part in comparison.left_out:
        yield Text(f"Not compared: {part}.")


def _weights_table(weights: WeightComparison, n: int) -> Table:
    """Lay out the components whose weights changed most."""
    caption = (
        f"{weights.identical:,} of {count(weights.tensors, 'tensor')} are identical. "
        "Change: |b - a| / |a|."
    )
    heads = [each for each in weights.components if each.head is not None][:3]
    heads = [each for each in heads if not each.change.identical]
    changed = ", ".join(f"{each.name} {percent(each.change.relative)}" for each in heads)
    table = new_table(
        f"weights: {percent(weights.whole.relative)} of a's norm, cosine "
        f"{weights.whole.cosine:.6f}",
        ("component", "change", "cosine", "largest", "parameters"),
        ("component",),
        caption + (f" By head: {changed}." if changed else ""),
    )
    for each in weights.joined()[:n]:
        change = each.change
        if not each.change.identical:
            cells = percent(change.relative), f"{change.cosine:.6f}", f"{change.largest:.3g}"
            table.add_row(each.name, *cells, f"{change.size:,}")
    return table


def _predictions_table(
    comparison: CheckpointComparison, predictions: PredictionComparison, n: int
) -> Table:
    """Lay out the positions whose predictions differ most, with means and the bound below."""
    size = comparison.block_size
    a_to_b, b_to_a = predictions.mean_kl
    caption = (
        f"Mean KL(a||b) {a_to_b:.4f}, KL(b||a) {b_to_a:.4f} nats a token; most likely token the "
        f"same at {predictions.agreement:.1%}.\nlog p of the true token, b less a: "
        f"{predictions.mean_log_p_change:+.4f} nats a token{_interval(predictions.interval())}."
    )
    if comparison.bound is not None:
        bound = comparison.bound
        error = "" if bound.a.kind == "exact" else f" ± {bound.standard_error:.4f}"
        caption += (
            f"\nNELBO, {bound.method.replace('_', ' ')}: "
            f"{bound.a.nats_per_token:.4f} and {bound.b.nats_per_token:.4f} nats a token, b less a "
            f"{bound.difference:+.4f}{error}{_interval(bound.interval())}."
        )
    table = new_table(
        f"predictions at {count(len(predictions.token), 'masked position')}"
        + ("" if size is None else f", block size {size}"),
        ("row", "position", "token", "KL(a||b)", "log p: a", "b", "most likely: a", "b"),
        ("row", "token", "most likely: a"),
        caption,
    )
    for each in predictions.largest(n):
        place = str(each.row), str(each.position), repr(each.word), f"{each.kl:.3f}"
        cells = *place, *(f"{x:.2f}" for x in each.log_p), *map(repr, each.top)
        table.add_row(*map(Text, cells))  # tokens are shown as they are, without markup
    return table


def _activations_table(activations: ActivationComparison, n: int) -> Table:
    """Lay out the hook points that differ most; below, the first that differs in a pass."""
    heads = [f"{layer}.{head} {x:.3f}" for layer, head, x in activations.heads(5) if x]
    moved = f"\nAttention of masked queries changed most in layer.head {', '.join(heads)} (0 to 1)."
    table = new_table(
        f"activations on {count(activations.positions, 'position')}",
        ("hook point", "stream", "change", "cosine", "CKA", "largest"),
        ("hook point", "stream"),
        f"First to differ: {activations.first or 'none, all are identical'}."
        + (moved if heads else ""),
    )
    for each in activations.points[:n]:
        if not each.identical:
            cka = "–" if math.isnan(each.cka) else f"{each.cka:.4f}"
            cells = percent(each.relative), f"{each.cosine:.4f}", cka, f"{each.largest:.3g}"
            table.add_row(each.name, each.stream, *cells)
    return table


def _interval(interval: tuple[float, float] | None) -> str:
    """Return an interval to stand behind its value; empty for None."""
    return "" if interval is None else " [{:+.4f}, {:+.4f} at 95% over texts]".format(*interval)


def checkpoints_figure(comparison: CheckpointComparison) -> Figure:
    """Draw changes of components and heads; with a text, of attention, activations, predictions."""
    heads = comparison.weights.by_head()
    read = comparison.predictions is not None and comparison.activations is not None
    columns = 3 if read else 2
    figure = Figure(figsize=(WIDTH, 6.6 if read else 4.4), layout="constrained")
    write_title(figure, f"Two checkpoints, a: {comparison.a}, b: {comparison.b}")
    grid = figure.add_gridspec(
        3 if read else 2, columns, width_ratios=(1.25, *[1] * (columns - 1)),
        height_ratios=(0.12, 3.6, 2.4)[: 3 if read else 2],
    )  # fmt: skip
    _draw_components(figure.add_subplot(grid[:2, 0]), comparison)
    maps: list[tuple[Any, str]] = [(heads, "change of weights")]
    if comparison.activations is not None:
        maps.append((comparison.activations.attention, "change of attention"))
    for column, (values, name) in enumerate(maps, 1):
        axes, scale = (figure.add_subplot(grid[row, column]) for row in (1, 0))
        finite = values[values.isfinite()]
        limits = (0.0, float(finite.max()) if bool((finite > 0).any()) else 1.0)
        heat_map(axes, scale, values, 0, limits, LIGHT_TO_DARK, name)
        axes.set(xlabel="head", ylabel="layer" if column == 1 else "")
        number_axes(axes)
    if comparison.predictions is not None and comparison.activations is not None:
        _draw_positions(figure.add_subplot(grid[2, 0]), comparison.predictions)
        _draw_activations(figure.add_subplot(grid[2, 1:]), comparison.activations)
    return figure


def _draw_components(axes: Axes, comparison: CheckpointComparison, most: int = 20) -> None:
    """Draw the components that changed most, heads together."""
    shown = [each for each in comparison.weights.joined() if each.change.relative < float("inf")][
        :most
    ]
    axes.barh(range(len(shown)), [each.change.relative for each in shown], color=INK, height=0.7)
    axes.set_yticks(range(len(shown)), [each.name for each in shown])
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel=f"relative change, the {len(shown)} largest")
    axes.set(xlim=(0, max([each.change.relative * 1.05 for each in shown] + [1e-12])))
    axes.axvline(
        comparison.weights.whole.relative, color=ORANGE, linewidth=1.2, label="whole model"
    )
    above = {"loc": "lower right", "bbox_to_anchor": (1, 0.99)}
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, **above)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    plain(axes)


def _draw_positions(axes: Axes, predictions: PredictionComparison) -> None:
    """Draw the KL along the text, mean over the rows that mask a position."""
    kl = predictions.by_position()
    axes.bar(range(len(kl)), kl.nan_to_num(0.0).tolist(), width=0.8, color=INK)
    top = max(float(kl.nan_to_num(0.0).max()) * 1.05, 1e-12)
    axes.set(xlabel="position", ylabel="$KL(p_a\\,\\|\\,p_b)$, nats", ylim=(0, top))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)


def _draw_activations(axes: Axes, activations: ActivationComparison) -> None:
    """Draw the relative change of the stream and of what is written to it, by layer."""
    lines = (
        ("hook_resid_post", INK, "resid_post"),
        ("hook_attn_out", ORANGE, "attn_out"),
        ("hook_mlp_out", BLUE, "mlp_out"),
    )
    streams = [
        s for s in ("noisy", "single", "clean") if any(p.stream == s for p in activations.points)
    ]
    for stream, style in zip(streams, ("-o", "--o"), strict=False):
        fill = "white" if stream == "clean" else None
        for point, color, name in lines:
            at = sorted(
                (each.layer, each.relative)
                for each in activations.points
                if each.point == point and each.stream == stream
            )
            axes.plot(
                *zip(*at, strict=True), style, color=color, markersize=3.5, linewidth=1.2,
                markerfacecolor=fill or color, label=f"{name}, {stream}",
            )  # fmt: skip
    axes.set(xlabel="layer", ylabel="relative change")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(
        frameon=False, fontsize=8, labelcolor=INK, ncols=len(streams), loc="lower left",
        bbox_to_anchor=(0, 1),
    )  # fmt: skip
    plain(axes)
