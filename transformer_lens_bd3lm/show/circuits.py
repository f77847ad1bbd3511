"""Edge attributions as tables of the strongest edges, and as maps of nodes beside their edges."""

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from transformer_lens_bd3lm.analysis.circuits import CircuitComparison, EdgeAttribution
from transformer_lens_bd3lm.result import count
from transformer_lens_bd3lm.show.style import (
    BLUE,
    BOTH_WAYS,
    INK,
    ORANGE,
    QUIET,
    WIDTH,
    heat_map,
    plain,
    write_caption,
    write_title,
)
from transformer_lens_bd3lm.show.tables import Tables, new_table


def edges_table(result: EdgeAttribution, n: int = 15) -> Table:
    """Lay out a row an edge, the ``n`` with the largest absolute attribution."""
    columns = ("edge", "nats", "share of gap")
    table = new_table(_title(result), columns, ("edge",), _caption(result))
    for node, reader, nats in result.top(n):
        table.add_row(f"{node} → {reader}", f"{nats:+.3f}", f"{nats / result.gap:.0%}")
    return table


def edges_figure(result: EdgeAttribution, n: int = 12) -> Figure:
    """Draw the nodes as a map of layer by head and MLP, and the ``n`` strongest edges as bars."""
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    write_title(figure, _title(result))
    write_caption(figure, _caption(result))
    grid = figure.add_gridspec(2, 2, height_ratios=(0.05, 1), width_ratios=(1, 1.1))
    axes, scale = (figure.add_subplot(grid[row, 0]) for row in (1, 0))
    _node_map(axes, scale, result, _most(result), "attribution of nodes, nats")
    bars, edges = figure.add_subplot(grid[:, 1]), result.top(n)[::-1]
    values, colors = [nats for *_, nats in edges], colormaps[BOTH_WAYS]
    bars.barh(range(len(edges)), values, color=[colors(0.85 if x > 0 else 0.15) for x in values])
    bars.set_yticks(range(len(edges)), [f"{node} → {reader}" for node, reader, _ in edges])
    bars.axvline(0, color=QUIET, linewidth=0.8)
    bars.set_xlabel(f"attribution of the {len(edges)} strongest edges, nats")
    plain(bars)
    return figure


def comparison_tables(result: CircuitComparison, n: int = 10) -> Tables:
    """Lay out the overlaps, and the nodes whose attribution changes most."""
    a, b = result.block_sizes
    caption = (
        f"Jaccard overlap of the {result.top} strongest edges, of halves without a common text. "
        f"All texts: {result.overlap:.2f}, {result.chance:.2f} if each text's block sizes are "
        f"swapped at random: p = {result.p:.4f}."
    )
    overlaps = new_table("Do two block sizes use the same edges?", ("halves", "overlap"),
                         ("halves",), caption)  # fmt: skip
    for size, value in zip(result.block_sizes, result.within, strict=True):
        overlaps.add_row(f"both at block size {size}", f"{float(value):.3f}")
    overlaps.add_row(f"one at {a}, one at {b}", f"{result.across:.3f}")
    change = result.change
    nodes = new_table(
        "Nodes that change most",
        ("node", f"at {a}", f"at {b}", "change [95%]", "p"),
        ("node",),
        f"Attribution in nats over {count(len(result.first.by_text), 'text')}; p is corrected for "
        "all nodes.",
    )
    for i in change.mean.abs().argsort(descending=True)[:n].tolist():
        p = float(change.p[i])
        nodes.add_row(
            result.first.node_names[i],
            f"{float(result.first.nodes[i]):+.3f}",
            f"{float(result.second.nodes[i]):+.3f}",
            change.text(i),
            "–" if p != p else f"{p:.4f}",
        )
    return Tables(overlaps, nodes)


def comparison_figure(result: CircuitComparison) -> Figure:
    """Draw the nodes at both block sizes as maps, and the overlaps of halves as bars."""
    figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
    name = f"Which components cause the prediction, {result.first.model}, at two block sizes"
    write_title(figure, name)
    caption = (
        f"EAP-IG over {count(len(result.first.by_text), 'text')}, the same masked inputs; overlap "
        f"of all texts {result.overlap:.2f}, swapped at random {result.chance:.2f}, "
        f"p = {result.p:.3f}"
    )
    write_caption(figure, caption)
    grid = figure.add_gridspec(2, 3, height_ratios=(0.05, 1), width_ratios=(1, 1, 0.9))
    most = max(_most(result.first), _most(result.second))
    for column, part in enumerate((result.first, result.second)):
        axes, scale = (figure.add_subplot(grid[row, column]) for row in (1, 0))
        _node_map(axes, scale, part, most, f"block size {part.block_size}: nodes, nats")
    bars = figure.add_subplot(grid[:, 2])
    a, b = result.block_sizes
    values = [*result.within.tolist(), result.across]
    bars.bar(range(3), values, color=[BLUE, BLUE, ORANGE], width=0.6)
    bars.set_xticks(range(3), [f"both\nat {a}", f"both\nat {b}", f"{a}\nand {b}"])
    for at, value in enumerate(values):
        bars.text(at, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8, color=INK)
    bars.set(ylim=(0, 1), ylabel="Jaccard overlap of two halves")
    bars.set_title(f"top {result.top} edges", loc="left", fontsize=9, color=INK)
    plain(bars)
    return figure


def _node_map(axes: Axes, scale: Axes, result: EdgeAttribution, most: float, name: str) -> None:
    """Draw the heads and MLPs as a map of layers; the embedding is in its color scale's title."""
    nodes = result.nodes[1:]
    layers = sum(node.startswith("mlp") for node in result.node_names)
    values = nodes.view(layers, -1)
    heat_map(axes, scale, values, 0, (-most, most), BOTH_WAYS, name)
    heads = values.shape[1] - 1
    axes.set_xticks(range(heads + 1), [*map(str, range(heads)), "MLP"], rotation=90 * (heads > 8))
    axes.set_yticks(range(layers))
    axes.set(xlabel="head, and MLP", ylabel="layer")
    plain(axes)


def _most(result: EdgeAttribution) -> float:
    """Return the largest absolute attribution of a head or MLP."""
    return float(result.nodes[1:].abs().max()) or 1.0


def _title(result: EdgeAttribution) -> str:
    """Say what was attributed."""
    size = "" if result.block_size is None else f", block size {result.block_size}"
    method = "EAP" if result.steps == 1 else f"EAP-IG, {result.steps} steps"
    return f"Edges that cause the prediction, {result.model}{size} ({method})"


def _caption(result: EdgeAttribution) -> str:
    """Say how large the gap is, and how near the embedding's edges come to it."""
    embed = float(torch.as_tensor(result.nodes[0]))
    text = (
        f"{count(len(result.by_text), 'pair')} of texts; clean minus corrupted score "
        f"{result.gap:+.2f} nats, the embedding's edges sum to {embed:+.2f}"
    )
    return text + ("; off-distribution: masks in earlier blocks" * result.off_distribution)
