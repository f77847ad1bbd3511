"""Several checkpoints as figures; one checkpoint's are in ``plots``, and so is the style."""

import io
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from transformer_lens_bd3lm.analysis.compare_checkpoints.activations import ActivationComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints.compare import CheckpointComparison
from transformer_lens_bd3lm.analysis.compare_checkpoints.predictions import PredictionComparison
from transformer_lens_bd3lm.analysis.compare_models import ModelComparison
from transformer_lens_bd3lm.show.figures import BLUE, INK, ORANGE, heat_map, plain


def family_figure(family: ModelComparison) -> Figure:
    """Nats a token of each checkpoint, best at the top of its kind, and intervals over texts."""
    members = family.members
    figure = Figure(figsize=(6.4, 1.3 + 0.45 * len(members)), layout="constrained")
    axes = figure.add_subplot()
    for at, each in enumerate(members):
        bound, nll = each.measured.nelbo, each.measured.nll
        low, high = bound.interval() if bound.texts > 1 else (bound.nats_per_token,) * 2
        exact = each.kind == "autoregressive"
        color = BLUE if exact else ORANGE
        axes.plot([low, high], [at, at], color=color, linewidth=1.4)
        axes.plot([bound.nats_per_token], [at], "o", color=color, markersize=6)
        if nll is not None and not exact:
            axes.plot([nll.nats_per_token], [at], "D", color=BLUE, markersize=5)
        axes.annotate(
            f"{'' if exact else '≤ '}{bound.perplexity:.2f}", (high, at), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8, color=INK,
        )  # fmt: skip
    axes.set_yticks(range(len(members)), [f"{each.name}\n{each.writes}" for each in members])
    axes.set_ylim(len(members) - 0.5, -0.5)
    axes.margins(x=0.15)
    for color, label in ((BLUE, "exact NLL"), (ORANGE, "NELBO, a bound")):
        axes.plot([], [], "-o", color=color, markersize=5, linewidth=1.4, label=label)
    axes.set(xlabel="nats a token; line: 95% over texts; number: perplexity")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, loc="best")
    plain(axes)
    return figure


def diff_figure(diff: CheckpointComparison) -> Figure:
    """Bars per component, heads' weights as a map; with a text, attention, activations and KL."""
    heads = diff.weights.by_head()
    depth, width = heads.shape
    across = min(max(width * 0.3, 2.6), 4.5)
    read = diff.predictions is not None and diff.activations is not None
    columns = 3 if read else 2
    bars = 4.2
    figure = Figure(
        figsize=(bars + across * (columns - 1) + 1.2, 6.6 if read else 4.4), layout="constrained"
    )
    figure.suptitle(f"a  {diff.a}\nb  {diff.b}", x=0.01, ha="left", color=INK, fontsize=10)
    for text in figure.texts:
        text.set_parse_math(False)
    grid = figure.add_gridspec(
        3 if read else 2, columns, width_ratios=(bars, *[across] * (columns - 1)),
        height_ratios=(0.12, 3.6, 2.4)[: 3 if read else 2],
    )  # fmt: skip
    draw_components(figure.add_subplot(grid[:2, 0]), diff)
    maps: list[tuple[Any, str]] = [(heads, "relative change of a head's weights")]
    if diff.activations is not None:
        maps.append((diff.activations.attention, "attention change, masked queries"))
    for column, (values, name) in enumerate(maps, 1):
        axes, scale = (figure.add_subplot(grid[row, column]) for row in (1, 0))
        seen = values[values.isfinite()]
        limits = (0.0, float(seen.max()) if bool((seen > 0).any()) else 1.0)
        heat_map(axes, scale, values, 0, limits, "Blues", name)
        axes.set(xlabel="head", ylabel="layer" if column == 1 else "")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    if diff.predictions is not None and diff.activations is not None:
        draw_positions(figure.add_subplot(grid[2, 0]), diff.predictions)
        draw_activations(figure.add_subplot(grid[2, 1:]), diff.activations)
    return figure


def draw_components(axes: Axes, diff: CheckpointComparison, most: int = 20) -> None:
    """The components that changed most, heads together."""
    shown = [each for each in diff.weights.joined() if each.change.relative < float("inf")][:most]
    axes.barh(range(len(shown)), [each.change.relative for each in shown], color=INK, height=0.7)
    axes.set_yticks(range(len(shown)), [each.name for each in shown])
    axes.set(ylim=(len(shown) - 0.4, -0.6), xlabel=f"relative change, the {len(shown)} largest")
    axes.set(xlim=(0, max([each.change.relative * 1.05 for each in shown] + [1e-12])))
    axes.axvline(diff.weights.whole.relative, color=ORANGE, linewidth=1.2, label="whole model")
    above = {"loc": "lower right", "bbox_to_anchor": (1, 0.99)}
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, **above)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    plain(axes)


def draw_positions(axes: Axes, found: PredictionComparison) -> None:
    """KL along the text, mean over the rows that mask a position."""
    kl = found.by_position()
    axes.bar(range(len(kl)), kl.nan_to_num(0.0).tolist(), width=0.8, color=INK)
    top = max(float(kl.nan_to_num(0.0).max()) * 1.05, 1e-12)
    axes.set(xlabel="position", ylabel="$KL(p_a\\,\\|\\,p_b)$, nats", ylim=(0, top))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)


def draw_activations(axes: Axes, found: ActivationComparison) -> None:
    """Relative change of the stream and of what is written to it, by layer."""
    lines = (
        ("hook_resid_post", INK, "resid_post"),
        ("hook_attn_out", ORANGE, "attn_out"),
        ("hook_mlp_out", BLUE, "mlp_out"),
    )
    streams = [s for s in ("noisy", "single", "clean") if any(p.stream == s for p in found.points)]
    for stream, style in zip(streams, ("-o", "--o"), strict=False):
        inside = "white" if stream == "clean" else None
        for point, colour, name in lines:
            at = sorted(
                (each.layer, each.relative)
                for each in found.points
                if each.point == point and each.stream == stream
            )
            axes.plot(
                *zip(*at, strict=True), style, color=colour, markersize=3.5, linewidth=1.2,
                markerfacecolor=inside or colour, label=f"{name}, {stream}",
            )  # fmt: skip
    axes.set(xlabel="layer", ylabel="relative change")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False, fontsize=7.5, labelcolor=INK, ncols=len(streams))
    plain(axes)


def write_figure(figure: Figure, path: Path, title: str) -> None:
    """Save a figure as its name says; ``.html`` is a page that needs nothing else.

    Args:
        figure: what was drawn.
        path: a name that ends in .html, .png, .svg or .pdf.
        title: of the page.
    """
    if path.suffix.lower() != ".html":
        figure.savefig(path, dpi=160)
        return
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg")
    svg = drawn.getvalue()
    path.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>\n'
        "<style>body { background: white } svg { max-width: 100%; height: auto }</style>\n"
        f"<body>\n{svg[svg.index('<svg') :]}</body></html>\n",
        encoding="utf-8",
    )
