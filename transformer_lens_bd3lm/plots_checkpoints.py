"""Several checkpoints as figures; one checkpoint's are in ``plots``, and so is the style."""

from collections.abc import Sequence

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from transformer_lens_bd3lm.analysis.dependency import Dependency
from transformer_lens_bd3lm.analysis.diff import Diff, TextChange
from transformer_lens_bd3lm.analysis.family import Family
from transformer_lens_bd3lm.plots import BLUE, INK, ORANGE, QUIET, SHORT, drawn, heat_map, plain

LINES = (INK, ORANGE, BLUE, QUIET)


def family_figure(family: Family) -> Figure:
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


WEIGHTS = ("ln1", "attn.q", "attn.k", "attn.v", "attn.o", "ln2", "mlp.in", "mlp.out", "adaln")


def diff_figure(diff: Diff) -> Figure:
    """How far weights moved by layer; with a text, attention, residuals, writes and predictions."""
    layers = len({each.name.split(".")[1] for each in diff.weights if "blocks" in each.name})
    height = min(max(layers * 0.3, 2.0), 5.0)
    text = diff.text
    figure = Figure(
        figsize=(4.2, height + 1.2) if text is None else (11.5, height + 3.2), layout="constrained"
    )
    figure.suptitle(f"{diff.a} → {diff.b}", x=0.01, ha="left", color=INK, fontweight="bold")
    if text is None:
        grid = figure.add_gridspec(2, 1, height_ratios=(0.12, height))
    else:
        grid = figure.add_gridspec(
            3, 3, width_ratios=(1.2, 1, 1.1), height_ratios=(0.12, height, 1.7)
        )
    weights = figure.add_subplot(grid[1, 0])
    parts = [
        part for part in WEIGHTS if any(f".{part}." in f"{each.name}." for each in diff.weights)
    ]
    moved = torch.tensor(
        [[diff.at(f"blocks.{i}.{part}").relative for part in parts] for i in range(layers)]
    )
    most = float(moved[moved.isfinite()].max()) if bool(moved.isfinite().any()) else 0.0
    limits = (0.0, max(most, 1e-9))
    scale = figure.add_subplot(grid[0, 0])
    heat_map(weights, scale, moved, 0, limits, "Blues", "weights, $|b - a|\\,/\\,|a|$")
    weights.set_xticks(range(len(parts)), parts, rotation=90)
    weights.set(ylabel="layer")
    weights.yaxis.set_major_locator(MaxNLocator(integer=True))
    if text is not None:
        change = text.passes.attention[0]
        attention = figure.add_subplot(grid[1, 1], sharey=weights)
        limits = (0.0, max(float(change.max()), 1e-9))
        scale = figure.add_subplot(grid[0, 1])
        heat_map(attention, scale, change, 0, limits, "Blues", "attention change")
        attention.set(xlabel="head")
        attention.xaxis.set_major_locator(MaxNLocator(integer=True))
        draw_streams(figure.add_subplot(grid[1, 2], sharey=weights), text)
        draw_log_p(figure.add_subplot(grid[2, :2]), diff)
        draw_moved(figure.add_subplot(grid[2, 2]), diff)
    return figure


def draw_streams(axes: Axes, text: TextChange) -> None:
    """By layer, how far the residuals turned, and how far what is written moved."""
    names = ("noisy", "clean") if len(text.passes.streams) == 2 else ("residual",)
    for stream, name, colour in zip(text.passes.streams, names, (INK, QUIET), strict=False):
        left = stream.cosine.clamp(-1, 1).arccos().mean(1)[1:]
        axes.plot(
            left, range(len(left)), "-o", color=colour, markersize=4, linewidth=1.2,
            label=f"angle, {name}, rad",
        )  # fmt: skip
    written = text.passes.written
    assert written is not None
    for part, name, colour in zip(written[..., 0], ("attn", "mlp"), (BLUE, ORANGE), strict=True):
        axes.plot(
            part, range(len(part)), "--s", color=colour, markersize=3.5, linewidth=1.0,
            label=f"{name} out, $|b - a|\\,/\\,|a|$",
        )  # fmt: skip
    axes.set(xlabel="0 is the same")
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=7, labelcolor=INK, loc="lower right")
    plain(axes)


def draw_log_p(axes: Axes, diff: Diff) -> None:
    """What the first row's true tokens gain or lose."""
    text = diff.text
    assert text is not None
    gain = (text.log_p[1] - text.log_p[0])[0].nan_to_num(0.0)
    colours = [BLUE if x > 0 else ORANGE for x in gain.tolist()]
    axes.bar(range(len(gain)), gain.tolist(), width=0.8, color=colours)
    axes.axhline(0, color=QUIET, linewidth=0.8)
    axes.set(ylabel=f"log p, {diff.b} less {diff.a}\nnats, row 0", xlabel="position")
    if len(gain) <= SHORT:
        axes.set_xticks(range(len(gain)), [drawn(word) for word in text.words[0]], rotation=90)
        for tick, dark in zip(axes.get_xticklabels(), text.masked[0].tolist(), strict=True):
            tick.set(parse_math=False, color=INK if dark else QUIET)
        axes.set(xlabel="token, dark where masked")
    plain(axes)


def draw_moved(axes: Axes, diff: Diff) -> None:
    """How KL(p_a || p_b) is spread over all predictions."""
    text = diff.text
    assert text is not None
    kl = text.kl[text.masked].sort(descending=True).values
    axes.plot(torch.linspace(0, 100, len(kl)).tolist(), kl.tolist(), color=INK, linewidth=1.2)
    axes.axhline(text.mean_kl, color=QUIET, linestyle=":", linewidth=1)
    axes.set(xlabel="predictions, % (dotted: mean)", ylabel="$KL(p_a\\,\\|\\,p_b)$, nats")
    axes.set_ylim(bottom=0)
    plain(axes)


def dependency_figure(found: Sequence[Dependency]) -> Figure:
    """Nats and order by depth, a line a checkpoint; and each one's probe, by time and layer."""
    probed = [each for each in found if each.probe is not None]
    figure = Figure(figsize=(9.0, 3.2 + (3.0 if probed else 0)), layout="constrained")
    grid = figure.add_gridspec(2 if probed else 1, 2 * max(len(probed), 1))
    half = max(len(probed), 1)
    for at, name in enumerate(("nats", "order")):
        axes = figure.add_subplot(grid[0, at * half : (at + 1) * half])
        for number, each in enumerate(found):
            draw_by_depth(axes, each, name, LINES[number % len(LINES)], number, len(found))
        plain(axes)
    for number, each in enumerate(probed):
        draw_probe(figure.add_subplot(grid[1, 2 * number : 2 * number + 2]), each)
    return figure


def draw_by_depth(
    axes: Axes, found: Dependency, name: str, colour: str, number: int, of: int
) -> None:
    """A mean by depth, and 95% over sentences."""
    kept = found.nats if name == "nats" else found.order
    if kept is None:
        return
    there = [depth for depth in range(len(kept.mean)) if int(kept.tokens[depth])]
    shift = 0.12 * (number - (of - 1) / 2)
    for depth, interval in zip(there, (kept.interval()[i] for i in there), strict=True):
        if interval is not None:
            axes.plot([depth + shift] * 2, interval, color=colour, linewidth=1)
    axes.plot(
        [depth + shift for depth in there], [float(kept.mean[depth]) for depth in there],
        "-o", color=colour, markersize=4, linewidth=1.2, label=found.model,
    )  # fmt: skip
    axes.set_xticks(range(len(found.labels)), found.labels)
    axes.set(xlabel="dependency depth")
    if name == "nats":
        axes.set(ylabel="NELBO, nats a token")
    else:
        axes.axhline(0.5, color=QUIET, linestyle=":", linewidth=1)
        axes.set(ylabel=f"order by {found.order_by}\n0 first, 1 last; dotted: first hitting")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)


def draw_probe(axes: Axes, found: Dependency) -> None:
    """R² by layer, a line a time, over the range of the shuffled labels'."""
    probe = found.probe
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
    axes.set_title(found.model, loc="left", color=INK, fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    plain(axes)
